//! Fewer interrupts for a busy queue: delays them when the request rate is above a threshold.
//!
//! Owner: the queue's reactor; the settings are shared and may change at any time. **Invariant:** a delayed interrupt
//! is always sent: while one is due, the reactor does not sleep.

use std::sync::atomic::{AtomicU32, Ordering};

/// The rate is measured over windows of this length.
const WINDOW_NS: u64 = 10_000_000;
/// No interrupt waits longer than this.
const DELAY_MAX_NS: u64 = 10_000_000;

/// What the operator asked for; shared by all queues of a disk.
#[derive(Debug, Default)]
pub struct CoalesceSettings {
    delay_base_us: AtomicU32,
    iops_threshold: AtomicU32,
}

impl CoalesceSettings {
    /// Base delay in microseconds (0: off) and the rate of one queue above which it applies, requests per second.
    pub fn set(&self, delay_base_us: u32, iops_threshold: u32) {
        self.delay_base_us.store(delay_base_us, Ordering::Relaxed);
        self.iops_threshold.store(iops_threshold, Ordering::Relaxed);
    }

    /// What was set.
    #[must_use]
    pub fn get(&self) -> (u32, u32) {
        (self.delay_base_us.load(Ordering::Relaxed), self.iops_threshold.load(Ordering::Relaxed))
    }
}

/// One queue's state.
#[derive(Debug, Default)]
pub(super) struct Coalescer {
    window_start_ns: u64,
    window_count: u32,
    delay_ns: u64,
    not_before_ns: u64,
    due: bool,
}

impl Coalescer {
    /// Counts finished requests; ends a window when its time has come.
    #[inline]
    pub(super) fn count(&mut self, requests: u32, now_ns: u64, settings: &CoalesceSettings) {
        self.window_count = self.window_count.saturating_add(requests);
        if now_ns.saturating_sub(self.window_start_ns) >= WINDOW_NS {
            self.end_window(now_ns, settings);
        }
    }

    #[cold]
    #[inline(never)]
    fn end_window(&mut self, now_ns: u64, settings: &CoalesceSettings) {
        let (base_us, iops) = settings.get();
        let elapsed_ns = now_ns.saturating_sub(self.window_start_ns).max(1);
        let rate = u64::from(self.window_count).saturating_mul(1_000_000_000) / elapsed_ns;
        let threshold = u64::from(iops).max(1);
        // The delay grows with the rate: twice the threshold waits one base delay, three times two, and so on.
        let above = rate.saturating_sub(threshold);
        self.delay_ns =
            (u64::from(base_us) * 1000).saturating_mul(above).checked_div(threshold).unwrap_or(0);
        self.delay_ns = self.delay_ns.min(DELAY_MAX_NS);
        self.window_start_ns = now_ns;
        self.window_count = 0;
    }

    /// An interrupt is wanted: true when it is to be sent now, otherwise it is due later.
    #[inline]
    pub(super) fn want(&mut self, now_ns: u64) -> bool {
        if self.delay_ns > 0 && now_ns < self.not_before_ns {
            self.due = true;
            return false;
        }
        self.due = false;
        self.not_before_ns = now_ns + self.delay_ns;
        true
    }

    /// True when a delayed interrupt is to be sent now.
    #[inline]
    pub(super) fn take_due(&mut self, now_ns: u64) -> bool {
        self.due && self.want(now_ns)
    }

    /// True while an interrupt is delayed.
    pub(super) fn is_due(&self) -> bool {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_only_above_the_threshold_and_never_loses_one() {
        let settings = CoalesceSettings::default();
        let mut queue = Coalescer::default();
        settings.set(100, 1000);
        queue.count(10, WINDOW_NS, &settings);
        assert!(
            queue.want(WINDOW_NS) && queue.want(WINDOW_NS + 1),
            "1,000 per second is not above 1,000"
        );
        queue.count(30, 2 * WINDOW_NS, &settings);
        assert!(queue.want(2 * WINDOW_NS));
        assert!(!queue.want(2 * WINDOW_NS + 1) && queue.is_due());
        assert!(!queue.take_due(2 * WINDOW_NS + 199_999));
        assert!(queue.take_due(2 * WINDOW_NS + 200_000) && !queue.is_due());
    }
}
