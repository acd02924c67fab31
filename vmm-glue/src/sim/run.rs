//! The scheduler: decides by dice who acts next, and what the control thread does meanwhile.
//!
//! Flow: seed → plan (queues, reactors, disk, memory) → steps: a reactor's pass, a reactor going to sleep, a guest's
//! step, a control action, time passing → checks at the end or after a power cut. Owner: one thread.
//! **Invariant:** a reactor that sleeps is woken only by a kick, a message or a completion; a guest that sleeps only by
//! an interrupt. When nobody can run and no completion is due, something was lost.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ringmill_core::IoStatus;
use ringmill_core::bdev::{
    AlignChannel, Alignment, Bdev, BlockLocks, Channel, ChannelSeed, InstantChannel,
};
use ringmill_core::io::IoOp;
use ringmill_core::limits::{BLOCK_LOCK_BUCKETS, BLOCK_LOCK_SPAN_BYTES};
use ringmill_core::mem::Bounce;
use ringmill_core::reactor::{Done, Poller, ReactorCx};
use ringmill_core::stats::QueueStats;
use ringmill_core::units::{bytes_u64, usize_of};

use crate::blk::{BlkDevice, QueueStatus, QueueWorker, WorkerControl, WorkerEvent, WorkerParts};
use crate::virtq::{PackedQueue, SplitQueue, Virtqueue};

use super::disk::{DiskRules, ModelBdev, ModelDisk};
use super::guest::{ARENA_BYTES, Arena, Guest, TABLE_BYTES, World};
use super::twin::Twin;
use super::watch::{Watch, WatchedQueue};
use super::{Dice, DriverRing, GuestMemory, GuestRing, PackedDriverRing};

const SERIAL: &str = "simulated disk";
const ARENAS_PER_QUEUE: usize = 8;
/// Steps without an answer after which nothing is going to happen any more.
const STALL_STEPS: u64 = 50_000;
const RINGS_AT: u64 = 0x10_0000;
/// Guest address of the region that comes and goes.
const HOT_AT: u64 = 0x10_0000_0000;
/// Bounce buffers of a reactor that others hold, so that the channels get short of them.
const BOUNCE_LEFT_FEW: usize = 2;

type Worker = QueueWorker<WatchedQueue, Watch>;

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The seed that shows it.
    pub seed: u64,
    /// The step at which it was noticed.
    pub step: u64,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {} at step {}: {}", self.seed, self.step, self.what)
    }
}

impl std::error::Error for Failure {}

/// What happened in a run without failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Steps of the scheduler.
    pub steps_count: u64,
    /// Requests answered.
    pub requests_count: usize,
    /// Requests that the disk failed on purpose.
    pub errors_count: u64,
    /// Interrupts that reached the guest.
    pub interrupts_count: u64,
    /// Kicks that the guest sent.
    pub kicks_count: u64,
    /// Times that a reactor fell asleep.
    pub sleeps_count: u64,
    /// Control actions: quiesce, channel swap, removal, restart, memory change.
    pub actions_count: u64,
    /// Queues that went to another reactor (or back to the same one).
    pub moves_count: u64,
    /// The run ended in a power cut.
    pub power_cut: bool,
}

struct Reactor {
    cx: ReactorCx,
    asleep: bool,
    /// The last pass found nothing.
    idle: bool,
    queues: Vec<usize>,
    /// Buffers held back.
    held: Vec<Bounce>,
}

struct Queue {
    guest: Guest,
    worker: Option<Worker>,
    status: Arc<QueueStatus>,
    reactor: usize,
    base: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Resume,
    Swap,
    Gone,
    Stop,
    Enable,
    Memory,
    /// Go on, on another reactor.
    Move,
}

#[derive(Debug)]
enum Action {
    None,
    /// Waits until nothing is in flight on these queues.
    Draining {
        queues: Vec<usize>,
        done: Vec<Arc<AtomicBool>>,
        then: Then,
    },
    /// A queue without a worker until this step.
    Stopped {
        queue: usize,
        until: u64,
    },
    /// The guest is giving the hot region back.
    Vacating,
}

struct Sim {
    seed: u64,
    step: u64,
    dice: Dice,
    now_ns: u64,
    world: World,
    disk: ModelDisk,
    rules: DiskRules,
    device: Arc<BlkDevice>,
    locks: Option<Arc<BlockLocks>>,
    queues: Vec<Queue>,
    reactors: Vec<Reactor>,
    action: Action,
    action_per_100k: u64,
    hot: bool,
    packed: bool,
    indirect: bool,
    event_idx: bool,
    broken: Arc<Mutex<Option<WorkerEvent>>>,
    report: Report,
}

/// Runs one seed.
///
/// # Errors
/// The first broken promise.
pub fn simulate(seed: u64) -> Result<Report, Failure> {
    let mut sim = Sim::new(seed).map_err(|what| Failure { seed, step: 0, what })?;
    match sim.run() {
        Ok(()) => Ok(sim.report),
        Err(what) => Err(Failure { seed, step: sim.step, what }),
    }
}

fn choose_rules(dice: &mut Dice) -> DiskRules {
    let wide = dice.chance(500);
    DiskRules {
        sectors_count: bytes_u64(dice.pick(&[128, 1024, 6144])),
        block_bytes: if wide { 4096 } else { dice.pick(&[512, 512, 4096]) },
        address_bytes: if wide { dice.pick(&[1, 4, 512, 4096]) } else { dice.pick(&[1, 1, 512]) },
        segment_bytes: if wide { dice.pick(&[1, 512, 4096]) } else { dice.pick(&[1, 1, 512]) },
        delay_max_ns: bytes_u64(dice.pick(&[0, 2_000, 80_000, 1_000_000])),
        errors_per_mille: bytes_u64(dice.pick(&[0, 0, 0, 20, 200])),
        room_max: dice.pick(&[1, 2, 5, 32, 256]),
        partial: dice.chance(400),
        polled: dice.chance(400),
    }
}

/// One to three regions without a gap, whose borders lie inside arenas, and the guest address of the first arena.
fn choose_memory(dice: &mut Dice, queues_count: usize, ring_bytes: usize) -> (GuestMemory, u64) {
    let rings = queues_count * (ring_bytes + ARENAS_PER_QUEUE * TABLE_BYTES);
    let first = rings.next_multiple_of(4096) + 4096;
    let total = first + queues_count * ARENAS_PER_QUEUE * ARENA_BYTES;
    let mut borders = vec![0, total];
    for _ in 0..dice.index(3) {
        borders.push(first + 4096 * dice.index((total - first) / 4096) + dice.pick(&[0, 0, 512]));
    }
    borders.sort_unstable();
    borders.dedup();
    let regions: Vec<(u64, usize)> =
        borders.windows(2).map(|p| (RINGS_AT + bytes_u64(p[0]), p[1] - p[0])).collect();
    (GuestMemory::new(&regions), RINGS_AT + bytes_u64(first))
}

impl Sim {
    fn new(seed: u64) -> Result<Sim, String> {
        let mut dice = Dice::new(seed, 1);
        let rules = choose_rules(&mut dice);
        let queues_count = dice.pick(&[1, 2, 2, 3]);
        let reactors_count = dice.between(1, queues_count);
        let packed = dice.chance(500);
        let sizes = if packed { [3u16, 17, 63, 256] } else { [4u16, 16, 64, 256] };
        let size = dice.pick(&sizes);
        let (indirect, event_idx) = (size < 16 || dice.chance(700), dice.chance(600));
        let ring_bytes = DriverRing::bytes(size).max(PackedDriverRing::bytes(size));
        let ring_bytes = ring_bytes.next_multiple_of(4096);
        let (memory, arenas_at) = choose_memory(&mut dice, queues_count, ring_bytes);
        let disk = ModelDisk::new(rules, seed);
        let bdev: Arc<dyn Bdev> = Arc::new(ModelBdev::new(&rules).map_err(|e| e.to_string())?);
        let device = Arc::new(BlkDevice::new(&bdev, SERIAL, false));
        let write_through = dice.chance(200);
        device.set_write_back(!write_through);
        let needs_align =
            rules.block_bytes > 512 || rules.address_bytes > 1 || rules.segment_bytes > 1;
        let world = World {
            memory,
            twin: Twin::new(rules.sectors_count),
            dice: Dice::new(seed, 3),
            sectors_count: rules.sectors_count,
            serial: *device.serial(),
            now: 1,
            next_stamp: 1,
            write_through,
            errors_expected: rules.errors_per_mille > 0,
        };
        let mut sim = Sim {
            seed,
            step: 0,
            now_ns: 0,
            disk,
            rules,
            device,
            locks: needs_align.then(Default::default),
            queues: Vec::new(),
            reactors: Vec::new(),
            action: Action::None,
            action_per_100k: bytes_u64(dice.pick(&[0, 50, 500, 3000])),
            hot: false,
            packed,
            indirect,
            event_idx,
            broken: Arc::default(),
            report: Report::default(),
            world,
            dice,
        };
        for _ in 0..reactors_count {
            sim.add_reactor()?;
        }
        for at in 0..queues_count {
            sim.add_queue(at, size, ring_bytes, arenas_at)?;
        }
        Ok(sim)
    }

    fn add_reactor(&mut self) -> Result<(), String> {
        let mut cx = ReactorCx::simulated(self.seed).map_err(|e| e.to_string())?;
        let mut held = Vec::new();
        if self.dice.chance(500) {
            while cx.io.bounce.free_count() > BOUNCE_LEFT_FEW {
                held.extend(cx.io.bounce.take(0));
            }
        }
        self.reactors.push(Reactor { cx, asleep: false, idle: false, queues: Vec::new(), held });
        Ok(())
    }

    fn add_queue(
        &mut self,
        at: usize,
        size: u16,
        ring_bytes: usize,
        arenas_at: u64,
    ) -> Result<(), String> {
        let memory = &self.world.memory;
        let queue_bytes = bytes_u64(ring_bytes + ARENAS_PER_QUEUE * TABLE_BYTES);
        let ring_at = RINGS_AT + bytes_u64(at) * queue_bytes;
        let start = self.dice.pick(&[0, 65_530, 65_535, 32_767, 100]);
        let event_idx = self.event_idx;
        let ring: Box<dyn GuestRing> = if self.packed {
            let ring = PackedDriverRing::new(memory, ring_at, size, event_idx, start.into());
            Box::new(ring)
        } else {
            Box::new(DriverRing::new(memory, ring_at, size, event_idx, start))
        };
        let base = ring.drained_base(memory);
        let arenas = (0..ARENAS_PER_QUEUE).map(|i| Arena {
            base: arenas_at + bytes_u64((at * ARENAS_PER_QUEUE + i) * ARENA_BYTES),
            table: ring_at + bytes_u64(ring_bytes + i * TABLE_BYTES),
            busy: false,
            usable: true,
        });
        let requests_count = self.dice.pick(&[20, 100, 200, 400]);
        let polls = self.dice.chance(150);
        let guest = Guest::new(
            ring,
            arenas.collect(),
            requests_count,
            (self.indirect, self.event_idx, polls),
        );
        let reactor = at % self.reactors.len();
        self.reactors[reactor].queues.push(at);
        let status = Arc::new(QueueStatus::new(QueueStats::new_shared().expect("memory")));
        self.queues.push(Queue { guest, worker: None, status, reactor, base });
        self.start_worker(at)
    }

    fn channel(&self) -> Box<dyn Channel> {
        let channel = self.disk.channel();
        match &self.locks {
            None => Box::new(channel),
            Some(locks) => {
                let rules = Alignment {
                    block_bytes: self.rules.block_bytes,
                    address_bytes: self.rules.address_bytes,
                    segment_bytes: self.rules.segment_bytes,
                };
                let locks = (self.rules.block_bytes > 512).then(|| Arc::clone(locks));
                Box::new(AlignChannel::new(channel, rules, locks))
            }
        }
    }

    /// Starts a worker where the queue was left.
    fn start_worker(&mut self, at: usize) -> Result<(), String> {
        let channel = self.channel();
        let queue = &mut self.queues[at];
        let rings = queue.guest.ring.device_rings(&self.world.memory).ok_or("no ring windows")?;
        let size = queue.guest.ring.size();
        let broken = Arc::clone(&self.broken);
        let (base, event_idx, indirect) = (queue.base, self.event_idx, self.indirect);
        let inner: Box<dyn Virtqueue> = if self.packed {
            let packed = PackedQueue::new(rings, size, base, event_idx, indirect);
            Box::new(packed.ok_or("the ring has no such place")?)
        } else {
            let base = u16::try_from(base).map_err(|e| e.to_string())?;
            Box::new(SplitQueue::new(rings, size, base, event_idx, indirect))
        };
        let watch = queue.guest.watch.clone();
        let mut worker = QueueWorker::new(WorkerParts {
            queue: WatchedQueue::new(inner, watch.clone()),
            tracking: watch,
            mem: self.world.memory.table(),
            device: Arc::clone(&self.device),
            channel,
            status: Arc::clone(&queue.status),
            // The simulator plays the kick itself; the worker only needs to know that there is one.
            kick: Some(Arc::new(null_fd()?)),
            call: None,
            enabled: true,
            events: Box::new(move |event| {
                *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(event);
            }),
        });
        let reactor = &mut self.reactors[queue.reactor];
        worker.attach(&mut reactor.cx);
        queue.worker = Some(worker);
        reactor.asleep = false;
        Ok(())
    }

    fn run(&mut self) -> Result<(), String> {
        let cut_at = if self.dice.chance(400) { 50 + self.dice.below(8_000) } else { u64::MAX };
        let mut last_progress = (0, 0);
        loop {
            self.step += 1;
            self.report.steps_count = self.step;
            if self.queues.iter().all(|q| q.guest.is_done()) && matches!(self.action, Action::None)
            {
                return self.finish();
            }
            if self.step >= cut_at {
                return self.cut_power();
            }
            self.step_once()?;
            self.check_complaints()?;
            let answered = self.queues.iter().map(|q| q.guest.answered_count).sum();
            if answered != last_progress.0 {
                last_progress = (answered, self.step);
                self.report.requests_count = answered;
            } else if self.step - last_progress.1 > STALL_STEPS {
                return Err(self.hang("no answer for a long time"));
            }
        }
    }

    fn check_complaints(&self) -> Result<(), String> {
        if let Some(event) = &*self.broken.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(format!("a queue stopped: {event:?}"));
        }
        let watched = self.queues.iter().find_map(|q| q.guest.watch.complaint());
        self.disk.complaint().or(watched).map_or(Ok(()), Err)
    }

    fn hang(&self, why: &str) -> String {
        let mut text = format!("hang ({why}); action {:?}", self.action);
        for queue in &self.queues {
            let asleep = self.reactors[queue.reactor].asleep;
            let guest = queue.guest.describe(&self.world.memory);
            let worker = queue.worker.as_ref().map(|w| (w.base(), w.inflight_count()));
            text += &format!(
                "; guest {guest}; worker (base, in flight) {worker:?} on a reactor that {}",
                if asleep { "sleeps" } else { "polls" }
            );
        }
        text
    }

    /// Time passes, then one actor that can do something acts.
    fn step_once(&mut self) -> Result<(), String> {
        if self.dice.chance(700) {
            self.now_ns += self.dice.below(self.rules.delay_max_ns / 20 + 100);
        }
        self.wake_for_completions();
        if self.dice.below(100_000) < self.action_per_100k || !matches!(self.action, Action::None) {
            self.control()?;
        }
        let mut actors = Vec::new();
        actors.extend((0..self.reactors.len()).filter(|&r| !self.reactors[r].asleep));
        let guests = (0..self.queues.len()).filter(|&q| self.queues[q].guest.can_run());
        actors.extend(guests.map(|q| q + self.reactors.len()));
        if actors.is_empty() {
            return self.jump();
        }
        let actor = self.dice.pick(&actors);
        match actor.checked_sub(self.reactors.len()) {
            None => self.reactor_step(actor),
            Some(queue) => self.guest_step(queue),
        }
    }

    /// Everybody sleeps: time goes to the next completion.
    fn jump(&mut self) -> Result<(), String> {
        match self.disk.next_due_ns() {
            Some(due) if due > self.now_ns => self.now_ns = due,
            _ if matches!(self.action, Action::Stopped { .. }) => {}
            Some(_) => return Err(self.hang("a completion waits and nobody fetches it")),
            None => return Err(self.hang("everybody sleeps")),
        }
        Ok(())
    }

    /// A completion that comes by an event of the ring wakes its reactor.
    fn wake_for_completions(&mut self) {
        if !self.rules.polled && self.disk.next_due_ns().is_some_and(|due| due <= self.now_ns) {
            self.reactors.iter_mut().for_each(|r| r.asleep = false);
        }
    }

    fn reactor_step(&mut self, at: usize) -> Result<(), String> {
        let reactor = &mut self.reactors[at];
        let behind = self.now_ns.saturating_sub(reactor.cx.io.clock.now_ns());
        reactor.cx.io.clock.advance_ns(behind);
        if reactor.idle && self.dice.chance(500) {
            reactor.idle = false;
            let mut awake = false;
            for &q in &reactor.queues {
                if let Some(worker) = &mut self.queues[q].worker {
                    awake |= worker.prepare_sleep(&mut reactor.cx);
                }
            }
            reactor.asleep = !awake;
            self.report.sleeps_count += u64::from(!awake);
            return Ok(());
        }
        reactor.cx.pass_ns = self.now_ns;
        let mut work = false;
        for &q in &reactor.queues {
            let queue = &mut self.queues[q];
            let Some(worker) = &mut queue.worker else { continue };
            work |= worker.poll(&mut reactor.cx);
            if worker.take_interrupt() {
                queue.guest.interrupt = true;
                self.report.interrupts_count += 1;
            }
        }
        reactor.idle = !work;
        Ok(())
    }

    fn guest_step(&mut self, at: usize) -> Result<(), String> {
        let queue = &mut self.queues[at];
        let kicks = queue.guest.step(&mut self.world).map_err(|e| format!("queue {at}: {e}"))?;
        if kicks {
            self.report.kicks_count += 1;
            self.reactors[queue.reactor].asleep = false;
        }
        Ok(())
    }

    fn control(&mut self) -> Result<(), String> {
        match std::mem::replace(&mut self.action, Action::None) {
            Action::None => self.begin_action(),
            Action::Draining { queues, done, then } => {
                if done.iter().all(|d| d.load(Ordering::Relaxed)) {
                    return self.drained(&queues, then);
                }
                self.action = Action::Draining { queues, done, then };
                Ok(())
            }
            Action::Stopped { queue, until } if self.step >= until => self.start_worker(queue),
            Action::Stopped { queue, until } => {
                self.action = Action::Stopped { queue, until };
                Ok(())
            }
            Action::Vacating => {
                let busy = |q: &Queue| q.guest.arenas.iter().any(|a| !a.usable && a.busy);
                if self.queues.iter().any(busy) {
                    self.action = Action::Vacating;
                } else {
                    let all = (0..self.queues.len()).collect();
                    self.drain(all, Then::Memory);
                }
                Ok(())
            }
        }
    }

    fn begin_action(&mut self) -> Result<(), String> {
        self.report.actions_count += 1;
        let queue = self.dice.index(self.queues.len());
        match self.dice.below(10) {
            0 => self.drain(vec![queue], Then::Resume),
            1 => self.drain(vec![queue], Then::Swap),
            2 if self.dice.chance(100) => {
                self.world.errors_expected = true;
                let all = (0..self.queues.len()).collect();
                self.drain(all, Then::Gone);
            }
            2 | 3 => self.drain(vec![queue], Then::Stop),
            4 => self.drain(vec![queue], Then::Enable),
            5 | 6 if self.hot => {
                for queue in &mut self.queues {
                    let hot = queue.guest.arenas.iter_mut().filter(|a| a.base >= HOT_AT);
                    hot.for_each(|a| a.usable = false);
                }
                self.action = Action::Vacating;
            }
            5 | 6 => self.add_memory(),
            7 | 8 => self.drain(vec![queue], Then::Move),
            _ => {
                let all = (0..self.queues.len()).collect();
                self.drain(all, Then::Swap);
            }
        }
        Ok(())
    }

    /// Region by region comes without any queue waiting.
    fn add_memory(&mut self) {
        self.hot = true;
        let bytes = 2 * ARENA_BYTES * self.queues.len();
        self.world.memory.add(HOT_AT, bytes);
        for (at, queue) in self.queues.iter_mut().enumerate() {
            if let (Some(worker), Some(windows)) =
                (&mut queue.worker, queue.guest.ring.device_rings(&self.world.memory))
            {
                worker.set_memory(self.world.memory.table(), Some(windows));
            }
            for i in 0..2 {
                let table = queue.guest.arenas[i].table + bytes_u64(TABLE_BYTES / 2);
                let base = HOT_AT + bytes_u64((2 * at + i) * ARENA_BYTES);
                queue.guest.arenas.push(Arena { base, table, busy: false, usable: true });
            }
        }
    }

    fn drain(&mut self, queues: Vec<usize>, then: Then) {
        let mut done = Vec::new();
        for &at in &queues {
            let flag = Arc::new(AtomicBool::new(false));
            let set = Arc::clone(&flag);
            let call: Done = Box::new(move || set.store(true, Ordering::Relaxed));
            let queue = &mut self.queues[at];
            let reactor = &mut self.reactors[queue.reactor];
            reactor.asleep = false;
            match &mut queue.worker {
                Some(worker) if then == Then::Enable => worker.set_enabled(false, call),
                Some(worker) => worker.quiesce(&mut reactor.cx, call),
                None => call(),
            }
            done.push(flag);
        }
        self.action = Action::Draining { queues, done, then };
    }

    fn drained(&mut self, queues: &[usize], then: Then) -> Result<(), String> {
        let mut leaving = None;
        if then == Then::Memory {
            self.hot = false;
            leaving = self.world.memory.table().regions().last().map(|r| Arc::clone(r.mapping()));
            self.world.memory.remove(HOT_AT, 2 * ARENA_BYTES * self.queues.len());
            for queue in &mut self.queues {
                queue.guest.arenas.retain(|a| a.base < HOT_AT);
            }
        }
        for &at in queues {
            let channel: Option<Box<dyn Channel>> = match then {
                Then::Swap | Then::Move => Some(self.channel()),
                Then::Gone => Some(Box::new(InstantChannel::new(IoStatus::Gone))),
                _ => None,
            };
            let queue = &mut self.queues[at];
            let Some(worker) = &mut queue.worker else { continue };
            if worker.inflight_count() != 0 {
                return Err(format!("queue {at} says drained with requests in flight"));
            }
            let base = worker.base();
            let expected = queue.guest.ring.drained_base(&self.world.memory);
            if base != expected {
                return Err(format!("queue {at} drained at base {base:#x}, not {expected:#x}"));
            }
            let reactor = &mut self.reactors[queue.reactor];
            reactor.asleep = false;
            match then {
                Then::Enable => worker.set_enabled(true, Box::new(|| {})),
                Then::Memory => {
                    let windows = queue.guest.ring.device_rings(&self.world.memory);
                    let windows = windows.ok_or("the rings' memory is gone")?;
                    worker.set_memory(self.world.memory.table(), Some(windows));
                    worker.resume(&mut reactor.cx, None);
                }
                Then::Stop => {
                    // The front-end asks where the ring is, or the daemon goes away under it and nobody can.
                    let asked = !self.packed || self.dice.chance(500);
                    if !asked {
                        worker.leave();
                    }
                    worker.detach(&mut reactor.cx);
                    queue.worker = None;
                    queue.base = if asked { base } else { 0x8000_8000 };
                    let until = self.step + self.dice.below(60);
                    self.action = Action::Stopped { queue: at, until };
                }
                Then::Move => {
                    worker.detach(&mut reactor.cx);
                    let seed = channel.map(|channel| -> ChannelSeed { Box::new(|_| Ok(channel)) });
                    drop(worker.replant(seed, true));
                    reactor.queues.retain(|&q| q != at);
                    queue.reactor = self.dice.index(self.reactors.len());
                    let reactor = &mut self.reactors[queue.reactor];
                    reactor.queues.push(at);
                    reactor.asleep = false;
                    worker.attach(&mut reactor.cx);
                    if let Some(problem) = worker.take_problem() {
                        return Err(format!("queue {at} could not move: {problem}"));
                    }
                    self.report.moves_count += 1;
                }
                Then::Resume | Then::Swap | Then::Gone => {
                    worker.resume(&mut reactor.cx, channel);
                }
            }
        }
        if leaving.is_some_and(|mapping| Arc::strong_count(&mapping) > 1) {
            return Err("somebody still holds the memory that was removed".to_owned());
        }
        Ok(())
    }

    fn cut_power(&mut self) -> Result<(), String> {
        self.report.power_cut = true;
        self.world.twin.check_after_power_cut(&self.disk.cut_power())
    }

    /// Everything is answered: compares the whole disk and looks for what was not given back.
    fn finish(&mut self) -> Result<(), String> {
        self.report.errors_count = self.disk.errors_count();
        self.world.twin.check_after_power_cut(&self.disk.cut_power())?;
        self.world.twin.check_live(0, &self.disk.content(), self.world.now)?;
        for (at, queue) in self.queues.iter().enumerate() {
            let counted: u64 =
                IoOp::ALL.iter().map(|&op| queue.status.stats.op(op).ops_count()).sum();
            let inflight = queue.status.inflight_count();
            if usize_of(counted) > queue.guest.answered_count || inflight != 0 {
                return Err(format!(
                    "queue {at} counts {counted} requests, {inflight} in flight; answered {}",
                    queue.guest.answered_count
                ));
            }
        }
        for (at, reactor) in self.reactors.iter_mut().enumerate() {
            let held = std::mem::take(&mut reactor.held);
            held.into_iter().for_each(|b| reactor.cx.io.bounce.give_back(b));
            let free = reactor.cx.io.bounce.free_count();
            if free != ringmill_core::limits::BOUNCE_BUFFERS {
                return Err(format!("reactor {at} has lost bounce buffers: {free} are left"));
            }
        }
        for bucket in 0..BLOCK_LOCK_BUCKETS {
            let at = bytes_u64(bucket) * BLOCK_LOCK_SPAN_BYTES;
            let Some(locks) = &self.locks else { break };
            // Shared first: it also fails where a wish to be alone was left behind.
            if !locks.try_shared(at, 1) {
                return Err(format!("the block lock of byte {at} is still held or wanted alone"));
            }
            locks.release_shared(at, 1);
            if !locks.try_alone(at) {
                return Err(format!("the block lock of byte {at} is still held"));
            }
        }
        Ok(())
    }
}

fn null_fd() -> Result<std::os::fd::OwnedFd, String> {
    std::fs::File::open("/dev/null").map(Into::into).map_err(|e| e.to_string())
}
