//! Lockless rings between reactors, for bdevs whose device has fewer queues than there are reactors.
//!
//! Flow: [`CrossBdev`] wraps a bdev and names an owner for each of its device queues. A channel on the owner's reactor
//! is the bdev's own. On any other reactor it is a pair of rings to the owner's port, a poller that feeds the one real
//! channel. Everything below, alignment, bounce buffers and block locks included, runs on the owner: they belong to the
//! reactor whose ring and memory pools do the work, and a read-modify-write holds its lock for the device's time only.
//! **Invariant:** peers that are awake make no system call for each other; one that sleeps is woken by the handshake of
//! `reactor::sleep`.

mod bdev;
mod channel;
mod port;
mod spsc;
#[cfg(all(test, not(loom)))]
mod tests;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bdev::BdevError;

pub use bdev::CrossBdev;

/// What a port counts: written by its owner, read by anybody.
#[derive(Debug, Default)]
#[repr(align(128))]
struct PortCounters {
    requests: AtomicU64,
    batches: AtomicU64,
    /// Why the owner could not open its channel.
    failure: OnceLock<String>,
}

impl PortCounters {
    #[inline]
    fn note_batch(&self, requests_count: usize) {
        let add = |cell: &AtomicU64, by: u64| {
            cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
        };
        add(&self.requests, crate::units::bytes_u64(requests_count));
        add(&self.batches, 1);
    }

    #[cold]
    fn set_failure(&self, error: &BdevError) {
        tracing::error!("requests of other reactors will fail: {error}");
        // Once per port.
        let _ = self.failure.set(error.to_string());
    }
}
