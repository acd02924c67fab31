//! What devices reach of this process's memory, and at which addresses.
//!
//! Flow: a control thread maps a [`Mapping`] into a [`DmaDomain`] (an IOMMU, or a device in another process) → requests
//! carry segments of it → a driver turns a segment's host address into an [`Iova`] by one addition. Owner: control
//! threads; the [`DmaMap`] of a guest's region lives as long as the region.
//! **Invariant:** all memory that segments can name lies in one arena of the address space, so host address and IOVA differ
//! by one constant per domain. Memory that was not mapped is unreachable for the device: its access fails at the IOMMU, it
//! never lands elsewhere.

use std::fmt;
use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::Mapping;
use crate::units::{HostAddr, Iova};

/// The difference between host addresses and IOVAs of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct IovaOffset(pub u64);

impl IovaOffset {
    /// Where the device finds what lies at `host`.
    #[inline]
    #[must_use]
    pub const fn iova(self, host: HostAddr) -> Iova {
        Iova((host.0 as u64).wrapping_add(self.0))
    }
}

/// Why a device cannot reach memory.
#[derive(Debug, Error)]
pub enum DmaError {
    /// RLIMIT_MEMLOCK, or memory itself, does not suffice.
    #[error(
        "{need_bytes} bytes cannot be locked in memory for {device}: RLIMIT_MEMLOCK is {limit}; raise it \
         (LimitMEMLOCK= in the unit, `ulimit -l`, or the capability CAP_IPC_LOCK)"
    )]
    Memlock {
        /// The device.
        device: String,
        /// Bytes that must be locked in all.
        need_bytes: u64,
        /// The limit in words.
        limit: String,
    },
    /// The IOMMU cannot name addresses as high.
    #[error(
        "{device} cannot reach memory at {iova:#x}: its IOMMU goes up to {last:#x}; serve fewer or smaller guests with it"
    )]
    Range {
        /// The device.
        device: String,
        /// Where the memory would be.
        iova: u64,
        /// The last address that it has.
        last: u64,
    },
    /// The memory has no file descriptor that another process could map.
    #[error("{device} is in another process, and this memory cannot be shared with it")]
    NoFile {
        /// The device.
        device: String,
    },
    /// The device was closed.
    #[error("{device} is gone")]
    Gone {
        /// The device.
        device: String,
    },
    /// The kernel, or the device's process, refuses otherwise.
    #[error("{device} cannot be given {len_bytes} bytes of memory: {source}")]
    Refused {
        /// The device.
        device: String,
        /// The length.
        len_bytes: usize,
        /// Why.
        source: io::Error,
    },
}

/// What a device reaches. Implementations are for control threads: both calls may take seconds.
pub trait DmaDomain: Send + Sync + fmt::Debug {
    /// Makes the whole pages of `mapping` reachable at [`DmaDomain::offset`]. The caller unmaps exactly what it mapped.
    ///
    /// # Errors
    /// [`DmaError`]; nothing is reachable then that was not before.
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError>;

    /// Ends that. The caller knows that no request of the device touches this memory. A domain that was closed meanwhile
    /// has ended it already.
    fn unmap(&self, mapping: &Arc<Mapping>);

    /// Host address to IOVA, the same for all memory and for the domain's whole life.
    fn offset(&self) -> IovaOffset;
}

/// Memory that a device reaches until this is dropped (on a control thread).
#[derive(Debug)]
pub struct DmaMap {
    domain: Arc<dyn DmaDomain>,
    mapping: Arc<Mapping>,
}

impl DmaMap {
    /// Maps it. Blocks while pages are pinned.
    ///
    /// # Errors
    /// As for [`DmaDomain::map`].
    pub fn new(domain: &Arc<dyn DmaDomain>, mapping: &Arc<Mapping>) -> Result<DmaMap, DmaError> {
        domain.map(mapping)?;
        Ok(DmaMap { domain: Arc::clone(domain), mapping: Arc::clone(mapping) })
    }

    /// The memory.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

impl Drop for DmaMap {
    fn drop(&mut self) {
        self.domain.unmap(&self.mapping);
    }
}
