//! Pollers that are left out of the passes because nothing happens to them.
//!
//! Flow: a poller finds nothing for its patience → it arms its notification and is parked → an event of its ring client,
//! or a message that names it, puts it back. Owner: the reactor. **Invariant:** a poller is in the reactor's list or
//! parked, never both and never neither; memory grows only while a message adds a poller.
//!
//! Hysteresis: a poller that comes back soon was parked too early, and waits twice as long the next time, so a guest
//! with one request now and then does not pay for a kick with each of them.

use crate::limits::{PARK_PATIENCE_LEAST_NS, PARK_PATIENCE_MOST_NS, PARK_REST_LONG_NS};

use super::pass::Entry;
use super::{ClientId, PollerId, Ring};

/// How long a poller finds nothing before it is parked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    patience_ns: u64,
    /// The last pass with work, or the time of the last vain try to park.
    busy_ns: u64,
    parked_ns: u64,
}

impl Patience {
    pub(super) fn new(now_ns: u64) -> Patience {
        Patience { patience_ns: PARK_PATIENCE_LEAST_NS, busy_ns: now_ns, parked_ns: now_ns }
    }

    /// Notes work, or a try that did not park.
    #[inline]
    pub(super) fn restart(&mut self, now_ns: u64) {
        self.busy_ns = now_ns;
    }

    /// True when it has found nothing for long enough.
    #[inline]
    pub(super) fn is_over(&self, now_ns: u64) -> bool {
        now_ns.wrapping_sub(self.busy_ns) >= self.patience_ns
    }

    fn park(&mut self, now_ns: u64) {
        self.parked_ns = now_ns;
    }

    /// It is polled again: was the rest worth its price?
    fn come_back(&mut self, now_ns: u64) {
        let rested_ns = now_ns.saturating_sub(self.parked_ns);
        if rested_ns < self.patience_ns {
            self.patience_ns = (2 * self.patience_ns).min(PARK_PATIENCE_MOST_NS);
        } else if rested_ns >= PARK_REST_LONG_NS {
            self.patience_ns = PARK_PATIENCE_LEAST_NS;
        }
        self.busy_ns = now_ns;
    }
}

struct Parked {
    entry: Entry,
    client: ClientId,
}

/// The parked pollers of a reactor.
#[derive(Default)]
pub(super) struct Parking {
    slots: Vec<Option<Parked>>,
    free: Vec<u32>,
}

impl Parking {
    /// Makes sure that so many more pollers can be parked without allocating.
    #[cold]
    pub(super) fn reserve(&mut self, pollers_count: usize) {
        while self.free.len() < pollers_count {
            let Ok(key) = u32::try_from(self.slots.len()) else { return };
            self.slots.push(None);
            self.free.push(key);
        }
    }

    /// Parks a poller until `client` has an event.
    ///
    /// # Errors
    /// Returns the poller when there is no place.
    #[cold]
    #[inline(never)]
    pub(super) fn park(
        &mut self,
        mut entry: Entry,
        client: ClientId,
        ring: &mut Ring,
        now_ns: u64,
    ) -> Result<(), Entry> {
        let Some(key) = self.free.pop() else { return Err(entry) };
        entry.patience.park(now_ns);
        entry.counters.set_parked(true);
        ring.wake_on_event(client, key);
        self.slots[key as usize] = Some(Parked { entry, client });
        Ok(())
    }

    /// Takes out the poller that an event has woken; `None` when it was taken out before.
    pub(super) fn take(&mut self, key: u32, ring: Option<&mut Ring>, now_ns: u64) -> Option<Entry> {
        let Parked { mut entry, client } = self.slots.get_mut(key as usize)?.take()?;
        self.free.push(key);
        if let Some(ring) = ring {
            ring.forget_wake(client);
        }
        entry.counters.set_parked(false);
        entry.patience.come_back(now_ns);
        Some(entry)
    }

    /// Where a poller is parked.
    #[cold]
    pub(super) fn find(&self, id: PollerId) -> Option<u32> {
        let at = self.slots.iter().position(|s| s.as_ref().is_some_and(|p| p.entry.id == id))?;
        u32::try_from(at).ok()
    }

    /// Every parked poller.
    #[cold]
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.slots.iter_mut().flatten().map(|parked| &mut parked.entry)
    }

    /// Takes all out, to be detached.
    #[cold]
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Entry> {
        self.slots.drain(..).flatten().map(|parked| parked.entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_back_soon_is_given_more_time_and_who_rests_long_less() {
        let least = PARK_PATIENCE_LEAST_NS;
        let mut patience = Patience::new(0);
        assert!(!patience.is_over(least - 1) && patience.is_over(least));
        let mut now = least;
        for doubled in [2 * least, 4 * least, 8 * least] {
            patience.park(now);
            now += 10;
            patience.come_back(now);
            assert!(!patience.is_over(now + doubled - 1) && patience.is_over(now + doubled));
            now += doubled;
        }
        // A rest that was longer than the wait before it, but not long: nothing changes.
        patience.park(now);
        now += 8 * least;
        patience.come_back(now);
        assert!(!patience.is_over(now + 8 * least - 1));
        for _ in 0..20 {
            patience.park(now);
            patience.come_back(now + 1);
        }
        assert!(
            !patience.is_over(now + PARK_PATIENCE_MOST_NS)
                && patience.is_over(now + 1 + PARK_PATIENCE_MOST_NS)
        );
        patience.park(now);
        now += PARK_REST_LONG_NS;
        patience.come_back(now);
        assert!(patience.is_over(now + least));
    }
}
