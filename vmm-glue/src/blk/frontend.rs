//! The device behind one vhost-user session: its memory, its rings on the reactors, its operations under way.
//!
//! In: calls of the protocol session and steps from reactors. Out: messages to reactors, and [`Turn::Complete`] for
//! the session. Owner: the control thread. **Invariant:** one operation at a time per front-end, each a fixed sequence
//! of broadcasts to its rings (quiesce → change → go on); a ring is removed only when nothing of it is in flight.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use ringmill_core::IoStatus;
use ringmill_core::bdev::{Bdev, InstantChannel};
use ringmill_core::limits::MEMORY_REGIONS_MAX;
use ringmill_core::mem::{DmaDomain, MemTable};
use ringmill_core::reactor::{Done, Message, PollerId, Reactor, ReactorCx, ReactorHandle};
use ringmill_core::spec::virtio_blk as spec;

use crate::vhost_user::{
    Backend, Completion, GuestAddr, Progress, Refusal, RegionDesc, RingStart, SharedFd,
    StopProgress, UserAddr,
};

use super::event::{EventKind, Leftover};
use super::format::{self, with_worker};
use super::{NoTracking, WorkerControl, WorkerParts, config, device_features};

mod memory;
mod moving;
mod operation;
mod pinning;
mod shared;

use moving::Transit;
use operation::{Kind, Operation, Phase};

pub use pinning::PinView;
pub(super) use shared::Shared;

/// A ring that the session has started; on a reactor when it has a poller.
#[derive(Debug)]
pub(super) struct RunningRing {
    start: RingStart,
    pub(super) poller: Option<(PollerId, ReactorHandle)>,
    /// Its worker is between two reactors.
    transit: Option<Transit>,
    pub(super) oldest_age_ns: Option<u64>,
    pub(super) stuck_count: u64,
}

impl RunningRing {
    pub(super) fn size(&self) -> u16 {
        self.start.size
    }
}

/// What the owner has to do after a step.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing.
    Nothing,
    /// Tell the session that its operation is done.
    Complete(Completion),
    /// Tell it that nothing has changed, and why.
    Refuse(String),
    /// The front-end cannot be served: end its session.
    SendAway(String),
    /// The front-end has no rings and no operations any more: drop it.
    Closed,
    /// Its rings have let go of the bdev.
    BdevLost,
    /// The move of this ticket is over; what went wrong.
    Moved(u64, Option<String>),
}

/// One front-end's device.
pub(super) struct FrontEnd {
    vid: u64,
    shared: Arc<Shared>,
    /// `None` from the moment its removal is announced: rings that start then answer every request with an error.
    bdev: Option<Arc<dyn Bdev>>,
    lost_bdev: bool,
    mem: Arc<MemTable>,
    /// The bdev moves data by itself, in memory that it was given.
    has_domain: bool,
    /// What the bdev's device reached before it was lost: no memory is mapped there any more.
    lost_domain: Option<Weak<dyn DmaDomain>>,
    /// Cleared when nobody needs any more what a thread is mapping.
    mapping_wanted: Arc<AtomicBool>,
    /// Times that the device could not be given memory.
    unmappable_count: u32,
    features: u64,
    pub(super) rings: Vec<Option<Box<RunningRing>>>,
    /// True while this front-end's rings may run (one at a time per controller).
    active: bool,
    current: Option<Operation>,
    queued: VecDeque<Kind>,
    operations_count: u64,
    /// Messages that a reactor's full mailbox did not take.
    unsent: Vec<(ReactorHandle, Message)>,
    /// What this front-end's guest chose for the write cache; `None`: nothing yet.
    wanted_writeback: Option<bool>,
    /// Why memory is not pinned although it should be; said once.
    unpinned: Option<String>,
    /// Memory was pinned while it changed: the reactors are to be told after that.
    pins_untold: bool,
}

impl FrontEnd {
    pub(super) fn new(vid: u64, shared: Arc<Shared>, bdev: Option<Arc<dyn Bdev>>) -> FrontEnd {
        let rings = (0..shared.queues_max).map(|_| None).collect();
        FrontEnd {
            vid,
            shared,
            lost_bdev: bdev.is_none(),
            has_domain: bdev.as_ref().is_some_and(|bdev| bdev.dma().is_some()),
            bdev,
            mem: Arc::new(MemTable::new()),
            lost_domain: None,
            mapping_wanted: Arc::default(),
            unmappable_count: 0,
            features: 0,
            rings,
            active: false,
            current: None,
            queued: VecDeque::new(),
            operations_count: 0,
            unsent: Vec::new(),
            wanted_writeback: None,
            unpinned: None,
            pins_untold: false,
        }
    }

    /// Rings that are on a reactor or want to be.
    pub(super) fn has_rings(&self) -> bool {
        self.rings.iter().any(Option::is_some)
    }

    /// True while a ring of this front-end is on a reactor or an operation is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.current.is_some() || self.rings.iter().flatten().any(|r| r.poller.is_some())
    }

    pub(super) fn is_active(&self) -> bool {
        self.active
    }

    /// Lets this front-end's rings run: those that wait start as soon as the device reaches their memory. True when
    /// that is an operation, which [`FrontEnd::advance`] begins.
    #[must_use]
    pub(super) fn activate(&mut self) -> bool {
        self.active = true;
        self.apply_cache_mode();
        let has_to_map = !self.is_reachable();
        if has_to_map {
            self.begin(Kind::MapMemory);
        } else {
            self.start_rings();
        }
        has_to_map
    }

    fn start_rings(&mut self) {
        self.pin_memory();
        for index in 0..self.shared.queues_max {
            self.launch(index);
        }
    }

    pub(super) fn deactivate(&mut self) {
        self.active = false;
    }

    /// The cache mode of virtio 1.2 §5.2.5 and §5.2.6.2: write-back only for a driver that was told so (`writeback`) and
    /// that can ask for durability (FLUSH or CONFIG_WCE).
    fn apply_cache_mode(&self) {
        if self.active {
            if let Some(wanted) = self.wanted_writeback {
                self.shared.device.set_config_writeback(wanted);
            }
            let can_flush = self.features & (spec::F_FLUSH | spec::F_CONFIG_WCE) != 0;
            let device = &self.shared.device;
            device.set_write_back(device.config_writeback() && can_flush);
        }
    }

    /// Puts a started ring on its reactor.
    fn launch(&mut self, index: u16) {
        let Some(ring) = &self.rings[usize::from(index)] else { return };
        if !self.active || ring.poller.is_some() || ring.transit.is_some() || !self.is_reachable() {
            return;
        }
        let Some(status) = self.shared.status(index) else { return };
        let (vid, number, events) = (self.vid, self.shared.number, self.shared.events.clone());
        let start = ring.start.clone();
        // A ring that starts while the bdev goes must not keep memory mapped: what rings share is unmapped after this.
        let mem = match &self.bdev {
            Some(_) => Arc::clone(&self.mem),
            None => Arc::new(self.mem.without_dma()),
        };
        let Some(windows) = format::windows(&mem, &start) else {
            tracing::error!(controller = %self.shared.name, "queue {index}: its rings are not in guest memory any more");
            return;
        };
        let parts = WorkerParts {
            queue: (),
            tracking: NoTracking,
            mem,
            device: Arc::clone(&self.shared.device),
            channel: Box::new(InstantChannel::new(IoStatus::Gone)),
            status,
            kick: start.kick.clone(),
            call: start.call.clone(),
            enabled: start.enabled,
            events: Box::new(move |event| {
                events.send(number, EventKind::Worker { vid, index, event })
            }),
        };
        let reactor = self.shared.reactor_of(index);
        let seed = match self.bdev.as_ref().map(|bdev| bdev.open_channel(Some(&reactor))) {
            Some(Ok(seed)) => Some(seed),
            Some(Err(error)) => {
                tracing::error!(controller = %self.shared.name, "queue {index}: every request will fail: {error}");
                None
            }
            None => None,
        };
        let Some(worker) = format::worker(&start, windows, self.features, parts, seed) else {
            tracing::error!(controller = %self.shared.name, "queue {index}: its packed ring of {} entries is not at {:#x}, where the front-end says: \
                the server's predecessor did not stop cleanly; reset the device (reboot the guest)", start.size, start.base);
            self.signal_error(index);
            return;
        };
        let id = PollerId::next();
        let name = format!("{}:{index}", self.shared.name);
        if reactor.add_poller(id, &name, 0, worker) {
            if let Some(ring) = &mut self.rings[usize::from(index)] {
                ring.poller = Some((id, reactor));
            }
        } else {
            tracing::error!(controller = %self.shared.name, "queue {index}: its reactor does not answer");
        }
    }

    /// Queues an operation; it begins when those before it are done.
    fn begin(&mut self, kind: Kind) {
        self.queued.push_back(kind);
    }

    /// Sends the front-end away: drains and removes its rings.
    pub(super) fn close(&mut self) {
        self.mapping_wanted.store(false, Ordering::Relaxed);
        if !self.is_closing() {
            self.begin(Kind::Close);
        }
    }

    fn is_closing(&self) -> bool {
        self.queued.iter().any(|kind| matches!(kind, Kind::Close))
    }

    /// The bdev goes: after this the rings answer every request with an error.
    pub(super) fn lose_bdev(&mut self) {
        self.bdev = None;
        self.mapping_wanted.store(false, Ordering::Relaxed);
        // Before all that waits: until then rings use the bdev, in memory that it must reach.
        self.queued.push_front(Kind::LoseBdev);
    }

    /// True once no ring and no new ring can use the bdev.
    pub(super) fn has_lost_bdev(&self) -> bool {
        self.lost_bdev
    }

    /// True once a file behind the guest's memory has been truncated: zero pages took its place.
    pub(super) fn has_lost_memory(&self) -> bool {
        self.mem.failed()
    }

    /// Moves on as far as possible without waiting.
    pub(super) fn advance(&mut self) -> Turn {
        self.send_unsent();
        loop {
            if self.current.as_ref().is_some_and(|c| c.waiting > 0) {
                return Turn::Nothing;
            }
            let mut operation = match self.current.take() {
                Some(operation) => operation,
                None => {
                    let Some(kind) = self.queued.pop_front() else { return Turn::Nothing };
                    self.prepare(kind)
                }
            };
            match operation.next_phase() {
                Some(phase) => {
                    self.current = Some(operation);
                    match phase {
                        Phase::Map => self.map(),
                        Phase::Quiesce | Phase::Apply => self.broadcast(),
                        Phase::Place => self.place_all(),
                        Phase::Unmap => self.unmap(),
                    }
                }
                None => {
                    let turn = self.finish(operation);
                    if turn != Turn::Nothing {
                        return turn;
                    }
                }
            }
        }
    }

    fn prepare(&mut self, mut kind: Kind) -> Operation {
        if let Kind::Move(a_move) = &mut kind {
            self.prepare_move(a_move);
        }
        self.operations_count += 1;
        Operation::new(self.operations_count, kind)
    }

    /// Sends the current phase of the current operation to its rings. A ring whose reactor does not take the message now
    /// gets it later: what is not answered is not done.
    fn broadcast(&mut self) {
        let Some(operation) = &self.current else { return };
        let (number, phase) = (operation.number, operation.phase);
        let only = match operation.kind {
            Kind::Enable(index, _) | Kind::Stop(index) => Some(index),
            _ => None,
        };
        let quiesces = !matches!(operation.kind, Kind::AddMemory(_) | Kind::Enable(..));
        let mut messages = Vec::new();
        for index in (0..self.shared.queues_max).filter(|&i| only.is_none_or(|o| o == i)) {
            if let Kind::Move(a_move) = &operation.kind
                && !a_move.concerns(index)
            {
                continue;
            }
            let ring = self.rings[usize::from(index)].as_ref();
            let on_reactor = ring.and_then(|r| Some((&r.start, r.poller.as_ref()?)));
            let Some((start, (id, reactor))) = on_reactor else { continue };
            if phase == Phase::Apply && quiesces && !operation.quiesced.contains(id) {
                continue;
            }
            messages.push((*id, reactor.clone(), self.message(index, *id, number, phase, start)));
        }
        if let Some(operation) = &mut self.current {
            operation.waiting = messages.len();
            if phase == Phase::Quiesce {
                operation.quiesced = messages.iter().map(|(id, ..)| *id).collect();
            }
        }
        self.unsent.extend(messages.into_iter().map(|(_, reactor, message)| (reactor, message)));
        if phase == Phase::Apply {
            self.mark_in_transit();
        }
        self.send_unsent();
    }

    /// Tries to deliver what has not been delivered.
    fn send_unsent(&mut self) {
        for (reactor, message) in std::mem::take(&mut self.unsent) {
            // Messages to one reactor keep their order.
            let blocked = self.unsent.iter().any(|(other, _)| other.same(&reactor));
            match if blocked { Err(message) } else { reactor.try_send(message) } {
                Ok(()) => {}
                Err(message) => self.unsent.push((reactor, message)),
            }
        }
    }

    /// The message that does one ring's part and then sends the step.
    fn message(
        &self,
        index: u16,
        id: PollerId,
        operation: u64,
        phase: Phase,
        start: &RingStart,
    ) -> Message {
        let (vid, controller, events) = (self.vid, self.shared.number, self.shared.events.clone());
        let step = move |base: Option<u32>, leftover: Option<Leftover>| {
            events.send(controller, EventKind::Step { vid, operation, index, base, leftover });
        };
        let current = self.current.as_ref().map(|c| &c.kind);
        match (phase, current) {
            (Phase::Quiesce, _) => Box::new(move |reactor: &mut Reactor| {
                let done: Done = Box::new(move || step(None, None));
                // A poller that is not there has nothing in flight; `done` is then called here.
                let mut done = Some(done);
                reactor.with_dyn_poller(id, |poller, cx| {
                    if let Some(done) = done.take() {
                        poller.quiesce(cx, done);
                    }
                });
                if let Some(done) = done {
                    done();
                }
            }),
            (_, Some(Kind::ReplaceMemory(mem) | Kind::AddMemory(mem))) => {
                let (mem, pins) = (Arc::clone(mem), mem.pinned());
                let windows = format::windows(&mem, start);
                Box::new(move |reactor: &mut Reactor| {
                    let old = with_worker(reactor, id, |worker, cx| {
                        let old = (worker.set_pins(cx, pins), worker.set_memory(mem, windows));
                        worker.resume(cx, None);
                        old
                    });
                    step(None, old.map(|old| Box::new(old) as Leftover));
                })
            }
            (_, Some(&Kind::Enable(_, enabled))) => Box::new(move |reactor: &mut Reactor| {
                let done: Done = Box::new(move || step(None, None));
                let mut done = Some(done);
                with_worker(reactor, id, |worker, _| {
                    if let Some(done) = done.take() {
                        worker.set_enabled(enabled, done);
                    }
                });
                if let Some(done) = done {
                    done();
                }
            }),
            (_, Some(Kind::LoseBdev)) => {
                let gone = Box::new(InstantChannel::new(IoStatus::Gone));
                let bare = self.mem.has_dma().then(|| Arc::new(self.mem.without_dma()));
                let bare = bare.map(|mem| (format::windows(&mem, start), mem));
                Box::new(move |reactor: &mut Reactor| {
                    let old = with_worker(reactor, id, |worker, cx| {
                        let memory = bare.map(|(windows, mem)| worker.set_memory(mem, windows));
                        (worker.resume(cx, Some(gone)), memory)
                    });
                    step(None, old.map(|old| Box::new(old) as Leftover));
                })
            }
            (_, Some(Kind::Move(_))) => self.take_message(index, id, operation),
            (
                _,
                kind @ (Some(Kind::Stop(_) | Kind::Reset | Kind::Close)
                | Some(Kind::MapMemory | Kind::UnmapMemory)
                | None),
            ) => {
                let is_farewell = matches!(kind, Some(Kind::Close));
                Box::new(move |reactor: &mut Reactor| {
                    let base = with_worker(reactor, id, |worker, _| {
                        if is_farewell {
                            worker.leave();
                        }
                        worker.base()
                    });
                    let poller = reactor.remove_poller(id);
                    step(base, poller.map(|p| Box::new(p) as Leftover));
                })
            }
        }
    }

    /// A ring has done its part.
    pub(super) fn step(&mut self, operation: u64, index: u16, base: Option<u32>) {
        let Some(current) = self.current.as_mut().filter(|c| c.number == operation) else { return };
        current.waiting = current.waiting.saturating_sub(1);
        if current.phase == Phase::Apply
            && matches!(current.kind, Kind::Stop(_) | Kind::Reset | Kind::Close)
        {
            if let Some(base) = base {
                current.base = base;
            }
            if let Some((id, reactor)) =
                self.rings[usize::from(index)].take().and_then(|r| r.poller)
            {
                reactor.forget_poller(id);
            }
        }
    }

    fn finish(&mut self, operation: Operation) -> Turn {
        match (operation.kind, operation.problem) {
            (Kind::ReplaceMemory(_) | Kind::AddMemory(_), Some(problem)) => Turn::Refuse(problem),
            (Kind::ReplaceMemory(mem) | Kind::AddMemory(mem), None) => {
                self.mem = mem;
                self.memory_changed();
                Turn::Complete(Completion::Done)
            }
            (Kind::MapMemory, problem) => self.mapped_or_not(problem),
            (kind, _) => self.finish_other(kind, operation.base),
        }
    }

    fn finish_other(&mut self, kind: Kind, base: u32) -> Turn {
        match kind {
            Kind::ReplaceMemory(_) | Kind::AddMemory(_) | Kind::MapMemory | Kind::UnmapMemory => {
                Turn::Nothing
            }
            Kind::Enable(..) => Turn::Complete(Completion::Done),
            Kind::Stop(index) => {
                // A ring that never reached a reactor stops where it would have begun.
                let base = match self.rings[usize::from(index)].take() {
                    Some(ring) => ring.start.base,
                    None => base,
                };
                Turn::Complete(Completion::Stopped { base })
            }
            Kind::Reset => {
                self.forget_driver();
                self.rings.iter_mut().for_each(|ring| *ring = None);
                Turn::Complete(Completion::Done)
            }
            Kind::Close => {
                self.rings.iter_mut().for_each(|ring| *ring = None);
                Turn::Closed
            }
            Kind::LoseBdev => {
                self.lost_bdev = true;
                Turn::BdevLost
            }
            Kind::Move(a_move) => {
                let (ticket, problem) = a_move.end();
                Turn::Moved(ticket, problem)
            }
        }
    }

    /// Runs `f` on the worker of a ring that is on a reactor.
    fn on_worker(
        &mut self,
        index: u16,
        f: impl FnOnce(&mut dyn WorkerControl, &mut ReactorCx) + Send + 'static,
    ) {
        let Some(ring) = &mut self.rings[usize::from(index)] else { return };
        if let Some(transit) = &mut ring.transit {
            return transit.do_late(f);
        }
        let Some((id, reactor)) = &ring.poller else { return };
        let id = *id;
        let message: Message = Box::new(move |reactor: &mut Reactor| {
            with_worker(reactor, id, f);
        });
        self.unsent.push((reactor.clone(), message));
        self.send_unsent();
    }

    /// Sends what a reactor has no more use for back to the control thread: closing is a system call.
    fn discard(&self) -> impl Fn(Option<SharedFd>) + Send + use<> {
        let (controller, events) = (self.shared.number, self.shared.events.clone());
        move |fd| {
            if let Some(fd) = fd {
                events.send(controller, EventKind::Leftover(Box::new(fd)));
            }
        }
    }

    /// Asks every busy ring how old its oldest request is; the answers come as events.
    pub(super) fn ask_ages(&mut self) {
        for index in 0..self.shared.queues_max {
            let busy = self.shared.status(index).is_some_and(|s| s.inflight_count() > 0);
            if busy && self.rings[usize::from(index)].is_some() {
                let (vid, controller, events) =
                    (self.vid, self.shared.number, self.shared.events.clone());
                self.on_worker(index, move |worker, cx| {
                    let age_ns = worker.oldest_age_ns(cx.pass_ns);
                    events.send(controller, EventKind::Age { vid, index, age_ns });
                });
            }
        }
    }
}

impl Backend for FrontEnd {
    fn device_features(&self) -> u64 {
        device_features(&self.shared.device)
    }

    fn queues_max(&self) -> u16 {
        self.shared.queues_max
    }

    fn mem_slots_max(&self) -> u64 {
        MEMORY_REGIONS_MAX as u64
    }

    fn set_features(&mut self, acked: u64) -> Result<Progress, Refusal> {
        self.features = acked;
        self.apply_cache_mode();
        Ok(Progress::Done)
    }

    fn get_config(&mut self, offset: u32, out: &mut [u8]) -> Result<(), Refusal> {
        let device = &self.shared.device;
        let writeback = self.wanted_writeback.map(|on| on && device.info().geometry().write_cache);
        let bytes = config::encode_config(device, self.shared.queues_max, writeback);
        for (at, byte) in (offset as usize..).zip(out) {
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _migration: bool) -> Result<(), Refusal> {
        // Only `writeback` can be written (virtio 1.2 §5.2.4); a front-end may send the space around it, too.
        let at = spec::CONFIG_WRITEBACK.checked_sub(offset as usize).and_then(|at| data.get(at));
        match at {
            None => Err(format!(
                "bytes {offset}..{} of the configuration are read-only",
                offset as usize + data.len()
            )
            .into()),
            Some(&value @ (0 | 1)) => {
                self.wanted_writeback = Some(value == 1);
                self.apply_cache_mode();
                Ok(())
            }
            Some(value) => Err(format!("writeback = {value}; it is 0 or 1").into()),
        }
    }

    fn set_mem_table(&mut self, regions: Vec<RegionDesc>) -> Result<Progress, Refusal> {
        let table = self.build_memory(regions)?;
        Ok(self.change_memory(table, Kind::ReplaceMemory))
    }

    fn add_mem_region(&mut self, region: RegionDesc) -> Result<Progress, Refusal> {
        let mut table = MemTable::clone(&self.mem);
        self.add_region(&mut table, &region)?;
        Ok(self.change_memory(table, Kind::AddMemory))
    }

    fn remove_mem_region(
        &mut self,
        guest_addr: GuestAddr,
        _user_addr: UserAddr,
        len_bytes: u64,
    ) -> Result<Progress, Refusal> {
        let mut table = MemTable::clone(&self.mem);
        if !table.remove(guest_addr, len_bytes) {
            return Err(format!(
                "no memory region of {len_bytes} bytes at guest address {guest_addr:#x}"
            )
            .into());
        }
        Ok(self.change_memory(table, Kind::ReplaceMemory))
    }

    fn start_ring(&mut self, index: u16, ring: RingStart) -> Result<(), Refusal> {
        if format::windows(&self.mem, &ring).is_none() {
            return Err(format!("queue {index}: its rings do not lie in the guest's memory").into());
        }
        self.shared.make_status(index)?;
        self.rings[usize::from(index)] = Some(Box::new(RunningRing {
            start: ring,
            poller: None,
            transit: None,
            oldest_age_ns: None,
            stuck_count: 0,
        }));
        self.launch(index);
        Ok(())
    }

    fn set_ring_kick(&mut self, index: u16, kick: Option<SharedFd>) -> Result<(), Refusal> {
        if let Some(ring) = &mut self.rings[usize::from(index)] {
            ring.start.kick.clone_from(&kick);
        }
        let discard = self.discard();
        self.on_worker(index, move |worker, cx| discard(worker.set_kick(cx, kick)));
        Ok(())
    }

    fn set_ring_call(&mut self, index: u16, call: Option<SharedFd>) -> Result<(), Refusal> {
        if let Some(ring) = &mut self.rings[usize::from(index)] {
            ring.start.call.clone_from(&call);
        }
        let discard = self.discard();
        self.on_worker(index, move |worker, cx| discard(worker.set_call(cx, call)));
        Ok(())
    }

    fn set_ring_err(&mut self, index: u16, err: Option<SharedFd>) -> Result<(), Refusal> {
        if let Some(ring) = &mut self.rings[usize::from(index)] {
            ring.start.err = err;
        }
        Ok(())
    }

    fn enable_ring(&mut self, index: u16, enabled: bool) -> Result<Progress, Refusal> {
        let Some(ring) = &mut self.rings[usize::from(index)] else { return Ok(Progress::Done) };
        ring.start.enabled = enabled;
        let has_poller = ring.poller.is_some();
        if !has_poller && (self.current.is_none() || self.only_maps()) {
            return Ok(Progress::Done);
        }
        self.begin(Kind::Enable(index, enabled));
        Ok(Progress::Pending)
    }

    fn stop_ring(&mut self, index: u16) -> Result<StopProgress, Refusal> {
        if !self.is_busy() || self.only_maps() {
            let base = self.rings[usize::from(index)].take().map_or(0, |ring| ring.start.base);
            return Ok(StopProgress::Done { base });
        }
        self.begin(Kind::Stop(index));
        Ok(StopProgress::Pending)
    }

    fn reset_device(&mut self) -> Result<Progress, Refusal> {
        if !self.is_busy() || self.only_maps() {
            self.forget_driver();
            self.rings.iter_mut().for_each(|ring| *ring = None);
            return Ok(Progress::Done);
        }
        self.begin(Kind::Reset);
        Ok(Progress::Pending)
    }
}

impl FrontEnd {
    /// A device reset undoes what the driver wrote to the configuration space.
    fn forget_driver(&mut self) {
        self.wanted_writeback = Some(true);
        self.apply_cache_mode();
    }

    /// Signals the ring's error descriptor, so that a front-end that watches it learns of a broken queue.
    pub(super) fn signal_error(&self, index: u16) {
        let err = self.rings.get(usize::from(index)).and_then(|r| r.as_ref()?.start.err.as_ref());
        if let Some(err) = err
            && rustix::event::poll(
                &mut [rustix::event::PollFd::new(err, rustix::event::PollFlags::OUT)],
                Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }),
            )
            .is_ok_and(|ready| ready > 0)
        {
            let _ = rustix::io::write(err.as_fd(), &1u64.to_ne_bytes());
        }
    }

    /// The front-end's negotiated virtio features.
    pub(super) fn features(&self) -> u64 {
        self.features
    }
}
