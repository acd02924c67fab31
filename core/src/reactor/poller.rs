//! What a reactor polls.
//!
//! Owner: a poller belongs to one reactor and is moved there and back by messages.
//! **Invariant:** `poll` never blocks, allocates or logs; `quiesce` is the only barrier and every poller that holds
//! requests implements it.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::bdev::Channel;

use super::{ClientId, ReactorCx};

/// Called once on the reactor when something asked for has happened; it must only pass the news on.
pub type Done = Box<dyn FnOnce() + Send>;

/// Names a poller over all reactors and the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PollerId(u64);

impl PollerId {
    /// A name that was never used before.
    #[must_use]
    pub fn next() -> PollerId {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        PollerId(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// The number behind the name.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

/// Something that a reactor polls in every pass, unless it is parked.
pub trait Poller: Any + Send {
    /// Does what there is to do, in bounded time; true when work was found.
    fn poll(&mut self, cx: &mut ReactorCx) -> bool;

    /// Called before the reactor sleeps, after `sleeping` was announced: publish the wish to be notified, then look
    /// again. True when work is there (or cannot be notified of): the reactor stays awake.
    fn prepare_sleep(&mut self, cx: &mut ReactorCx) -> bool;

    /// Called when nothing was found for a while: publish the wish to be notified, then look again. With `Some`, the
    /// poller is left out of the passes until that client of the ring has an event, or until a message names the poller.
    /// `None`: something can happen that only polling finds.
    fn park(&mut self, _cx: &mut ReactorCx) -> Option<ClientId> {
        None
    }

    /// Called about once a second whatever the load: for checks that are too rare for `poll`.
    fn look_after(&mut self, _cx: &mut ReactorCx) {}

    /// Called once when the reactor takes the poller in (it may arm kicks) …
    fn attach(&mut self, _cx: &mut ReactorCx) {}

    /// … and once before it gives the poller back, drained or not.
    fn detach(&mut self, _cx: &mut ReactorCx) {}

    /// Stops taking new requests; calls `done` when nothing is in flight any more. A second call before the first is
    /// done joins it.
    fn quiesce(&mut self, _cx: &mut ReactorCx, done: Done) {
        done();
    }

    /// Ends a quiesce; with `Some`, goes on with another lower channel and returns the old one, to be dropped by the
    /// control thread.
    fn resume(
        &mut self,
        _cx: &mut ReactorCx,
        channel: Option<Box<dyn Channel>>,
    ) -> Option<Box<dyn Channel>> {
        channel
    }
}

/// What a poller did so far: one writer (its reactor), any reader. On lines of its own: its neighbour in memory may be
/// another reactor's, and every pass writes here.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct PollerCounters {
    runs: AtomicU64,
    busy_runs: AtomicU64,
    parked: AtomicBool,
}

impl PollerCounters {
    pub(super) fn set_parked(&self, parked: bool) {
        self.parked.store(parked, Ordering::Relaxed);
    }

    /// True while its reactor leaves it out and waits for an event.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn note(&self, busy: bool) {
        self.runs.store(self.runs.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        if busy {
            self.busy_runs.store(self.busy_runs.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    /// Times polled.
    #[must_use]
    pub fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }

    /// Times polled with work found.
    #[must_use]
    pub fn busy_runs(&self) -> u64 {
        self.busy_runs.load(Ordering::Relaxed)
    }
}

/// A poller as statistics show it.
#[derive(Clone, Debug)]
pub struct PollerInfo {
    /// Its id.
    pub id: PollerId,
    /// Its name.
    pub name: String,
    /// 0 for a poller of every pass, otherwise its period.
    pub period_ns: u64,
    /// Its counters.
    pub counters: Arc<PollerCounters>,
}
