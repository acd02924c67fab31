//! When the next request is due, for loads with a fixed rate.
//!
//! A request counts from the moment at which it was due, not from the one at which a slot was free for it: a disk that
//! stalls is charged for the requests that had to wait meanwhile (no coordinated omission).

use ringmill_core::reactor::tick_rate;

/// Fractions of a tick that are kept, so that high rates are exact.
const FRACTION_BITS: u32 = 16;

/// A clock of due times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    origin_ticks: u64,
    /// 0: as fast as it goes.
    interval_q16: u64,
    next_q16: u64,
}

impl Pace {
    /// `rate` requests per second from `now_ticks` on.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an interval in 1/65536 ticks, positive and below 2^63 for rates that the options allow"
    )]
    pub(crate) fn new(rate: Option<f64>, now_ticks: u64) -> Pace {
        let scale = f64::from(1u32 << FRACTION_BITS);
        let interval = rate.map_or(0.0, |rate| (tick_rate() as f64 * scale / rate).max(1.0));
        Pace { origin_ticks: now_ticks, interval_q16: interval as u64, next_q16: 0 }
    }

    /// The time from which a request that starts now counts; `None` before it is due.
    #[inline]
    pub(crate) fn due(&self, now_ticks: u64) -> Option<u64> {
        if self.interval_q16 == 0 {
            return Some(now_ticks);
        }
        let due = self.origin_ticks + (self.next_q16 >> FRACTION_BITS);
        (due <= now_ticks).then_some(due)
    }

    /// The request that was due has been started.
    #[inline]
    pub(crate) fn took(&mut self) {
        self.next_q16 += self.interval_q16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_times_are_evenly_spaced_and_late_ones_stay_late() {
        let mut pace = Pace::new(Some(1000.0), 500);
        let period = tick_rate() / 1000;
        assert_eq!(pace.due(500), Some(500));
        pace.took();
        assert_eq!(pace.due(500 + period - 2), None);
        let due = pace.due(500 + 10 * period).unwrap();
        assert!(due.abs_diff(500 + period) <= 1);
        assert_eq!(Pace::new(None, 0).due(77), Some(77));
    }
}
