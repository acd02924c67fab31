//! What one virtqueue counts: requests, bytes, errors and the stage times of every operation.
//!
//! Owner: allocated by a control thread, written by the queue's reactor, read by anybody.
//! **Invariant:** one writer; a number only grows, resets are done by readers who keep a baseline.
#![expect(unsafe_code)] // UNSAFETY: tables in a zeroed mapping, so that those of an idle queue cost no memory.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::LatencyTable;
use crate::io::IoOp;
use crate::mem::{Mapping, MappingError};

/// Kinds of operations.
const OPS: usize = IoOp::ALL.len();

/// The part of a request's life that a time belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stage {
    /// From the pass that first saw the request on the ring until it was handed to the device.
    Queue = 0,
    /// From there until the device's completion was seen.
    Device,
    /// From there until the guest could see it.
    Complete,
    /// All three.
    Total,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Stage; 4] = [Stage::Queue, Stage::Device, Stage::Complete, Stage::Total];

    /// The stage's name in statistics and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Queue => "queue",
            Stage::Device => "device",
            Stage::Complete => "complete",
            Stage::Total => "total",
        }
    }
}

/// The figures of one operation of one queue.
#[derive(Debug, Default)]
pub struct OpStats {
    ops_count: AtomicU64,
    bytes: AtomicU64,
    errors_count: AtomicU64,
    stages: [LatencyTable; 4],
}

/// The figures of one queue: about 100 KiB of address space, touched only for the operations that occur.
#[derive(Debug)]
pub struct QueueStats {
    ops: NonNull<[OpStats; OPS]>,
    _mapping: Mapping,
}

// SAFETY: the pointer leads to atomics in memory that the struct owns; nothing else is reached through it.
unsafe impl Send for QueueStats {}
// SAFETY: as for `Send`: shared access is to atomics only.
unsafe impl Sync for QueueStats {}

#[inline]
fn bump(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl OpStats {
    /// Counts finished requests of `bytes` together, all well or all failed.
    #[inline]
    pub fn count(&self, requests_count: u32, bytes: u64, ok: bool) {
        bump(&self.ops_count, u64::from(requests_count));
        if ok {
            bump(&self.bytes, bytes);
        } else {
            bump(&self.errors_count, u64::from(requests_count));
        }
    }

    /// The table of one stage.
    #[inline]
    #[must_use]
    pub fn stage(&self, stage: Stage) -> &LatencyTable {
        &self.stages[stage as usize]
    }

    /// Finished requests, failed ones included.
    #[must_use]
    pub fn ops_count(&self) -> u64 {
        self.ops_count.load(Ordering::Relaxed)
    }

    /// Bytes of successful requests.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Failed requests.
    #[must_use]
    pub fn errors_count(&self) -> u64 {
        self.errors_count.load(Ordering::Relaxed)
    }
}

impl QueueStats {
    /// Zeroed figures in a mapping of their own: a heap would touch every page to clear it.
    ///
    /// # Errors
    /// When the kernel gives no address space.
    #[cold]
    pub fn new_shared() -> Result<Arc<QueueStats>, MappingError> {
        let mapping = Mapping::anonymous(size_of::<[OpStats; OPS]>())?;
        Ok(Arc::new(QueueStats { ops: mapping.base().cast(), _mapping: mapping }))
    }

    /// The figures of one operation.
    #[inline]
    #[must_use]
    pub fn op(&self, op: IoOp) -> &OpStats {
        // SAFETY: `ops` is the page-aligned start of a mapping of this size, private and live as long as `self`. All its
        // bits were zero, which is the value 0 of every `AtomicU64` and `AtomicU32` in it.
        let ops: &[OpStats; OPS] = unsafe { self.ops.as_ref() };
        &ops[op as usize]
    }
}
