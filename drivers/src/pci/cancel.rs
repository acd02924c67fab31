//! Having enough of a device that is being brought up: because it takes too long, or because somebody says so.
//!
//! Flow: whoever starts the attempt keeps a token and gives one along; what waits for the device looks at it. Owner: shared.
//! **Invariant:** an attempt ends in one way only: done, cancelled, or late. Who finishes it hears of the other two.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// How often a wait looks at its token.
const LOOK_EVERY: Duration = Duration::from_millis(50);

const RUNNING: u8 = 0;
const DONE: u8 = 1;
const CANCELLED: u8 = 2;
const LATE: u8 = 3;

/// Why an attempt is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Somebody said so.
    Cancelled,
    /// All of it took longer than it may.
    Late,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct CancelToken(Arc<Attempt>);

#[derive(Debug)]
struct Attempt {
    state: AtomicU8,
    deadline: Option<Instant>,
}

impl Default for CancelToken {
    fn default() -> CancelToken {
        CancelToken::new(None)
    }
}

impl CancelToken {
    /// For an attempt that begins now and may go on for that long; `None`: its waits are bounded, and that is enough.
    #[must_use]
    pub fn new(within: Option<Duration>) -> CancelToken {
        let deadline = within.map(|within| Instant::now() + within);
        CancelToken(Arc::new(Attempt { state: AtomicU8::new(RUNNING), deadline }))
    }

    /// True for whoever ends the attempt that way.
    fn end(&self, how: u8) -> bool {
        let change =
            self.0.state.compare_exchange(RUNNING, how, Ordering::AcqRel, Ordering::Acquire);
        change.is_ok()
    }

    /// Ends the attempt; false when it is over already.
    pub fn cancel(&self) -> bool {
        self.end(CANCELLED)
    }

    /// The device is up; false when nobody wants it any more.
    pub fn finish(&self) -> bool {
        self.ended().is_none() && self.end(DONE)
    }

    /// Why to give up; `None` while it goes on, and after it was finished.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        if self.0.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.end(LATE);
        }
        match self.0.state.load(Ordering::Acquire) {
            CANCELLED => Some(Ended::Cancelled),
            LATE => Some(Ended::Late),
            _ => None,
        }
    }

    /// How long a wait may last before it looks again.
    #[must_use]
    pub(crate) fn slice(&self, left: Duration) -> Duration {
        match self.0.state.load(Ordering::Acquire) {
            RUNNING => left.min(LOOK_EVERY),
            _ => left,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_ends_in_one_way() {
        let token = CancelToken::default();
        assert!(token.ended().is_none() && token.clone().finish());
        assert!(!token.cancel() && !token.finish() && token.ended().is_none());

        let token = CancelToken::new(Some(Duration::from_secs(3600)));
        assert!(token.clone().cancel() && !token.cancel() && !token.finish());
        assert_eq!(token.ended(), Some(Ended::Cancelled));

        let token = CancelToken::new(Some(Duration::ZERO));
        assert!(!token.finish() && !token.cancel());
        assert_eq!(token.ended(), Some(Ended::Late));
    }

    #[test]
    fn an_attempt_that_is_done_is_never_late() {
        let token = CancelToken::new(Some(Duration::from_secs(1)));
        assert!(token.finish());
        std::thread::sleep(Duration::from_millis(1050));
        assert_eq!(token.ended(), None);
    }
}
