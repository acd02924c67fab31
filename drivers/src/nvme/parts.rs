//! What a queue pair and the channels on it are made of.
//!
//! Flow: the controller's side fills these in at attach → [`QueuePairParts`] become a queue pair, a [`NamespaceShape`] goes to
//! every channel. Owner: control threads. **Invariant:** whoever gave the device these addresses keeps the
//! [`QueueMemory`] until the device provably uses them no longer.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use ringmill_core::bdev::BdevInfo;
use ringmill_core::limits::{NVME_QUEUE_ENTRIES_MAX, NVME_QUEUE_ENTRIES_MIN};
use ringmill_core::mem::{
    BouncePool, DmaDomain, DmaError, DmaMap, IovaOffset, Mapping, MappingError, SharedSlice,
};
use ringmill_core::reactor::DeviceKey;
use ringmill_core::spec::nvme::{CQE_BYTES, SQE_BYTES};
use ringmill_core::units::{HostAddr, Iova, bytes_u64};
use thiserror::Error;

use super::shared::QueueShared;
use crate::pci::PciError;

/// Bytes of a device's memory page (CC.MPS = 0).
pub(super) const PAGE_BYTES: usize = 4096;

/// Why there is no memory for a queue pair.
#[derive(Debug, Error)]
pub enum QueueMemoryError {
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MappingError),
    /// The device cannot reach it.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// Doorbells outside of their pages.
    #[error("the doorbells of a queue pair lie outside of their pages")]
    Window,
    /// An impossible size.
    #[error(
        "a queue of {entries} entries: use {NVME_QUEUE_ENTRIES_MIN} to {NVME_QUEUE_ENTRIES_MAX}"
    )]
    Entries {
        /// The size asked for.
        entries: u16,
    },
}

/// The memory of one queue pair, reachable for the device: submission ring, completion ring, a page per command for lists
/// (PRP entries, SGL descriptors, ranges), and bounce buffers.
#[derive(Debug)]
pub struct QueueMemory {
    map: DmaMap,
    offset: IovaOffset,
    base: Iova,
    entries: u16,
}

const fn pages(len_bytes: usize) -> usize {
    len_bytes.next_multiple_of(PAGE_BYTES)
}

impl QueueMemory {
    /// Zeroed memory for rings of `entries` each. Blocks while it is pinned.
    ///
    /// # Errors
    /// No memory, or none that the device reaches.
    pub fn new(domain: &Arc<dyn DmaDomain>, entries: u16) -> Result<QueueMemory, QueueMemoryError> {
        if !(NVME_QUEUE_ENTRIES_MIN..=NVME_QUEUE_ENTRIES_MAX).contains(&entries) {
            return Err(QueueMemoryError::Entries { entries });
        }
        let len_bytes = Self::bounces_at(entries) + BouncePool::LEN_BYTES;
        let mapping = Arc::new(Mapping::pool(len_bytes)?);
        let offset = domain.offset();
        let base = offset.iova(HostAddr(mapping.base().as_ptr() as usize));
        Ok(QueueMemory { map: DmaMap::new(domain, &mapping)?, offset, base, entries })
    }

    const fn lists_at(entries: u16) -> usize {
        pages(entries as usize * SQE_BYTES) + pages(entries as usize * CQE_BYTES)
    }

    const fn bounces_at(entries: u16) -> usize {
        Self::lists_at(entries) + (entries as usize - 1) * PAGE_BYTES
    }

    /// Its bounce buffers: for the pair, once.
    pub(super) fn bounces(&self) -> BouncePool {
        BouncePool::within(self.map.mapping(), Self::bounces_at(self.entries))
    }

    /// Submission ring, completion ring, lists.
    pub(super) fn windows(&self) -> Option<(SharedSlice, SharedSlice, SharedSlice)> {
        let mapping = self.map.mapping();
        let (sq_bytes, cq_bytes) =
            (usize::from(self.entries) * SQE_BYTES, usize::from(self.entries) * CQE_BYTES);
        let lists_at = Self::lists_at(self.entries);
        let lists_bytes = (usize::from(self.entries) - 1) * PAGE_BYTES;
        Some((
            SharedSlice::new(mapping, 0, sq_bytes, PAGE_BYTES)?,
            SharedSlice::new(mapping, pages(sq_bytes), cq_bytes, PAGE_BYTES)?,
            SharedSlice::new(mapping, lists_at, lists_bytes, PAGE_BYTES)?,
        ))
    }

    /// How host addresses become the device's, whole pages apart.
    pub(super) fn offset(&self) -> IovaOffset {
        self.offset
    }

    /// Entries of each ring.
    #[must_use]
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Where the device finds the submission ring.
    #[must_use]
    pub fn sq_iova(&self) -> Iova {
        self.base
    }

    /// Where it finds the completion ring.
    #[must_use]
    pub fn cq_iova(&self) -> Iova {
        Iova(self.base.0 + bytes_u64(pages(usize::from(self.entries) * SQE_BYTES)))
    }
}

/// Connects the pair's vector with an eventfd, or with nobody; does not block.
pub type BindVector = Arc<dyn Fn(Option<BorrowedFd<'_>>) -> Result<(), PciError> + Send + Sync>;

/// How a pair's reactor can sleep while commands are out.
#[derive(Clone)]
pub enum Interrupts {
    /// It cannot.
    None,
    /// By a vector of the pair's own, bound to this eventfd (non-blocking) for the length of a sleep.
    Own {
        /// Binds it.
        bind: BindVector,
        /// What the vector signals.
        eventfd: Arc<OwnedFd>,
    },
    /// The controller's thread gets them and wakes the reactors of pairs that want it ([`QueueShared::wants_wake`]).
    Thread,
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Interrupts::None => "None",
            Interrupts::Own { .. } => "Own",
            Interrupts::Thread => "Thread",
        })
    }
}

/// Doorbells in memory (Base 2.0 §B.5): the pages given to the device by Doorbell Buffer Config, shared by all pairs. The pair
/// zeroes its own words when it is told that the device is disabled.
#[derive(Clone, Debug)]
pub struct ShadowDoorbells {
    /// Written by us.
    pub doorbells: Arc<Mapping>,
    /// Written by the device: up to where it needs no register write.
    pub event_indices: Arc<Mapping>,
    /// This pair's word for its submission queue, in both, bytes.
    pub sq_at_bytes: usize,
    /// For its completion queue.
    pub cq_at_bytes: usize,
}

/// What a queue pair is made of. The pair starts under the order that `shared` has, with empty rings.
#[derive(Debug)]
pub struct QueuePairParts<R> {
    /// The controller, the same for all its pairs.
    pub key: DeviceKey,
    /// The id of both its queues.
    pub queue_id: u16,
    /// Rings and list pages.
    pub memory: Arc<QueueMemory>,
    /// The window that the doorbells lie in.
    pub registers: Arc<R>,
    /// The submission queue's tail doorbell in it, bytes.
    pub sq_doorbell_bytes: usize,
    /// The completion queue's head doorbell.
    pub cq_doorbell_bytes: usize,
    /// Doorbells in memory, where the controller has been told about them.
    pub shadow: Option<ShadowDoorbells>,
    /// For sleeping.
    pub interrupts: Interrupts,
    /// The words that it shares with the thread.
    pub shared: Arc<QueueShared>,
    /// After this long a command is reported as overdue, nanoseconds; 0: never.
    pub timeout_ns: u64,
}

/// Bounds of dataset management (NVM Command Set 1.0 §3.2.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Ranges per command (DMRL), 1 to 256.
    pub ranges_max: u16,
    /// Blocks per range (DMRSL), at least 1.
    pub range_blocks_max: u32,
    /// Blocks per command (DMSL), at least 1.
    pub blocks_max: u64,
}

/// Bounds of write zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteZeroesLimits {
    /// Blocks per command, 1 to 65,536.
    pub blocks_max: u32,
    /// It may deallocate, and deallocated blocks read as zeroes.
    pub deallocate: bool,
}

/// What commands to one namespace must look like.
#[derive(Clone, Debug)]
pub struct NamespaceShape {
    /// Its bdev: size, read-only.
    pub info: Arc<BdevInfo>,
    /// Its id.
    pub nsid: u32,
    /// Blocks are 2^n bytes, 9 to 16.
    pub block_shift: u32,
    /// Data of one command (MDTS), bytes: whole pages, at least one.
    pub transfer_bytes_max: u32,
    /// Commands should not cross multiples of this (NOIOB), bytes; 0: no such boundary.
    pub boundary_bytes: u32,
    /// The controller takes SGLs for data, at addresses that are multiples of 4.
    pub sgl: bool,
    /// There is a volatile write cache: FUA and FLUSH mean something.
    pub write_cache: bool,
    /// Dataset management; `None`: not supported.
    pub discard: Option<DiscardLimits>,
    /// Write zeroes; `None`: not supported.
    pub write_zeroes: Option<WriteZeroesLimits>,
}
