//! The handshake that lets a reactor sleep without losing a message.
//!
//! Sleeper: announce → full fence → look at everything once more → wait. Producer: publish → full fence → test →
//! wake. Either the producer sees the announcement or the sleeper sees the message; loom explores every order.
//! **Invariant:** the two fences below are a pair; neither may be weakened.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// One sleeper's flag.
#[derive(Debug)]
pub(crate) struct SleepFlag {
    sleeping: AtomicBool,
}

impl SleepFlag {
    pub(crate) fn new() -> SleepFlag {
        SleepFlag { sleeping: AtomicBool::new(false) }
    }

    /// Sleeper: from now on producers wake. Everything published before a producer's test is visible afterwards.
    pub(crate) fn announce(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        // Pairs with the fence in `must_wake`.
        fence(Ordering::SeqCst);
    }

    /// Sleeper: awake again.
    pub(super) fn clear(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// What the flag says now, for status output.
    pub(super) fn is_set(&self) -> bool {
        self.sleeping.load(Ordering::Relaxed)
    }

    /// Producer, after publishing: true when the sleeper has to be woken.
    pub(crate) fn must_wake(&self) -> bool {
        // Pairs with the fence in `announce`.
        fence(Ordering::SeqCst);
        self.sleeping.load(Ordering::Relaxed)
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p ringmill-core --lib --target-dir target/loom sleep`
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;

    #[test]
    fn no_message_is_slept_through() {
        loom::model(|| {
            let flag = Arc::new(SleepFlag::new());
            let mailbox = Arc::new(AtomicUsize::new(0));
            let event = Arc::new(AtomicUsize::new(0));
            let producer = {
                let (flag, mailbox, event) = (flag.clone(), mailbox.clone(), event.clone());
                thread::spawn(move || {
                    mailbox.store(1, Ordering::Relaxed);
                    if flag.must_wake() {
                        event.store(1, Ordering::Relaxed);
                    }
                })
            };
            flag.announce();
            let saw_message = mailbox.load(Ordering::Relaxed) == 1;
            producer.join().unwrap();
            // Had the sleeper not seen the message, it would be waiting for the event: which must then have come.
            assert!(saw_message || event.load(Ordering::Relaxed) == 1);
        });
    }
}
