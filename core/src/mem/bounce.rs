//! A reactor's bounce buffers: aligned memory for data whose guest address or length a device cannot take.
//!
//! Owner: one reactor; no sharing. **Invariant:** whoever holds a buffer needs nothing else to finish with it, so a
//! pool of one buffer already guarantees progress.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{Mapping, MappingError, RegionId, Segment};
use crate::limits::{BOUNCE_BUFFERS, BOUNCE_BYTES};
use crate::units::{HostAddr, len_u32};

/// The memory of every pool of the process.
static POOLS: Mutex<Vec<Weak<Mapping>>> = Mutex::new(Vec::new());

/// The memory of all bounce buffers that there are now: what a device that moves data by itself must reach before a channel
/// to it is opened.
#[must_use]
#[cold]
pub fn bounce_memory() -> Vec<Arc<Mapping>> {
    let pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.iter().filter_map(Weak::upgrade).collect()
}

/// One taken buffer. Give it back with [`BouncePool::give_back`]; dropping it loses the buffer for good.
#[must_use]
#[derive(Debug)]
pub struct Bounce {
    number: u16,
    segment: Segment,
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
    free: Vec<u16>,
    /// Times a buffer was taken, for the "zero copies" proofs and the operator.
    taken_count: u64,
}

impl BouncePool {
    /// A pool of [`BOUNCE_BUFFERS`] buffers.
    ///
    /// # Errors
    /// When the kernel gives no memory.
    pub fn new() -> Result<BouncePool, MappingError> {
        let mapping = Arc::new(Mapping::pool(BOUNCE_BUFFERS * BOUNCE_BYTES)?);
        let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(&mapping));
        let count = u16::try_from(BOUNCE_BUFFERS).unwrap_or(u16::MAX);
        Ok(BouncePool { mapping, free: (0..count).rev().collect(), taken_count: 0 })
    }

    /// Takes a buffer for a user who has `held` already; `None` while fewer are left than that, so that one device that
    /// never answers cannot take them all.
    pub fn take(&mut self, held: usize) -> Option<Bounce> {
        if held >= self.free.len() {
            return None;
        }
        let number = self.free.pop()?;
        self.taken_count += 1;
        let host = HostAddr(self.mapping.base().as_ptr() as usize)
            .advanced(usize::from(number) * BOUNCE_BYTES);
        Some(Bounce { number, segment: Segment::new(host, len_u32(BOUNCE_BYTES), RegionId::POOL) })
    }

    /// Returns a buffer.
    pub fn give_back(&mut self, bounce: Bounce) {
        debug_assert!(!self.free.contains(&bounce.number));
        self.free.push(bounce.number);
    }

    /// Buffers not in use.
    #[must_use]
    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// Buffers taken since start.
    #[must_use]
    pub fn taken_count(&self) -> u64 {
        self.taken_count
    }
}
