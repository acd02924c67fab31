//! Bounce buffers: aligned memory for data whose guest address or length a device cannot take.
//!
//! A reactor has a pool for all devices that the kernel or the processor fills. A device that moves data by itself has one of
//! its own per reactor, beside its queues: it reaches no buffer that holds data of another device's guests. Owner: one
//! reactor; no sharing. **Invariant:** whoever holds a buffer needs nothing else to finish with it, so a pool of one buffer
//! already guarantees progress.

use std::sync::Arc;

use super::{Mapping, MappingError, RegionId, Segment};
use crate::limits::{BOUNCE_BUFFERS, BOUNCE_BYTES};
use crate::units::{HostAddr, len_u32};

/// One taken buffer. Give it back with [`BouncePool::give_back`]; dropping it loses the buffer for good.
#[must_use]
#[derive(Debug)]
pub struct Bounce {
    number: u16,
    segment: Segment,
    /// The buffer outlives its pool, which goes with its device.
    mapping: Arc<Mapping>,
}

impl Bounce {
    /// The whole buffer, page aligned, [`BOUNCE_BYTES`] long.
    #[must_use]
    pub fn segment(&self) -> Segment {
        self.segment
    }
}

/// The pool. Its pages are touched (and counted) only when first used.
#[derive(Debug)]
pub struct BouncePool {
    mapping: Arc<Mapping>,
    first: HostAddr,
    count: u16,
    free: Vec<u16>,
}

impl BouncePool {
    /// A pool's length in bytes.
    pub const LEN_BYTES: usize = BOUNCE_BUFFERS * BOUNCE_BYTES;

    /// A pool of [`BOUNCE_BUFFERS`] buffers.
    ///
    /// # Errors
    /// When the kernel gives no memory.
    pub fn new() -> Result<BouncePool, MappingError> {
        let mapping = Arc::new(Mapping::pool(Self::LEN_BYTES)?);
        Ok(Self::within(&mapping, 0))
    }

    /// As many of them as there is room for behind the first `at_bytes` (whole pages) of a mapping, at most
    /// [`BOUNCE_BUFFERS`].
    #[must_use]
    pub fn within(mapping: &Arc<Mapping>, at_bytes: usize) -> BouncePool {
        let room = mapping.len_bytes().saturating_sub(at_bytes) / BOUNCE_BYTES;
        let count = u16::try_from(room.min(BOUNCE_BUFFERS)).unwrap_or(0);
        let first = HostAddr(mapping.base().as_ptr() as usize).advanced(at_bytes);
        BouncePool { mapping: Arc::clone(mapping), first, count, free: (0..count).rev().collect() }
    }

    /// Takes a buffer for a user who has `held` already; `None` while fewer are left than that, so that one user whose
    /// device never answers cannot take them all.
    pub fn take(&mut self, held: usize) -> Option<Bounce> {
        if held >= self.free.len() {
            return None;
        }
        let number = self.free.pop()?;
        let host = self.first.advanced(usize::from(number) * BOUNCE_BYTES);
        let segment = Segment::new(host, len_u32(BOUNCE_BYTES), RegionId::POOL);
        Some(Bounce { number, segment, mapping: Arc::clone(&self.mapping) })
    }

    /// Returns a buffer. One of another pool, which is gone then, is only dropped.
    pub fn give_back(&mut self, bounce: Bounce) {
        if Arc::ptr_eq(&bounce.mapping, &self.mapping) {
            debug_assert!(!self.free.contains(&bounce.number));
            self.free.push(bounce.number);
        }
    }

    /// Buffers not in use.
    #[must_use]
    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// Buffers in use.
    #[must_use]
    pub fn out_count(&self) -> usize {
        usize::from(self.count) - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_within_a_mapping_has_what_fits_behind_the_rest() {
        let mapping = Arc::new(Mapping::pool(8192 + 3 * BOUNCE_BYTES + 4096).unwrap());
        let mut pool = BouncePool::within(&mapping, 8192);
        let first = mapping.base().as_ptr() as usize + 8192;
        let taken: Vec<Bounce> = (0..3).map(|_| pool.take(0).unwrap()).collect();
        let hosts: Vec<usize> = taken.iter().map(|bounce| bounce.segment().host().0).collect();
        assert_eq!(hosts, [0, 1, 2].map(|number| first + number * BOUNCE_BYTES));
        assert!(pool.take(0).is_none() && pool.out_count() == 3);
        taken.into_iter().for_each(|bounce| pool.give_back(bounce));
        assert_eq!((pool.free_count(), pool.out_count()), (3, 0));
        assert_eq!(BouncePool::within(&mapping, mapping.len_bytes() + 1).free_count(), 0);
    }

    #[test]
    fn a_buffer_outlives_its_pool_and_no_other_pool_takes_it() {
        let mut pool = BouncePool::new().unwrap();
        let bounce = pool.take(0).unwrap();
        drop(pool);
        bounce.segment().write_from(&[7; 16]);
        let mut other = BouncePool::new().unwrap();
        other.give_back(bounce);
        assert_eq!(other.free_count(), BOUNCE_BUFFERS);
    }
}
