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

use super::{Mapping, MemTable, Region};
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

    /// The same, and `wanted` is asked as often as the domain can stop: before it begins, and between pieces where it maps in
    /// pieces. False when it said no; nothing is reachable then that was not before.
    ///
    /// # Errors
    /// As for [`DmaDomain::map`].
    fn map_while(
        &self,
        mapping: &Arc<Mapping>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool, DmaError> {
        if !wanted() {
            return Ok(false);
        }
        self.map(mapping).map(|()| true)
    }

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

    /// The same while `wanted` says so; `None` when it said no.
    ///
    /// # Errors
    /// As for [`DmaDomain::map`].
    pub fn new_while(
        domain: &Arc<dyn DmaDomain>,
        mapping: &Arc<Mapping>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Option<DmaMap>, DmaError> {
        let is_mapped = domain.map_while(mapping, wanted)?;
        Ok(is_mapped.then(|| DmaMap { domain: Arc::clone(domain), mapping: Arc::clone(mapping) }))
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

/// What devices reach of a guest's memory. For control threads.
impl MemTable {
    /// True when a device reaches some of it: then this memory is pinned.
    #[must_use]
    pub fn has_dma(&self) -> bool {
        self.regions.iter().any(|region| region.dma.is_some())
    }

    /// True when a device does not reach some of it.
    #[must_use]
    pub fn lacks_dma(&self) -> bool {
        self.regions.iter().any(|region| region.dma.is_none())
    }

    fn dma_of(&self, mapping: &Arc<Mapping>) -> Option<&Arc<DmaMap>> {
        let same = |region: &&Region| Arc::ptr_eq(region.mapping(), mapping);
        self.regions.iter().filter(same).find_map(Region::dma)
    }

    /// Shares what a device reaches of regions that `other` has, too.
    pub fn share_dma(&mut self, other: &MemTable) {
        for region in &mut self.regions {
            if region.dma.is_none() {
                region.dma = other.dma_of(region.mapping()).cloned();
            }
        }
    }

    /// Makes the rest of it reachable in `domain`. Blocks while pages are pinned, seconds for a large guest; `wanted` is asked
    /// before each region and, by [`DmaDomain::map_while`], within it. False when it said no. In that case and after an error, what was mapped here ends with the table.
    ///
    /// # Errors
    /// As for [`DmaDomain::map`].
    pub fn map_into(
        &mut self,
        domain: &Arc<dyn DmaDomain>,
        wanted: impl Fn() -> bool,
    ) -> Result<bool, DmaError> {
        for at in 0..self.regions.len() {
            let region = &self.regions[at];
            if region.dma.is_some() {
                continue;
            }
            // Two regions of one mapping are one piece of memory for the device.
            let map = match self.dma_of(region.mapping()) {
                Some(map) => Arc::clone(map),
                None => match DmaMap::new_while(domain, region.mapping(), &wanted) {
                    Ok(Some(map)) => Arc::new(map),
                    Ok(None) => return Ok(false),
                    Err(error) => return Err(self.and_the_rest(at, error)),
                },
            };
            self.regions[at].dma = Some(map);
        }
        Ok(true)
    }

    /// What must be locked in all is what this region and those after it need.
    #[cold]
    fn and_the_rest(&self, at: usize, mut error: DmaError) -> DmaError {
        if let DmaError::Memlock { need_bytes, .. } = &mut error {
            let mut named = vec![self.regions[at].mapping()];
            for region in self.regions[at..].iter().filter(|region| region.dma.is_none()) {
                let mapping = region.mapping();
                if !named.iter().any(|known| Arc::ptr_eq(known, mapping)) {
                    *need_bytes = need_bytes.saturating_add(mapping.pages().1 as u64);
                    named.push(mapping);
                }
            }
        }
        error
    }

    /// The same memory, and no device reaches it by this table.
    #[must_use]
    pub fn without_dma(&self) -> MemTable {
        let mut table = self.clone();
        table.regions.iter_mut().for_each(|region| region.dma = None);
        table
    }

    /// True when some memory is reached by this table and not by `other`: dropping this one may take long.
    #[must_use]
    pub fn has_dma_beyond(&self, other: &MemTable) -> bool {
        let only_here =
            |region: &Region| region.dma.is_some() && other.dma_of(region.mapping()).is_none();
        self.regions.iter().any(only_here)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::mem::RegionSpec;
    use crate::units::{GuestAddr, bytes_u64};

    const LEN: usize = 8192;

    /// Notes what is mapped; refuses what would be more than so many mappings.
    #[derive(Debug)]
    struct Notes {
        mapped: Mutex<Vec<usize>>,
        unmapped: Mutex<Vec<usize>>,
        room: usize,
    }

    impl DmaDomain for Notes {
        fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
            let mut mapped = self.mapped.lock().unwrap();
            if mapped.len() - self.unmapped.lock().unwrap().len() >= self.room {
                let (device, limit) = ("full".to_owned(), "full".to_owned());
                let need_bytes = 1000 + mapping.pages().1 as u64;
                return Err(DmaError::Memlock { device, need_bytes, limit });
            }
            mapped.push(mapping.pages().0.0);
            Ok(())
        }

        fn unmap(&self, mapping: &Arc<Mapping>) {
            self.unmapped.lock().unwrap().push(mapping.pages().0.0);
        }

        fn offset(&self) -> IovaOffset {
            IovaOffset(0)
        }
    }

    fn notes(room: usize) -> (Arc<Notes>, Arc<dyn DmaDomain>) {
        let notes = Arc::new(Notes { mapped: Mutex::default(), unmapped: Mutex::default(), room });
        (Arc::clone(&notes), notes)
    }

    impl Notes {
        fn counts(&self) -> (usize, usize) {
            (self.mapped.lock().unwrap().len(), self.unmapped.lock().unwrap().len())
        }
    }

    fn add(table: &mut MemTable, at: u64) {
        let spec =
            RegionSpec { guest_addr: GuestAddr(at), len_bytes: bytes_u64(LEN), user_addr: at };
        table.add(spec, Arc::new(Mapping::anonymous(LEN).unwrap())).unwrap();
    }

    #[test]
    fn a_region_is_mapped_once_and_unmapped_with_the_last_table() {
        let (notes, domain) = notes(9);
        let mut first = MemTable::new();
        add(&mut first, 0);
        add(&mut first, 1 << 20);
        assert!(!first.has_dma() && first.lacks_dma());
        assert!(first.map_into(&domain, || true).unwrap());
        assert!(first.has_dma() && !first.lacks_dma());
        let mut second = first.clone();
        second.remove(GuestAddr(0), bytes_u64(LEN));
        add(&mut second, 2 << 20);
        assert!(second.lacks_dma() && second.has_dma());
        assert!(second.map_into(&domain, || true).unwrap());
        assert_eq!(notes.counts(), (3, 0), "only what is new");
        assert!(first.has_dma_beyond(&second) && !first.has_dma_beyond(&first));
        let gone = first.regions[0].mapping().pages().0.0;
        drop(first);
        assert_eq!(notes.unmapped.lock().unwrap()[..], [gone]);
        let third = second.clone();
        drop(second);
        assert_eq!(notes.counts(), (3, 1));
        let bare = third.without_dma();
        assert!(!bare.has_dma() && third.has_dma_beyond(&bare));
        drop(third);
        assert_eq!(notes.counts(), (3, 3));
        assert_eq!(Arc::strong_count(bare.regions[0].mapping()), 1);
    }

    #[test]
    fn a_refusal_and_a_change_of_mind_leave_nothing_mapped() {
        let (notes, domain) = notes(2);
        let mut old = MemTable::new();
        add(&mut old, 0);
        assert!(old.map_into(&domain, || true).unwrap());
        let mut new = old.without_dma();
        add(&mut new, 1 << 20);
        add(&mut new, 2 << 20);
        new.share_dma(&old);
        let mut again = new.clone();
        // The third does not fit, and neither does the fourth; the fifth is the fourth's memory.
        add(&mut new, 3 << 20);
        let spec = RegionSpec { guest_addr: GuestAddr(4 << 20), len_bytes: 4096, user_addr: 0 };
        new.add(spec, Arc::clone(new.regions[3].mapping())).unwrap();
        let Err(DmaError::Memlock { need_bytes, .. }) = new.map_into(&domain, || true) else {
            panic!("there is no room");
        };
        assert_eq!(need_bytes, 1000 + 2 * LEN as u64);
        drop(new);
        assert_eq!(notes.counts(), (2, 1));
        let asked = std::cell::Cell::new(0);
        assert!(!again.map_into(&domain, || asked.replace(1) == 0).unwrap());
        drop(again);
        assert_eq!(notes.counts(), (3, 2));
        drop(old);
        assert_eq!(notes.counts(), (3, 3));
    }

    #[test]
    fn kept_regions_keep_their_numbers_and_new_ones_get_others() {
        let mut old = MemTable::new();
        add(&mut old, 0);
        add(&mut old, 1 << 20);
        let mut new = MemTable::after(&old);
        new.keep(&old.regions[1]).unwrap();
        assert!(new.keep(&old.regions[1]).is_err(), "it overlaps itself");
        add(&mut new, 0);
        let id = |table: &MemTable, at| table.translate(GuestAddr(at), 1, &mut 0).unwrap().region();
        assert_eq!(id(&new, 1 << 20), id(&old, 1 << 20));
        assert_ne!(id(&new, 0), id(&old, 0));
        assert_ne!(id(&new, 0), id(&new, 1 << 20));
    }
}
