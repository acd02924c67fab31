//! Which pollers a reactor has: they come, go and are reached by messages.
//!
//! Owner: the reactor; the handle's methods run on control threads. **Invariant:** a poller that is reached is not
//! parked, as it may have got work.

use std::any::Any;
use std::sync::Arc;

use super::parking::Patience;
use super::pass::{Entry, Timed};
use super::{Poller, PollerCounters, PollerId, PollerInfo, Reactor, ReactorCx, ReactorHandle};

impl Reactor {
    #[cold]
    pub(super) fn detach_all(&mut self) {
        let timed = self.timed.drain(..).map(|t| t.entry);
        for mut entry in self.pollers.drain(..).chain(self.parking.drain()).chain(timed) {
            entry.poller.detach(&mut self.cx);
        }
    }

    #[cold]
    fn take_in(
        &mut self,
        id: PollerId,
        mut poller: Box<dyn Poller>,
        counters: Arc<PollerCounters>,
    ) -> Entry {
        poller.attach(&mut self.cx);
        self.last_work_ns = self.cx.pass_ns;
        Entry { id, poller, counters, patience: Patience::new(self.cx.pass_ns) }
    }

    #[cold]
    pub(super) fn admit(
        &mut self,
        id: PollerId,
        poller: Box<dyn Poller>,
        counters: Arc<PollerCounters>,
        period_ns: u64,
    ) {
        let entry = self.take_in(id, poller, counters);
        if period_ns == 0 {
            self.pollers.push(entry);
            self.parking.reserve(self.pollers.len());
        } else {
            let due_ns = self.cx.pass_ns + period_ns;
            self.timed.push(Timed { entry, period_ns, due_ns });
        }
    }

    /// Where a poller of every pass is; one that is parked comes back first, as a message may give it work.
    #[cold]
    fn position(&mut self, id: PollerId) -> Option<usize> {
        if let Some(at) = self.pollers.iter().position(|e| e.id == id) {
            return Some(at);
        }
        let key = self.parking.find(id)?;
        self.unpark(key);
        self.pollers.len().checked_sub(1)
    }

    /// The poller of this id as its own type, with the context; `None` when it is not here (any more).
    pub fn with_poller<P: Poller, T>(
        &mut self,
        id: PollerId,
        f: impl FnOnce(&mut P, &mut ReactorCx) -> T,
    ) -> Option<T> {
        let at = self.position(id)?;
        let poller: &mut dyn Any = self.pollers[at].poller.as_mut();
        Some(f(poller.downcast_mut::<P>()?, &mut self.cx))
    }

    /// The poller of this id behind its trait.
    pub fn with_dyn_poller<T>(
        &mut self,
        id: PollerId,
        f: impl FnOnce(&mut dyn Poller, &mut ReactorCx) -> T,
    ) -> Option<T> {
        let at = self.position(id)?;
        Some(f(self.pollers[at].poller.as_mut(), &mut self.cx))
    }

    /// Detaches a poller and returns it, to be dropped by a control thread.
    #[cold]
    pub fn remove_poller(&mut self, id: PollerId) -> Option<Box<dyn Poller>> {
        let mut entry = match self.position(id) {
            Some(at) => self.pollers.swap_remove(at),
            None => {
                let at = self.timed.iter().position(|t| t.entry.id == id)?;
                self.timed.swap_remove(at).entry
            }
        };
        entry.poller.detach(&mut self.cx);
        Some(entry.poller)
    }
}

impl ReactorHandle {
    /// Moves a poller to the reactor; it is polled in every pass from then on, or every `period_ns` when that is not 0.
    ///
    /// # Errors
    /// False when the reactor does not answer.
    #[cold]
    #[must_use]
    pub fn add_poller(
        &self,
        id: PollerId,
        name: &str,
        period_ns: u64,
        poller: Box<dyn Poller>,
    ) -> bool {
        let counters = Arc::new(PollerCounters::default());
        let info =
            PollerInfo { id, name: name.to_owned(), period_ns, counters: Arc::clone(&counters) };
        self.list_poller(info);
        let sent =
            self.send(Box::new(move |reactor| reactor.admit(id, poller, counters, period_ns)));
        if sent.is_err() {
            self.unlist_poller(id);
        }
        sent.is_ok()
    }

    /// Takes a poller that a message removed off the list of pollers.
    #[cold]
    pub fn forget_poller(&self, id: PollerId) {
        self.unlist_poller(id);
    }

    /// Takes a poller off the reactor and drops it on the calling thread; false when it is not there.
    #[cold]
    pub fn remove_poller(&self, id: PollerId) -> bool {
        self.unlist_poller(id);
        self.ask(move |reactor| reactor.remove_poller(id)).flatten().is_some()
    }
}
