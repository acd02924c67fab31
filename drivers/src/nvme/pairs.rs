//! The queue pairs as the controller's thread sees them: made, ordered, given back.
//!
//! Owner: the thread that attaches, then the controller's thread. **Invariant:** a pair's queues are made again only after the
//! pair has obeyed Disabled: until then its rings hold entries of another life. A pair's memory is dropped only after its
//! queues were deleted, or the device was stopped.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringmill_core::reactor::{DeviceKey, ReactorHandle};
use rustix::event::{EventfdFlags, eventfd};

use super::admin::refused_with;
use super::controller::Controller;
use super::joint::Tally;
use super::parts::{BindVector, Interrupts, QueueMemory, QueuePairParts};
use super::qpair::QueuePair;
use super::thread::{Keeper, nudge};
use super::{NvmeError, NvmeOptions, Order, QueueShared};
use crate::pci::PciBacking;

/// How often a waiting thread looks.
pub(super) const LOOK: Duration = Duration::from_micros(200);

/// The same after some time.
const LOOK_LATER: Duration = Duration::from_millis(2);

/// How long a shared vector stays bound after the last sleeper.
const BOUND_FOR: Duration = Duration::from_secs(1);

/// Between two lines in the log about late commands.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// What becomes of a command that had no answer in time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Late {
    /// Its completion queue is looked at once more.
    Looking(u32, Instant),
    /// The device said that it ends it.
    Aborting(u32, Instant),
    /// The device said that it did not end it.
    Refused(u32, Instant),
}

impl Late {
    /// The number of the report.
    pub(super) fn sequence(self) -> u32 {
        match self {
            Late::Looking(sequence, _)
            | Late::Aborting(sequence, _)
            | Late::Refused(sequence, _) => sequence,
        }
    }
}

/// A pair on the device.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) queue_id: u16,
    pub(super) shared: Arc<QueueShared>,
    pub(super) memory: Arc<QueueMemory>,
    pub(super) vector: Option<u16>,
    /// Whose it is; `None`: a thread's that is no reactor.
    pub(super) home: Option<ReactorHandle>,
    /// The device knows its queues.
    pub(super) exists: bool,
    pub(super) late: Option<Late>,
}

/// Which vectors there are for pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InterruptPlan {
    /// None: reactors stay awake while commands are out.
    None,
    /// Each pair has the one with the number of its queues; the admin queue has 0.
    Own,
    /// Vector 0 for all, bound while somebody sleeps.
    Shared,
}

impl InterruptPlan {
    pub(super) fn new(vectors: u16, pairs: u16) -> InterruptPlan {
        match vectors {
            0 => InterruptPlan::None,
            n if n > pairs => InterruptPlan::Own,
            _ => InterruptPlan::Shared,
        }
    }

    fn vector(self, queue_id: u16) -> Option<u16> {
        match self {
            InterruptPlan::None => None,
            InterruptPlan::Own => Some(queue_id),
            InterruptPlan::Shared => Some(0),
        }
    }
}

fn own_interrupts<B: PciBacking>(backing: &Arc<B>, vector: u16) -> Option<Interrupts> {
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
    let backing = Arc::clone(backing);
    let bind: BindVector = Arc::new(move |fd| backing.bind_vector(vector, fd));
    Some(Interrupts::Own { bind, eventfd: Arc::new(eventfd) })
}

/// What a pair is made with.
pub(super) struct PairOrder<'a> {
    pub(super) key: DeviceKey,
    pub(super) options: &'a NvmeOptions,
    pub(super) plan: InterruptPlan,
    pub(super) nudge: &'a Arc<OwnedFd>,
    pub(super) queue_id: u16,
    pub(super) home: Option<ReactorHandle>,
}

/// Makes a pair, here and on the device, ready to run.
pub(super) fn make_pair<B: PciBacking>(
    controller: &mut Controller<B>,
    order: PairOrder<'_>,
) -> Result<(Pair, QueuePair<B::Registers>), NvmeError> {
    let PairOrder { key, options, plan, nudge, queue_id, home } = order;
    let entries = controller.queue_entries(options.io_queue_size);
    let memory = Arc::new(QueueMemory::new(&controller.backing.dma(), entries)?);
    let mut vector = plan.vector(queue_id);
    let interrupts = match (plan, vector) {
        (InterruptPlan::Own, Some(own)) => own_interrupts(&controller.backing, own),
        (InterruptPlan::Shared, _) => Some(Interrupts::Thread),
        _ => None,
    };
    let interrupts = interrupts.unwrap_or_else(|| {
        vector = None;
        Interrupts::None
    });
    let (sq_doorbell_bytes, cq_doorbell_bytes) = controller.doorbells(queue_id);
    let shared = Arc::new(QueueShared::new(Arc::clone(nudge)));
    let queue_pair = QueuePair::new(QueuePairParts {
        key,
        queue_id,
        memory: Arc::clone(&memory),
        registers: Arc::clone(controller.bar.registers()),
        sq_doorbell_bytes,
        cq_doorbell_bytes,
        shadow: controller.shadow_of(queue_id),
        interrupts,
        shared: Arc::clone(&shared),
        timeout_ns: u64::try_from(options.timeout.as_nanos()).unwrap_or(u64::MAX),
    })?;
    if let Err(error) = controller.create_pair(queue_id, &memory, vector) {
        if refused_with(&error).is_none() {
            controller.orphans.push(memory);
        }
        return Err(error);
    }
    shared.order(Order::Run);
    let pair = Pair { queue_id, shared, memory, vector, home, exists: true, late: None };
    Ok((pair, queue_pair))
}

impl<B: PciBacking> Keeper<B> {
    /// A pair for a thread that is no reactor.
    pub(super) fn make_loose_pair(&mut self) -> Result<QueuePair<B::Registers>, NvmeError> {
        self.collect_dropped()?;
        let taken = |id: &u16| self.pairs.iter().any(|pair| pair.queue_id == *id);
        let Some(queue_id) = (1..=self.pairs_max).find(|id| !taken(id)) else {
            let count = self.pairs_max;
            return Err(self.controller.bar.refused(format!(
                "all {count} I/O queue pairs that it was asked for are in use; close a channel, or raise num_io_queues"
            )));
        };
        let order = PairOrder {
            key: self.common.key,
            options: &self.common.options,
            plan: self.interrupts,
            nudge: &self.nudge,
            queue_id,
            home: None,
        };
        let (pair, queue_pair) = match make_pair(&mut self.controller, order) {
            Ok(made) => made,
            Err(error) => {
                // It may have a queue that nobody uses: only a reset makes sure. One without an answer is reset anyway.
                if !self.controller.orphans.is_empty()
                    && !self.controller.admin.is_broken()
                    && !error.is_gone()
                {
                    self.reset(&error.to_string())?;
                }
                return Err(error);
            }
        };
        self.common.count_pair(&pair.shared);
        self.pairs.push(pair);
        Ok(queue_pair)
    }

    /// Deletes the queues of pairs that were dropped with their threads.
    pub(super) fn collect_dropped(&mut self) -> Result<(), NvmeError> {
        let dropped = |pair: &Pair| pair.home.is_none() && Arc::strong_count(&pair.shared) == 1;
        while let Some(at) = self.pairs.iter().position(dropped) {
            if self.pairs[at].exists {
                // Its memory is held until this has worked, or the device has been stopped.
                let queue_id = self.pairs[at].queue_id;
                self.pairs[at].exists = false;
                if let Err(error) =
                    self.controller.delete_pair(queue_id, self.controller.timeout_admin)
                {
                    self.pairs[at].exists = true;
                    if !self.controller.admin.is_broken() && !error.is_gone() {
                        // It refuses to forget a queue: only a reset does.
                        self.reset(&error.to_string())?;
                        continue;
                    }
                    return Err(error);
                }
            }
            let pair = self.pairs.swap_remove(at);
            self.common.retire_pair(&pair.shared);
        }
        Ok(())
    }

    /// Orders the same of all pairs and wakes their reactors.
    pub(super) fn order_all(&self, order: Order) {
        for pair in &self.pairs {
            pair.shared.order(order);
            nudge(pair.home.as_ref());
        }
    }

    /// Waits until all pairs that somebody polls have obeyed; false when some have not in time.
    pub(super) fn wait_obeyed(&self, within: Duration) -> bool {
        self.wait_obeyed_unless(within, || false)
    }

    /// The same where the device is still there, and has to be let go of when somebody waits for that, or it is gone.
    pub(super) fn wait_obeyed_with_device(&self, within: Duration) -> bool {
        let bar = &self.controller.bar;
        self.wait_obeyed_unless(within, || bar.is_wanted() || bar.status().is_err())
    }

    fn wait_obeyed_unless(&self, within: Duration, is_over: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        let mut pause = LOOK;
        loop {
            let all =
                self.pairs.iter().all(|pair| pair.shared.is_obeyed() || !self.is_polled(pair));
            if all || start.elapsed() >= within || is_over() {
                return all;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_LATER);
        }
    }

    /// A pair that has not reached its reactor yet obeys nobody, and has nothing out.
    fn is_polled(&self, pair: &Pair) -> bool {
        let Some(home) = &pair.home else { return Arc::strong_count(&pair.shared) > 1 };
        let own = self.common.homes.iter().find(|own| own.reactor.same(home));
        let waits = own.is_some_and(|own| own.waiting.lock().is_ok_and(|pair| pair.is_some()));
        !waits && !home.is_stopped()
    }

    /// Gives queues to pairs that have obeyed Disabled, and lets them run.
    pub(super) fn restart_pairs(&mut self) -> Result<(), NvmeError> {
        for at in 0..self.pairs.len() {
            let pair = &self.pairs[at];
            let is_ready =
                !pair.exists && pair.shared.ordered() == Order::Disabled && pair.shared.is_obeyed();
            if !is_ready {
                continue;
            }
            let (queue_id, vector) = (pair.queue_id, pair.vector);
            let memory = Arc::clone(&pair.memory);
            self.controller.create_pair(queue_id, &memory, vector)?;
            let is_shadow_lost = self.controller.shadow.is_lost();
            let pair = &mut self.pairs[at];
            (pair.exists, pair.late) = (true, None);
            if is_shadow_lost {
                pair.shared.lose_shadow();
                self.common.lose_shadow();
            }
            // What was late before is so no more.
            if let Some(overdue) = pair.shared.overdue() {
                pair.shared.settle(overdue.sequence);
            }
            pair.shared.order(Order::Run);
            nudge(pair.home.as_ref());
        }
        Ok(())
    }

    /// After the shared vector's interrupt: wakes the reactors that sleep beside it.
    pub(super) fn pass_interrupt_on(&mut self) {
        for pair in self.pairs.iter().filter(|pair| pair.shared.wants_wake()) {
            nudge(pair.home.as_ref());
        }
        // A level comes again at once until they have looked; the pause of every turn bounds that.
        if !self.lost {
            let _ = self.controller.backing.unmask(0);
        }
    }

    /// Binds the shared vector while somebody sleeps: while all poll, interrupts would only cost.
    pub(super) fn bind_interrupt(&mut self) {
        if self.lost || self.interrupts != InterruptPlan::Shared {
            return;
        }
        let is_due = self.bound && self.last_wanted.elapsed() > BOUND_FOR;
        // Said before it is done, and looked at once more: whoever goes to sleep after that nudges this thread.
        self.pairs.iter().for_each(|pair| pair.shared.set_watched(self.bound && !is_due));
        let wanted = self.pairs.iter().any(|pair| pair.shared.wants_wake());
        if wanted {
            self.last_wanted = Instant::now();
        }
        let backing = &self.controller.backing;
        if wanted && !self.bound {
            self.bound = backing.bind_vector(0, Some(self.interrupt.as_fd())).is_ok();
            // Whatever came before it was bound: they look once more.
            for pair in &self.pairs {
                pair.shared.set_watched(self.bound);
                if pair.shared.wants_wake() {
                    nudge(pair.home.as_ref());
                }
            }
        } else if wanted {
            self.pairs.iter().for_each(|pair| pair.shared.set_watched(true));
        } else if is_due {
            let _ = backing.bind_vector(0, None);
            self.bound = false;
        }
    }

    pub(super) fn note_timeout(&mut self, queue_id: u16, cid: u16) {
        Tally::note(&self.common.tally.timeouts);
        // One line says it for all that wait at the same time.
        let is_news = self.last_told.is_none_or(|at| at.elapsed() > TELL_EVERY);
        if !is_news {
            return;
        }
        self.last_told = Some(Instant::now());
        tracing::warn!(
            "{}: no answer to command {cid:#x} of queue {queue_id} within {} ms",
            self.name(),
            self.common.options.timeout.as_millis()
        );
    }
}
