//! A poller on its way from one reactor to another.
//!
//! Flow: a message takes it off one reactor → the control thread prepares it → a message puts it on the other one.
//! **Invariant:** exactly one side gets it: the reactor whose message finds it here, or the control thread that has
//! waited long enough for a reactor that does not answer. It is never lost with an undelivered message.

use std::sync::Arc;

use crossbeam_queue::ArrayQueue;

use super::{Poller, PollerCounters, PollerId, PollerInfo, Reactor, ReactorHandle};

/// See the module's head. Cheap to clone; all clones hold the same poller.
#[derive(Clone)]
pub struct HandOver {
    place: Arc<ArrayQueue<Box<dyn Poller>>>,
}

impl std::fmt::Debug for HandOver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandOver").field("waits", &!self.place.is_empty()).finish()
    }
}

impl HandOver {
    /// Puts the poller where either side can take it.
    #[must_use]
    pub fn new(poller: Box<dyn Poller>) -> HandOver {
        let place = ArrayQueue::new(1);
        // A new queue has room.
        let _ = place.push(poller);
        HandOver { place: Arc::new(place) }
    }

    /// Takes the poller; `None` when the other side has.
    #[must_use]
    pub fn take(&self) -> Option<Box<dyn Poller>> {
        self.place.pop()
    }
}

impl Reactor {
    /// Takes a poller in, to be polled in every pass. For messages; the control thread has listed it.
    #[cold]
    pub fn adopt(&mut self, id: PollerId, poller: Box<dyn Poller>, counters: Arc<PollerCounters>) {
        self.admit(id, poller, counters, 0);
    }
}

impl ReactorHandle {
    /// Lists a poller that a message is going to bring, so that statistics show it; [`ReactorHandle::forget_poller`] if
    /// the message does not.
    #[must_use]
    pub fn expect_poller(&self, id: PollerId, name: &str) -> Arc<PollerCounters> {
        let counters = Arc::new(PollerCounters::default());
        let info =
            PollerInfo { id, name: name.to_owned(), period_ns: 0, counters: Arc::clone(&counters) };
        self.list_poller(info);
        counters
    }
}
