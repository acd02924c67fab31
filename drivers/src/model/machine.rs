//! The controller itself: one thread that looks at registers and doorbells, fetches commands and posts completions.
//!
//! Flow: attention (a register written, a call) → state changes; doorbells → commands → answers, in batches; held commands
//! that are due. Owner: the model's thread. **Invariant:** CSTS.RDY becomes 0, and a call that forbids something is
//! answered, only between two commands; everything that was held is forgotten then. So the driver's memory is not touched
//! after that.
//!
//! loop: attention? calls, CC — every queue: doorbell, fetch ≤ 64, execute, post, one interrupt — what is due — or nap

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringmill_core::mem::MemTable;
use ringmill_core::spec::nvme::{Sqe, cap, cc, csts, reg, status};

use super::admin::Admin;
use super::counters::Count;
use super::data::{Refusal, Walker};
use super::dma::Reach;
use super::faults::Faults;
use super::held::Held;
use super::link::Link;
use super::namespace::Namespace;
use super::options::{ModelNamespace, ModelOptions, Vectors};
use super::queue::{Cq, Sq};

/// Commands of one queue in a row.
const BATCH: u32 = 64;

/// Naps of an idle thread, first and after a long while.
const NAP_SHORT: Duration = Duration::from_micros(100);
const NAP_LONG: Duration = Duration::from_millis(1);
const LONG_IDLE: Duration = Duration::from_millis(50);

/// Polls between two looks at the clock.
const POLLS_PER_LOOK: u32 = 64;

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// CC.EN and CSTS.RDY are 0.
    Off,
    /// CC.EN is 1, CSTS.RDY will be at that time.
    Enabling(u64),
    /// Both are 1.
    Ready,
    /// CC.EN is 0, CSTS.RDY will be.
    Disabling(u64),
    /// CSTS.CFS: nothing but a reset helps.
    Failed,
}

/// What becomes of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A completion with status and dword 0.
    Now(u16, u32),
    /// None now.
    Later,
}

impl Answer {
    pub(super) const OK: Answer = Answer::Now(0, 0);
}

/// The controller.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) link: Arc<Link>,
    pub(super) options: ModelOptions,
    pub(super) namespaces: Vec<Namespace>,
    pub(super) state: State,
    pub(super) is_master: bool,
    pub(super) is_shut_down: bool,
    pub(super) reach: Reach,
    pub(super) walker: Walker,
    pub(super) sqs: Vec<Option<Sq>>,
    pub(super) cqs: Vec<Option<Cq>>,
    /// Ids of the submission queues that there are.
    pub(super) active: Vec<u16>,
    pub(super) admin: Admin,
    pub(super) held: Held,
    pub(super) faults: Faults,
    owes_message: bool,
    disables_seen: u64,
    start: Instant,
    is_stopped: bool,
}

impl Machine {
    pub(super) fn new(
        link: Arc<Link>,
        options: ModelOptions,
        namespaces: Vec<ModelNamespace>,
    ) -> Machine {
        let queues = usize::from(options.io_queues_max) + 1;
        let mut machine = Machine {
            walker: Walker::new(options.sgls, options.bit_bucket),
            namespaces: namespaces.into_iter().map(Namespace::new).collect(),
            state: State::Off,
            is_master: false,
            is_shut_down: false,
            reach: Reach::default(),
            sqs: (0..queues).map(|_| None).collect(),
            cqs: (0..queues).map(|_| None).collect(),
            active: Vec::with_capacity(queues),
            admin: Admin::new(&options),
            held: Held::default(),
            faults: Faults::default(),
            owes_message: false,
            disables_seen: 0,
            start: Instant::now(),
            is_stopped: false,
            link,
            options,
        };
        machine.power_on();
        machine
    }

    /// Registers as after a reset.
    fn power_on(&mut self) {
        let o = &self.options;
        let bar = &self.link.bar;
        let capabilities = u64::from(o.queue_entries_max.clamp(2, 65536) - 1) & cap::MQES_Z_MASK
            | cap::CQR
            | u64::from(o.ready_timeout_500ms) << cap::TO_SHIFT
            | u64::from(o.doorbell_stride & 15) << cap::DSTRD_SHIFT
            | u64::from(o.command_sets) << cap::CSS_SHIFT
            | u64::from(o.page_min & 15) << cap::MPSMIN_SHIFT
            | u64::from(o.page_max & 15) << cap::MPSMAX_SHIFT;
        bar.store_u64(reg::CAP, capabilities, Ordering::Relaxed);
        bar.store_u32(reg::VS, 0x0002_0000, Ordering::Relaxed);
        for at in [reg::CC, reg::AQA, reg::ASQ, reg::ASQ + 4, reg::ACQ, reg::ACQ + 4] {
            bar.store_u32(at, 0, Ordering::Relaxed);
        }
        for at in [reg::INTMS, reg::INTMC, reg::CSTS] {
            bar.store_u32(at, 0, Ordering::Release);
        }
        self.link.interrupt_mask.store(0, Ordering::Release);
        self.clear_doorbells();
    }

    fn clear_doorbells(&self) {
        for queue in 0..self.options.io_queues_max + 1 {
            for is_completion in [false, true] {
                let at = self.link.doorbell(queue, is_completion);
                self.link.bar.store_u32(at, 0, Ordering::Release);
            }
        }
    }

    pub(super) fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The thread.
    pub(super) fn run(mut self) {
        let link = Arc::clone(&self.link);
        link.started();
        let mut idle_polls = 0;
        let mut idle_since = Instant::now();
        while !self.is_stopped {
            if self.pass(&link) {
                idle_polls = 0;
                continue;
            }
            if idle_polls == 0 {
                idle_since = Instant::now();
            }
            idle_polls += 1;
            std::hint::spin_loop();
            if idle_polls % POLLS_PER_LOOK == 0 {
                self.rest(idle_since.elapsed());
            }
        }
        link.ended();
    }

    /// One look at everything; true when there was something to do.
    #[inline]
    fn pass(&mut self, link: &Link) -> bool {
        let mut busy = false;
        if link.take_attention() {
            link.run_calls(self);
            self.look_at_registers();
            busy = true;
        }
        if self.is_running() {
            for at in 0..self.active.len() {
                // A command may have ended everything.
                let Some(&queue) = self.active.get(at) else { break };
                busy |= self.serve(queue);
            }
            if !self.held.is_empty() {
                busy |= self.run_due();
            }
        }
        busy
    }

    #[inline]
    pub(super) fn is_running(&self) -> bool {
        self.state == State::Ready && self.is_master && !self.link.gone.load(Ordering::Relaxed)
    }

    /// Nothing was to do for some time.
    #[cold]
    fn rest(&mut self, idle: Duration) {
        self.look_at_states();
        if self.is_running() {
            self.post_waiting();
            self.look_at_stray_doorbells();
            self.sleep_shadows();
            if self.link.vectors_mode == Vectors::Intx {
                self.drive_level();
            }
            self.lie_idle();
        }
        if idle < self.options.spin {
            return;
        }
        let nap = if idle > LONG_IDLE { NAP_LONG } else { NAP_SHORT };
        let due_ns = match self.state {
            State::Enabling(_) | State::Disabling(_) if self.faults.ready_is_stuck => None,
            State::Enabling(at) | State::Disabling(at) => Some(at),
            _ if self.is_running() => self.held.next_due_ns(),
            _ => None,
        };
        let until_due =
            due_ns.map_or(nap, |at| Duration::from_nanos(at.saturating_sub(self.now_ns())));
        if until_due > Duration::from_micros(20) {
            self.link.nap(nap.min(until_due));
        } else {
            std::thread::yield_now();
        }
    }

    // Registers and states.

    #[cold]
    fn look_at_registers(&mut self) {
        let disables = self.link.disables.load(Ordering::Acquire);
        let control = self.link.bar.load_u32(reg::CC, Ordering::Acquire);
        if disables != self.disables_seen {
            self.disables_seen = disables;
            self.disable();
        }
        self.look_at_states();
        let is_enabled = control & cc::EN != 0;
        if is_enabled && self.state == State::Off {
            self.state = State::Enabling(self.now_ns() + self.ready_delay_ns());
            self.look_at_states();
        }
        if control & cc::SHN_MASK != 0 && !self.is_shut_down && self.state == State::Ready {
            self.shut_down();
        }
        if self.owes_message && self.link.interrupt_mask.load(Ordering::Acquire) & 1 == 0 {
            self.owes_message = false;
            self.link.raise(0);
        }
        if self.link.vectors_mode == Vectors::Intx && self.is_running() {
            self.drive_level();
        }
    }

    fn ready_delay_ns(&self) -> u64 {
        u64::try_from(self.options.ready_delay.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Ends waiting for CSTS.RDY to change.
    fn look_at_states(&mut self) {
        match self.state {
            State::Enabling(at) if at <= self.now_ns() && !self.faults.ready_is_stuck => {
                self.enable();
            }
            State::Disabling(at) if at <= self.now_ns() && !self.faults.ready_is_stuck => {
                self.state = State::Off;
                self.set_status(0);
                // Enabled again while it was on its way down: after the 0 was there, at least.
                if self.link.bar.load_u32(reg::CC, Ordering::Acquire) & cc::EN != 0 {
                    self.state = State::Enabling(self.now_ns() + self.ready_delay_ns());
                }
            }
            _ => {}
        }
    }

    pub(super) fn set_status(&self, value: u32) {
        self.link.bar.store_u32(reg::CSTS, value, Ordering::Release);
    }

    fn enable(&mut self) {
        let control = self.link.bar.load_u32(reg::CC, Ordering::Acquire);
        let sizes = self.link.bar.load_u32(reg::AQA, Ordering::Acquire);
        let page = control >> cc::MPS_SHIFT & 15;
        let set = control >> cc::CSS_SHIFT & 7;
        let page_bytes = 1u64 << (12 + page);
        let (sq_size, cq_size) = ((sizes & 0xfff) + 1, (sizes >> 16 & 0xfff) + 1);
        let sq_iova = self.link.bar.load_u64(reg::ASQ);
        let cq_iova = self.link.bar.load_u64(reg::ACQ);
        let pages = u32::from(self.options.page_min)..=u32::from(self.options.page_max);
        let is_set_known = match set {
            0 => self.options.command_sets & 1 != 0,
            6 => self.options.command_sets & 1 << 6 != 0,
            7 => self.options.command_sets & 1 << 7 != 0,
            _ => false,
        };
        let wrong = if !pages.contains(&page) {
            Some("CC.MPS outside of CAP.MPSMIN and CAP.MPSMAX")
        } else if !is_set_known {
            Some("CC.CSS that CAP.CSS does not have")
        } else if sq_size < 2 || cq_size < 2 {
            Some("AQA with a queue of one entry")
        } else if (sq_iova | cq_iova) & (page_bytes - 1) != 0 {
            Some("ASQ or ACQ is not page aligned")
        } else {
            None
        };
        if let Some(text) = wrong {
            self.link.counters.protocol_error(|| text.to_owned());
            self.fail();
            return;
        }
        self.walker.page_bytes = page_bytes;
        self.clear_doorbells();
        let bell = |is_completion| self.link.doorbell(0, is_completion);
        self.sqs[0] = Some(Sq::new(sq_iova, sq_size, 0, bell(false), &self.reach));
        let mut cq = Cq::new(cq_iova, cq_size, Some(0), bell(true), &self.reach);
        cq.users = 1;
        self.cqs[0] = Some(cq);
        self.active.push(0);
        self.state = State::Ready;
        self.link.counters.add(Count::Enables, 1);
        self.set_status(csts::RDY);
    }

    /// CC.EN became 0.
    pub(super) fn disable(&mut self) {
        if self.faults.ready_is_stuck && self.state == State::Ready {
            // It does not listen: it goes on, and writes to memory.
            return;
        }
        let was_off = self.state == State::Off;
        self.forget();
        if was_off {
            return;
        }
        let at = self.now_ns() + self.ready_delay_ns();
        // CFS and SHST are cleared with RDY.
        self.state = State::Disabling(at);
        self.look_at_states();
    }

    /// Nothing that is out will be answered, nothing that is known of queues remains.
    pub(super) fn forget(&mut self) {
        let dropped = self.held.len() + self.admin.requests.len();
        self.link.counters.add(Count::Dropped, dropped as u64);
        self.held.clear();
        self.admin.reset(&self.options);
        self.active.clear();
        self.sqs.iter_mut().for_each(|queue| *queue = None);
        self.cqs.iter_mut().for_each(|queue| *queue = None);
        self.is_shut_down = false;
        self.owes_message = false;
        self.clear_doorbells();
    }

    /// A reset of the function.
    pub(super) fn reset(&mut self) {
        self.link.counters.add(Count::Resets, 1);
        self.forget();
        self.state = State::Off;
        self.power_on();
    }

    /// CSTS.CFS: no command is answered any more.
    #[cold]
    pub(super) fn fail(&mut self) {
        self.state = State::Failed;
        let now = self.link.bar.load_u32(reg::CSTS, Ordering::Relaxed);
        self.set_status(now | csts::CFS);
    }

    fn shut_down(&mut self) {
        for namespace in &self.namespaces {
            namespace.what.medium.flush();
        }
        self.is_shut_down = true;
        if self.faults.shutdown_is_stuck {
            return;
        }
        self.link.counters.add(Count::Shutdowns, 1);
        self.set_status(csts::RDY | csts::SHST_COMPLETE);
    }

    pub(super) fn set_master(&mut self, on: bool) {
        self.is_master = on;
        if !on {
            // What would have been written later would have been thrown away by the bus.
            self.held.forget_scribbles();
        }
    }

    pub(super) fn set_memory(&mut self, table: Arc<MemTable>) {
        self.reach = Reach::new(table);
        // A device that is no bus master, or out of the slot, reaches nothing anyway; one that said that it had stopped has
        // no claim.
        let lies = self.link.lies.as_ref().is_some_and(|lies| super::link::lock(lies).excuses());
        let reaches = self.is_master && !self.link.gone.load(Ordering::Relaxed) && !lies;
        for id in 0..self.sqs.len() {
            let sq_lost = self.sqs[id].as_mut().is_some_and(|queue| queue.attach(&self.reach));
            let cq_lost = self.cqs[id].as_mut().is_some_and(|queue| queue.attach(&self.reach));
            if reaches && (sq_lost || cq_lost) {
                let state = self.state;
                self.link.counters.theft(|| {
                    format!("queue {id} (submission {sq_lost}, completion {cq_lost}), {state:?}")
                });
            }
        }
        if self.admin.attach_shadow(&self.reach) && reaches {
            self.link.counters.theft(|| "doorbells in memory".to_owned());
        }
    }

    pub(super) fn stop(&mut self) {
        self.forget();
        self.state = State::Off;
        self.is_stopped = true;
    }

    // Queues.

    /// Serves a submission queue; true when there was something.
    #[inline]
    fn serve(&mut self, id: u16) -> bool {
        let at = usize::from(id);
        let Some(sq) = self.sqs[at].as_mut() else { return false };
        let tail = match &self.admin.shadow {
            Some(shadow) if id > 0 => shadow.tail(sq, id, &self.link),
            _ => self.link.bar.load_u32(sq.doorbell, Ordering::Acquire),
        };
        if tail != sq.tail {
            if tail >= sq.size {
                return self.bad_doorbell(id, tail);
            }
            sq.tail = tail;
            self.link.counters.add(Count::Doorbells, 1);
        }
        let waiting = sq.waiting();
        if waiting == 0 {
            return false;
        }
        let cq_id = sq.cq;
        let room = self.cq_room(cq_id, waiting.min(BATCH));
        let count = waiting.min(BATCH).min(room);
        if let Some(sq) = &self.sqs[at] {
            sq.prefetch(count);
        }
        for _ in 0..count {
            let Some(sq) = self.sqs[at].as_mut() else { break };
            let Some(sqe) = sq.fetch() else {
                self.link.counters.fault(|| format!("entries of submission queue {id}"));
                self.fail();
                return true;
            };
            match self.take(id, &sqe) {
                Answer::Now(status, result) => self.answer(id, &sqe, status, result),
                Answer::Later => {}
            }
            if self.state != State::Ready {
                return true;
            }
        }
        self.interrupt(cq_id);
        count > 0
    }

    /// Room in a completion queue; the driver's doorbell is looked at only when less is known than wanted.
    #[inline]
    fn cq_room(&mut self, id: u16, wanted: u32) -> u32 {
        let room = self.cqs[usize::from(id)].as_ref().map_or(0, Cq::room);
        if room >= wanted && self.link.vectors_mode != Vectors::Intx {
            return room;
        }
        self.look_at_head(id);
        self.cqs[usize::from(id)]
            .as_ref()
            .map_or(0, |cq| if cq.has_waiting() { 0 } else { cq.room() })
    }

    /// Reads the doorbell of a completion queue.
    fn look_at_head(&mut self, id: u16) {
        let Some(cq) = self.cqs[usize::from(id)].as_mut() else { return };
        let head = match &self.admin.shadow {
            Some(shadow) if id > 0 => shadow.head(id, &self.link),
            _ => self.link.bar.load_u32(cq.doorbell, Ordering::Acquire),
        };
        if head == cq.head {
            return;
        }
        let (size, was) = (cq.size, cq.head);
        if head >= size || (head + size - was) % size > cq.posted() {
            // Not to be seen again.
            self.link.bar.store_u32(cq.doorbell, was, Ordering::Release);
            self.link.counters.protocol_error(|| {
                format!("completion queue {id} of {size}: head doorbell from {was} to {head}")
            });
            return;
        }
        cq.head = head;
        self.link.counters.add(Count::Doorbells, 1);
    }

    #[cold]
    fn bad_doorbell(&mut self, id: u16, tail: u32) -> bool {
        self.link.counters.protocol_error(|| format!("submission queue {id}: doorbell {tail}"));
        // An error event in a real one; the entry cannot be executed.
        self.fail();
        true
    }

    /// Doorbells of queues that are not there, and of completion queues with room.
    fn look_at_stray_doorbells(&mut self) {
        for id in 0..self.options.io_queues_max + 1 {
            self.look_at_head(id);
            let missing = [
                (self.sqs[usize::from(id)].is_none(), false),
                (self.cqs[usize::from(id)].is_none(), true),
            ];
            for (is_missing, is_completion) in missing {
                let at = self.link.doorbell(id, is_completion);
                if is_missing && self.link.bar.load_u32(at, Ordering::Acquire) != 0 {
                    self.link.bar.store_u32(at, 0, Ordering::Release);
                    self.link
                        .counters
                        .protocol_error(|| format!("doorbell of queue {id}, which is not there"));
                }
            }
        }
    }

    /// Posts a completion.
    #[inline]
    pub(super) fn answer(&mut self, id: u16, sqe: &Sqe, status: u16, result: u32) {
        let Some(sq) = &self.sqs[usize::from(id)] else { return };
        let (cq, head) = (sq.cq, sq.head);
        let entry =
            [result, 0, head | u32::from(id) << 16, sqe.0[0] >> 16 | u32::from(status) << 17];
        if self.link.lies.is_some() {
            self.lie_about(cq, entry);
        } else {
            self.post(cq, entry);
        }
    }

    #[inline]
    pub(super) fn post(&mut self, cq_id: u16, entry: [u32; 4]) {
        let Some(cq) = self.cqs[usize::from(cq_id)].as_mut() else { return };
        if !cq.post(entry) {
            self.link.counters.fault(|| format!("an entry of completion queue {cq_id}"));
            self.fail();
        }
    }

    /// Completions for which there was no room.
    fn post_waiting(&mut self) {
        for id in 0..self.options.io_queues_max + 1 {
            if !self.cqs[usize::from(id)].as_ref().is_some_and(Cq::has_waiting) {
                continue;
            }
            self.look_at_head(id);
            let is_mapped = self.cqs[usize::from(id)].as_mut().is_none_or(Cq::post_waiting);
            if !is_mapped {
                self.link.counters.fault(|| format!("a late entry of completion queue {id}"));
                self.fail();
                return;
            }
            self.interrupt(id);
        }
    }

    /// Raises what a completion queue owes.
    #[inline]
    pub(super) fn interrupt(&mut self, id: u16) {
        let Some(cq) = self.cqs[usize::from(id)].as_mut() else { return };
        if !cq.owes_interrupt {
            return;
        }
        cq.owes_interrupt = false;
        let Some(vector) = cq.vector else { return };
        match self.link.vectors_mode {
            Vectors::None => {}
            Vectors::MsiX(_) => _ = self.link.raise(vector),
            Vectors::Msi if self.link.interrupt_mask.load(Ordering::Acquire) & 1 != 0 => {
                self.owes_message = true;
            }
            Vectors::Msi => _ = self.link.raise(0),
            Vectors::Intx => self.drive_level(),
        }
    }

    /// INTx: raised while a queue with interrupts has something that was not taken.
    fn drive_level(&mut self) {
        for id in 0..self.options.io_queues_max + 1 {
            self.look_at_head(id);
        }
        let wants = |cq: &Cq| cq.vector.is_some() && cq.posted() > 0;
        let level = self.cqs.iter().flatten().any(wants);
        if level && self.link.interrupt_mask.load(Ordering::Acquire) & 1 == 0 {
            self.link.raise_level();
        }
    }

    /// Accounts for a command that is not done; the status for its completion.
    #[cold]
    pub(super) fn refuse(&mut self, id: u16, sqe: &Sqe, refusal: Refusal) -> u16 {
        if let Some(text) = refusal.blame {
            self.link.counters.protocol_error(|| format!("queue {id}: {text} (command {sqe:x?})"));
        }
        if refusal.is_fault {
            self.link.counters.fault(|| format!("data of queue {id}'s command {sqe:x?}"));
        }
        self.admin.log_error(id, sqe, refusal.status);
        // Most of them fail again, except where the medium or an abort is to blame.
        let again = matches!(refusal.status, status::ABORTED | status::NAMESPACE_NOT_READY);
        if again { refusal.status } else { refusal.status | 1 << 14 }
    }
}
