//! Locks over spans of one disk, for devices whose block is larger than a guest's 512-byte sector.
//!
//! A sub-block write is read-modify-write: no other write of the same block may be in flight meanwhile, from whichever
//! reactor. Ordinary writes hold their spans shared, a read-modify-write holds one span alone. Nobody ever waits
//! inside: a refused try is repeated by the caller's next poll.
//! **Invariant:** whoever wants a span alone bars new shared holders, so a stream of writes cannot starve it. (Rejected:
//! locking nothing but the read-modify-writes themselves, which would undo a neighbouring full-block write.)

use std::sync::atomic::{AtomicU32, Ordering};

use crate::limits::{BLOCK_LOCK_BUCKETS, BLOCK_LOCK_SPAN_BYTES};
use crate::units::{bytes_u64, usize_of};

const ALONE: u32 = 1 << 31;
const WANTED: u32 = 1 << 30;
const COUNT: u32 = WANTED - 1;

/// The locks of one bdev, shared by its channels on all reactors.
#[derive(Debug)]
pub struct BlockLocks {
    buckets: [AtomicU32; BLOCK_LOCK_BUCKETS],
}

impl Default for BlockLocks {
    fn default() -> Self {
        BlockLocks { buckets: [const { AtomicU32::new(0) }; BLOCK_LOCK_BUCKETS] }
    }
}

/// The buckets of a byte range, each once.
fn buckets_of(offset_bytes: u64, len_bytes: u64) -> impl DoubleEndedIterator<Item = usize> + Clone {
    let first = offset_bytes / BLOCK_LOCK_SPAN_BYTES;
    let last = offset_bytes.saturating_add(len_bytes.max(1) - 1) / BLOCK_LOCK_SPAN_BYTES;
    let count = (last - first + 1).min(bytes_u64(BLOCK_LOCK_BUCKETS));
    (0..count).map(move |i| usize_of((first + i) % bytes_u64(BLOCK_LOCK_BUCKETS)))
}

impl BlockLocks {
    /// Tries to hold a range together with other writers.
    #[inline]
    #[must_use]
    pub fn try_shared(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        for (held, bucket) in buckets_of(offset_bytes, len_bytes).enumerate() {
            let before = self.buckets[bucket].fetch_add(1, Ordering::Acquire);
            if before & (ALONE | WANTED) != 0 {
                for back in buckets_of(offset_bytes, len_bytes).take(held + 1) {
                    self.buckets[back].fetch_sub(1, Ordering::Release);
                }
                return false;
            }
        }
        true
    }

    /// Ends a shared hold of exactly this range.
    #[inline]
    pub fn release_shared(&self, offset_bytes: u64, len_bytes: u64) {
        for bucket in buckets_of(offset_bytes, len_bytes) {
            self.buckets[bucket].fetch_sub(1, Ordering::Release);
        }
    }

    /// Tries to hold the span of one block alone; a refusal bars new shared holders until somebody got it.
    #[must_use]
    pub fn try_alone(&self, offset_bytes: u64) -> bool {
        let Some(bucket) = buckets_of(offset_bytes, 1).next() else { return false };
        let cell = &self.buckets[bucket];
        let mut now = cell.load(Ordering::Relaxed);
        loop {
            if now & ALONE != 0 {
                return false;
            }
            let free = now & COUNT == 0;
            let next = if free { (now & COUNT) | ALONE } else { now | WANTED };
            match cell.compare_exchange_weak(now, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return free,
                Err(seen) => now = seen,
            }
        }
    }

    /// Ends a hold made by [`BlockLocks::try_alone`].
    pub fn release_alone(&self, offset_bytes: u64) {
        if let Some(bucket) = buckets_of(offset_bytes, 1).next() {
            // A refused `try_shared` may have its count in here for a moment, so only the bit is taken out.
            self.buckets[bucket].fetch_and(!ALONE, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_excludes_everybody_and_is_not_starved() {
        let locks = BlockLocks::default();
        assert!(locks.try_shared(0, 4096));
        assert!(!locks.try_alone(0));
        assert!(!locks.try_shared(8192, 4096), "a waiting exclusive holder bars new ones");
        assert!(locks.try_shared(BLOCK_LOCK_SPAN_BYTES, 1));
        locks.release_shared(0, 4096);
        assert!(locks.try_alone(0));
        assert!(!locks.try_alone(512) && !locks.try_shared(0, 1));
        locks.release_alone(0);
        assert!(locks.try_shared(0, 1));
    }

    #[test]
    fn a_range_larger_than_all_buckets_takes_each_once() {
        let locks = BlockLocks::default();
        assert!(locks.try_shared(5, u64::MAX - 10));
        locks.release_shared(5, u64::MAX - 10);
        assert!(locks.buckets.iter().all(|b| b.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn a_refused_range_leaves_nothing_behind() {
        let locks = BlockLocks::default();
        assert!(locks.try_alone(3 * BLOCK_LOCK_SPAN_BYTES));
        assert!(!locks.try_shared(0, 5 * BLOCK_LOCK_SPAN_BYTES));
        locks.release_alone(3 * BLOCK_LOCK_SPAN_BYTES);
        assert!(locks.buckets.iter().all(|b| b.load(Ordering::Relaxed) == 0));
    }
}
