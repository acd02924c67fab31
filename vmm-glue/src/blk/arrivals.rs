//! HOT PATH
//! When the entries that wait on a ring were first seen, so that waiting for room counts as queue time.
//!
//! Owner: one queue's worker. **Invariant:** entries are seen, taken and put back in ring order; memory is bounded: when
//! too many groups wait, later ones share the time of an earlier one.
//!
//! note(available) → groups of (count, time) → take: the first group's time

use arrayvec::ArrayVec;

/// Groups remembered.
const ARRIVALS_MAX: usize = 8;

/// Entries that became visible together.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    count: u16,
    seen_ns: u64,
}

/// The groups that wait, oldest first.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    groups: ArrayVec<Arrival, ARRIVALS_MAX>,
}

impl Arrivals {
    /// When the next entry was first seen; counts it as taken.
    #[inline]
    pub(super) fn take(&mut self, now_ns: u64) -> u64 {
        let Some(first) = self.groups.first_mut() else { return now_ns };
        first.count -= 1;
        let seen_ns = first.seen_ns;
        if first.count == 0 {
            self.groups.remove(0);
        }
        seen_ns
    }

    /// Notes how many entries are on the ring.
    #[inline]
    pub(super) fn note(&mut self, available: u16, now_ns: u64) {
        let known: u16 = self.groups.iter().map(|a| a.count).sum();
        let count = available.saturating_sub(known);
        if count == 0 {
            return;
        }
        if self.groups.is_full() {
            if let Some(last) = self.groups.last_mut() {
                last.count += count;
            }
        } else {
            self.groups.push(Arrival { count, seen_ns: now_ns });
        }
    }

    /// The entry taken last goes back to the ring and keeps the time at which it was seen.
    #[cold]
    pub(super) fn put_back(&mut self, seen_ns: u64) {
        let full = self.groups.is_full();
        match self.groups.first_mut() {
            Some(first) if full || first.seen_ns == seen_ns => first.count += 1,
            _ => self.groups.insert(0, Arrival { count: 1, seen_ns }),
        }
    }

    /// Forgets everything.
    #[cold]
    pub(super) fn clear(&mut self) {
        self.groups.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_the_time_of_their_first_sight() {
        let mut arrivals = Arrivals::default();
        arrivals.note(2, 10);
        arrivals.note(3, 20);
        assert_eq!(arrivals.take(99), 10);
        let second = arrivals.take(99);
        assert_eq!(second, 10);
        arrivals.put_back(second);
        arrivals.note(2, 30);
        assert_eq!((arrivals.take(99), arrivals.take(99), arrivals.take(99)), (10, 20, 99));
    }

    #[test]
    fn a_crowd_shares_times_and_loses_nobody() {
        let mut arrivals = Arrivals::default();
        for at in 1..=100u16 {
            arrivals.note(at, u64::from(at));
        }
        let times: Vec<u64> = (0..100).map(|_| arrivals.take(999)).collect();
        assert!(times.is_sorted() && times.iter().all(|&t| t <= 100));
        assert_eq!(arrivals.take(999), 999);
    }
}
