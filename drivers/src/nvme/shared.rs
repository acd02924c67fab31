//! What a queue pair and its controller's thread tell each other.
//!
//! Flow: thread → order → the pair obeys at the end of a pass → obeyed; pair → overdue, trouble → the thread looks. Owner:
//! words of the thread, words of the reactor and its counters each have a pair of lines of their own.
//! **Invariant:** neither side ever waits for a lock; an order is obeyed once the pair says so with its epoch; a CID that
//! was reported as overdue is not used again before the thread has settled it.
//!
//! | order | the pair | who gives it |
//! |---|---|---|
//! | Run | submits, rings; the rings are as they were, or empty after Disabled and Fail | queues exist on the device |
//! | Hold | takes nothing, rings nothing, still reaps | something is wrong; to resume: Run |
//! | Disabled | reaps once more, keeps what may be repeated, empties its rings | the device has provably stopped |
//! | Fail | as Disabled, but everything ends, and what comes ends at once | it cannot touch memory any more |

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use ringmill_core::IoStatus;

/// Why requests end without the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailReason {
    /// It was pulled out, taken away or given up.
    Gone,
    /// It was reset, and does not come back.
    Reset,
    /// It did not answer.
    Timeout,
}

impl FailReason {
    /// What requests end with.
    #[must_use]
    pub const fn status(self) -> IoStatus {
        match self {
            FailReason::Gone => IoStatus::Gone,
            FailReason::Reset => IoStatus::Reset,
            FailReason::Timeout => IoStatus::Timeout,
        }
    }
}

/// What the thread wants of a pair; see the table above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Work.
    Run,
    /// Leave the device alone.
    Hold,
    /// The device has stopped and forgotten its queues.
    Disabled,
    /// The same, for good.
    Fail(FailReason),
}

/// An order with its number, as one word: epoch << 8 | kind.
const KINDS: [Order; 6] = [
    Order::Hold,
    Order::Run,
    Order::Disabled,
    Order::Fail(FailReason::Gone),
    Order::Fail(FailReason::Reset),
    Order::Fail(FailReason::Timeout),
];
const EPOCH_SHIFT: u32 = 8;

impl Order {
    const fn kind(self) -> u64 {
        match self {
            Order::Hold => 0,
            Order::Run => 1,
            Order::Disabled => 2,
            Order::Fail(FailReason::Gone) => 3,
            Order::Fail(FailReason::Reset) => 4,
            Order::Fail(FailReason::Timeout) => 5,
        }
    }

    /// The order in a word.
    pub(super) fn of_word(word: u64) -> Order {
        KINDS.into_iter().find(|order| order.kind() == word & 0xff).unwrap_or(Order::Hold)
    }
}

/// Why a pair believes its device no longer. It submits and reaps nothing then until it has obeyed Disabled or Fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A completion for a command that is not out: unknown, stale, or a second one.
    StrangeCid,
    /// A submission queue head outside of what was submitted, or another queue's id.
    StrangeHead,
}

impl Trouble {
    const ALL: [Trouble; 2] = [Trouble::StrangeCid, Trouble::StrangeHead];

    const fn number(self) -> u32 {
        match self {
            Trouble::StrangeCid => 1,
            Trouble::StrangeHead => 2,
        }
    }
}

/// A command that has been out for longer than the deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// Its CID, for Abort.
    pub cid: u16,
    /// The number of the report, for [`QueueShared::settle`].
    pub sequence: u32,
    /// It has ended meanwhile: nothing is to be done but to settle it, once no Abort of it is under way.
    pub ended: bool,
}

const OVERDUE_ENDED: u64 = 1 << 16;

impl Overdue {
    /// From 1 on, so that 0 is none.
    fn word(self) -> u64 {
        let ended = if self.ended { OVERDUE_ENDED } else { 0 };
        u64::from(self.sequence) << 32 | ended | u64::from(self.cid)
    }

    fn of_word(word: u64) -> Option<Overdue> {
        let bytes = word.to_le_bytes();
        let sequence = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let cid = u16::from_le_bytes([bytes[0], bytes[1]]);
        (word != 0).then_some(Overdue { cid, sequence, ended: word & OVERDUE_ENDED != 0 })
    }
}

/// Written by the thread.
#[derive(Debug, Default)]
#[repr(align(128))]
struct FromThread {
    order: AtomicU64,
    settled: AtomicU32,
    /// The thread sees the shared vector's interrupts.
    watched: AtomicBool,
    /// The device does not look at doorbells in memory any more.
    shadow_lost: AtomicBool,
    /// Nobody will come for the pair: whoever is the last on it takes it along.
    abandoned: AtomicBool,
}

/// Written by the reactor.
#[derive(Debug, Default)]
#[repr(align(128))]
struct FromPair {
    obeyed: AtomicU64,
    overdue: AtomicU64,
    trouble: AtomicU32,
    asleep: AtomicBool,
}

/// Written by the reactor, once per pass with work.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counters {
    pub(super) commands: AtomicU64,
    pub(super) doorbells: AtomicU64,
    pub(super) splits: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) retried: AtomicU64,
    pub(super) requeued: AtomicU64,
    pub(super) overdue: AtomicU64,
    pub(super) strange: AtomicU64,
}

/// A pair's figures since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Commands submitted.
    pub commands: u64,
    /// Doorbell writes, of both queues.
    pub doorbells: u64,
    /// Requests that took more than one command.
    pub splits: u64,
    /// Completions with an error, retried ones included.
    pub errors: u64,
    /// Commands sent again after such.
    pub retried: u64,
    /// Commands sent again after a reset.
    pub requeued: u64,
    /// Commands that were reported as overdue.
    pub overdue: u64,
    /// Completions that nobody believes.
    pub strange: u64,
}

/// See the module.
#[derive(Debug)]
#[repr(C)]
pub struct QueueShared {
    from_thread: FromThread,
    from_pair: FromPair,
    pub(super) counters: Counters,
    /// Signalled when the thread has something to look at.
    nudge: Arc<OwnedFd>,
}

const _: () = assert!(align_of::<QueueShared>() == 128 && size_of::<FromThread>() == 128);

impl QueueShared {
    /// For a new pair, whose first order is Hold and obeyed. `nudge` is the thread's eventfd, non-blocking.
    #[must_use]
    pub fn new(nudge: Arc<OwnedFd>) -> QueueShared {
        QueueShared {
            from_thread: FromThread::default(),
            from_pair: FromPair::default(),
            counters: Counters::default(),
            nudge,
        }
    }

    // The thread's side.

    /// Orders. What the thread did before is visible to the pair when it obeys. Wake the reactor afterwards.
    pub fn order(&self, order: Order) {
        let last = self.from_thread.order.load(Ordering::Relaxed) >> EPOCH_SHIFT;
        let word = last.wrapping_add(1) << EPOCH_SHIFT | order.kind();
        self.from_thread.order.store(word, Ordering::Release);
    }

    /// The last order.
    #[must_use]
    pub fn ordered(&self) -> Order {
        Order::of_word(self.from_thread.order.load(Ordering::Relaxed))
    }

    /// True once the last order was obeyed. What the pair did before is visible then.
    #[must_use]
    pub fn is_obeyed(&self) -> bool {
        let obeyed = self.from_pair.obeyed.load(Ordering::Acquire);
        obeyed == self.from_thread.order.load(Ordering::Relaxed)
    }

    /// The command that is overdue and was not settled. There is one at a time; the next comes after this one is settled.
    #[must_use]
    pub fn overdue(&self) -> Option<Overdue> {
        let overdue = Overdue::of_word(self.from_pair.overdue.load(Ordering::Acquire))?;
        let settled = self.from_thread.settled.load(Ordering::Relaxed);
        (overdue.sequence != settled).then_some(overdue)
    }

    /// No Abort for this report is under way, and none will be sent: its CID may be used again once the command has ended. A
    /// command that is still out then is reported again after another deadline.
    pub fn settle(&self, sequence: u32) {
        self.from_thread.settled.store(sequence, Ordering::Release);
    }

    /// Why the pair believes the device no longer; forgotten when it obeys Disabled or Fail.
    #[must_use]
    pub fn trouble(&self) -> Option<Trouble> {
        let number = self.from_pair.trouble.load(Ordering::Acquire);
        Trouble::ALL.into_iter().find(|trouble| trouble.number() == number)
    }

    /// After an interrupt of a vector that several pairs share: true when this pair's reactor is asleep, or about to be, and
    /// has commands out; wake it.
    #[must_use]
    pub fn wants_wake(&self) -> bool {
        // Pairs with the fence in `set_asleep`: either the pair saw the completion, or we see that it sleeps.
        fence(Ordering::SeqCst);
        self.from_pair.asleep.load(Ordering::Relaxed)
    }

    /// Whether the shared vector's interrupts reach the thread. Ask [`QueueShared::wants_wake`] after it was taken back.
    pub fn set_watched(&self, watched: bool) {
        self.from_thread.watched.store(watched, Ordering::Relaxed);
    }

    /// Before a Run: the device has forgotten about doorbells in memory, for good.
    pub fn lose_shadow(&self) {
        self.from_thread.shadow_lost.store(true, Ordering::Relaxed);
    }

    /// The thread ends: the last channel that closes takes the pair along.
    pub fn abandon(&self) {
        self.from_thread.abandoned.store(true, Ordering::Release);
    }

    /// The figures.
    #[must_use]
    pub fn counters(&self) -> QueueCounters {
        let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        let own = &self.counters;
        QueueCounters {
            commands: get(&own.commands),
            doorbells: get(&own.doorbells),
            splits: get(&own.splits),
            errors: get(&own.errors),
            retried: get(&own.retried),
            requeued: get(&own.requeued),
            overdue: get(&own.overdue),
            strange: get(&own.strange),
        }
    }

    /// The thread's eventfd.
    #[must_use]
    pub fn nudge_fd(&self) -> BorrowedFd<'_> {
        self.nudge.as_fd()
    }

    // The reactor's side.

    /// The last order as a word; compare with the one obeyed, take apart with [`Order::of_word`].
    #[inline]
    pub(super) fn order_word(&self) -> u64 {
        self.from_thread.order.load(Ordering::Acquire)
    }

    /// Whether doorbells are registers now, as of the order that was read last.
    #[cold]
    pub(super) fn is_shadow_lost(&self) -> bool {
        self.from_thread.shadow_lost.load(Ordering::Relaxed)
    }

    /// Whether the pair is nobody's.
    #[cold]
    pub(super) fn is_abandoned(&self) -> bool {
        self.from_thread.abandoned.load(Ordering::Acquire)
    }

    /// That order was obeyed.
    #[cold]
    pub(super) fn obey(&self, word: u64) {
        self.from_pair.obeyed.store(word, Ordering::Release);
        self.nudge();
    }

    /// Reports a command, or that the one reported has ended.
    #[cold]
    pub(super) fn report(&self, overdue: Overdue) {
        self.from_pair.overdue.store(overdue.word(), Ordering::Release);
        self.nudge();
    }

    /// The last report that the thread has settled.
    #[inline]
    pub(super) fn settled(&self) -> u32 {
        self.from_thread.settled.load(Ordering::Acquire)
    }

    /// Says that the device is not to be believed, or that it is forgotten.
    #[cold]
    pub(super) fn set_trouble(&self, trouble: Option<Trouble>) {
        let number = trouble.map_or(0, Trouble::number);
        self.from_pair.trouble.store(number, Ordering::Release);
        if trouble.is_some() {
            self.nudge();
        }
    }

    /// Says whether the thread is to wake the reactor at interrupts. The pair looks at its queue afterwards.
    #[cold]
    pub(super) fn set_asleep(&self, asleep: bool) {
        self.from_pair.asleep.store(asleep, Ordering::Relaxed);
        // Pairs with the fence in `wants_wake`.
        fence(Ordering::SeqCst);
        if asleep && !self.from_thread.watched.load(Ordering::Relaxed) {
            // It has to bind the vector first.
            self.nudge();
        }
    }

    /// An eventfd that is full says enough.
    #[cold]
    fn nudge(&self) {
        let _ = rustix::io::write(&self.nudge, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn shared() -> QueueShared {
        QueueShared::new(Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap()))
    }

    fn was_nudged(shared: &QueueShared) -> bool {
        rustix::io::read(shared.nudge_fd(), &mut [0u8; 8]).is_ok()
    }

    #[test]
    fn an_order_is_obeyed_by_its_number() {
        let shared = shared();
        assert!(shared.is_obeyed() && shared.ordered() == Order::Hold);
        for order in KINDS {
            shared.order(order);
            assert!(!shared.is_obeyed());
            let word = shared.order_word();
            assert_eq!((Order::of_word(word), shared.ordered()), (order, order));
            shared.obey(word);
            assert!(shared.is_obeyed() && was_nudged(&shared));
            // The same once more is another order.
            shared.order(order);
            assert!(!shared.is_obeyed());
        }
        assert_eq!(Order::of_word(0xff), Order::Hold);
    }

    #[test]
    fn a_report_stands_until_it_is_settled() {
        let shared = shared();
        assert_eq!(shared.overdue(), None);
        let mut overdue = Overdue { cid: 0xffff, sequence: 1, ended: false };
        shared.report(overdue);
        assert_eq!(shared.overdue(), Some(overdue));
        overdue.ended = true;
        shared.report(overdue);
        assert_eq!(shared.overdue(), Some(overdue));
        assert!(was_nudged(&shared) && shared.settled() == 0);
        shared.settle(1);
        assert_eq!((shared.overdue(), shared.settled()), (None, 1));
    }

    #[test]
    fn a_sleeper_asks_for_the_shared_vector_until_it_is_there() {
        let shared = shared();
        shared.set_asleep(true);
        assert!(was_nudged(&shared) && shared.wants_wake());
        shared.set_asleep(false);
        assert!(!was_nudged(&shared) && !shared.wants_wake());
        shared.set_watched(true);
        shared.set_asleep(true);
        assert!(!was_nudged(&shared) && shared.wants_wake());
    }

    #[test]
    fn trouble_is_told_and_forgotten() {
        let shared = shared();
        for trouble in Trouble::ALL {
            shared.set_trouble(Some(trouble));
            assert_eq!(shared.trouble(), Some(trouble));
            assert!(was_nudged(&shared));
        }
        shared.set_trouble(None);
        assert_eq!(shared.trouble(), None);
    }
}
