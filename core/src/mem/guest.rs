//! HOT PATH (translation only)
//! The guest's memory as a sorted table of regions; addresses in, segments out.
//!
//! Flow: a session builds a new table for every change and sends it to its queue workers as an epoch; a worker
//! translates descriptors through the table that it holds. Owner: immutable once built, shared by `Arc`.
//! **Invariant:** regions do not overlap and keep their id from epoch to epoch, so a segment in flight stays valid
//! when other regions come and go.
//!
//! translate: last hit? else binary search → offset inside region → min(rest of region, wanted) → segment

use std::sync::Arc;

use thiserror::Error;

use super::{DmaMap, Mapping, Pin, RegionId, Segment, SharedSlice};
use crate::limits::MEMORY_REGIONS_MAX;
use crate::units::{GuestAddr, HostAddr, len_u32, usize_of};

/// Where a region lies, as a front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest-physical address.
    pub guest_addr: GuestAddr,
    /// Length, bytes.
    pub len_bytes: u64,
    /// The front-end's own virtual address of the first byte (ring addresses are given in these).
    pub user_addr: u64,
}

/// One region of a table.
#[derive(Clone, Debug)]
pub struct Region {
    spec: RegionSpec,
    host: HostAddr,
    id: RegionId,
    /// Dropped before the mapping: what a device reaches stays mapped.
    pub(super) dma: Option<Arc<DmaMap>>,
    mapping: Arc<Mapping>,
    pin: Option<Arc<Pin>>,
}

impl Region {
    /// Where it lies.
    #[must_use]
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// Its mapping.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// A device reaches it.
    #[must_use]
    pub fn dma(&self) -> Option<&Arc<DmaMap>> {
        self.dma.as_ref()
    }

    /// How it is pinned, if it may be.
    #[must_use]
    pub fn pin(&self) -> Option<&Arc<Pin>> {
        self.pin.as_ref()
    }
}

/// Why a region cannot join a table.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MemTableError {
    /// Empty or past the end of 64 bits.
    #[error("memory region at guest address {:#x} of {len_bytes} bytes is empty or wraps", guest_addr.0)]
    Range {
        /// First address.
        guest_addr: GuestAddr,
        /// Length.
        len_bytes: u64,
    },
    /// Overlap with a region that is there already.
    #[error("memory region at guest address {:#x} of {len_bytes} bytes overlaps the one at {:#x}", guest_addr.0, other.0)]
    Overlap {
        /// First address of the new region.
        guest_addr: GuestAddr,
        /// Its length.
        len_bytes: u64,
        /// First address of the old region.
        other: GuestAddr,
    },
    /// Too many regions.
    #[error("more than {MEMORY_REGIONS_MAX} memory regions")]
    TooMany,
    /// The mapping is shorter than the region.
    #[error("memory region of {len_bytes} bytes but only {mapped_bytes} are mapped")]
    MappingTooShort {
        /// Length of the region.
        len_bytes: u64,
        /// Length of the mapping.
        mapped_bytes: usize,
    },
}

/// A guest's regions, sorted by guest address.
#[derive(Clone, Debug)]
pub struct MemTable {
    pub(super) regions: Vec<Region>,
    next_id: u32,
}

impl Default for MemTable {
    fn default() -> Self {
        MemTable { regions: Vec::default(), next_id: RegionId::UNPINNED.0 }
    }
}

impl MemTable {
    /// A table without regions.
    #[must_use]
    pub fn new() -> MemTable {
        MemTable::default()
    }

    /// Memory of our own at guest address `guest_addr`: for tests, demos and the simulator.
    ///
    /// # Errors
    /// Boxed, as this is a convenience: no memory, or an impossible range.
    #[cold]
    pub fn anonymous(
        guest_addr: GuestAddr,
        len_bytes: usize,
    ) -> Result<MemTable, Box<dyn std::error::Error>> {
        let mapping = Arc::new(Mapping::anonymous(len_bytes)?);
        let user_addr = mapping.base().as_ptr() as u64;
        let mut table = MemTable::new();
        table.add(RegionSpec { guest_addr, len_bytes: len_bytes as u64, user_addr }, mapping)?;
        Ok(table)
    }

    /// Adds a region whose first byte is the first byte of `mapping`.
    ///
    /// # Errors
    /// [`MemTableError`]; the table is unchanged then.
    pub fn add(
        &mut self,
        spec: RegionSpec,
        mapping: Arc<Mapping>,
    ) -> Result<RegionId, MemTableError> {
        self.insert(spec, mapping, false)
    }

    /// As [`MemTable::add`], for memory that is to be pinned: the region gets slots in the reactors' tables of registered
    /// buffers, unless those are full. Nothing is registered yet.
    ///
    /// # Errors
    /// As for `add`.
    pub fn add_to_pin(
        &mut self,
        spec: RegionSpec,
        mapping: Arc<Mapping>,
    ) -> Result<RegionId, MemTableError> {
        self.insert(spec, mapping, true)
    }

    /// What is to be pinned, in the order of guest addresses.
    pub fn pins(&self) -> impl Iterator<Item = &Arc<Pin>> {
        self.regions.iter().filter_map(Region::pin)
    }

    /// What is pinned by now.
    #[must_use]
    #[cold]
    pub fn pinned(&self) -> Vec<Arc<Pin>> {
        self.pins().filter(|pin| pin.is_on()).cloned().collect()
    }

    /// A table without regions that numbers its own on from those of `former`, some of which may be kept.
    #[must_use]
    #[cold]
    pub fn after(former: &MemTable) -> MemTable {
        MemTable { regions: Vec::new(), next_id: former.next_id }
    }

    /// Adds a region of another table, with all that it has.
    ///
    /// # Errors
    /// As for [`MemTable::add`].
    #[cold]
    pub fn keep(&mut self, region: &Region) -> Result<(), MemTableError> {
        self.check(region.spec, &region.mapping)?;
        self.place(region.clone());
        Ok(())
    }

    fn check(&self, spec: RegionSpec, mapping: &Mapping) -> Result<(), MemTableError> {
        let RegionSpec { guest_addr, len_bytes, user_addr } = spec;
        let range_error = MemTableError::Range { guest_addr, len_bytes };
        if len_bytes == 0
            || guest_addr.checked_add(len_bytes).is_none()
            || user_addr.checked_add(len_bytes).is_none()
        {
            return Err(range_error);
        }
        let mapped_bytes = mapping.len_bytes();
        if usize_of(len_bytes) > mapped_bytes {
            return Err(MemTableError::MappingTooShort { len_bytes, mapped_bytes });
        }
        if self.regions.len() >= MEMORY_REGIONS_MAX {
            return Err(MemTableError::TooMany);
        }
        let end = guest_addr.0 + len_bytes;
        for other in &self.regions {
            let start = other.spec.guest_addr.0;
            if guest_addr.0 < start + other.spec.len_bytes && start < end {
                let other = other.spec.guest_addr;
                return Err(MemTableError::Overlap { guest_addr, len_bytes, other });
            }
        }
        Ok(())
    }

    fn place(&mut self, region: Region) {
        let guest_addr = region.spec.guest_addr;
        let at = self.regions.partition_point(|r| r.spec.guest_addr < guest_addr);
        self.regions.insert(at, region);
    }

    fn insert(
        &mut self,
        spec: RegionSpec,
        mapping: Arc<Mapping>,
        to_pin: bool,
    ) -> Result<RegionId, MemTableError> {
        self.check(spec, &mapping)?;
        let held = self.pins().map(|pin| pin.slots_count()).sum();
        let reserve = || Pin::reserve(&mapping, usize_of(spec.len_bytes), held);
        let pin = to_pin.then(reserve).flatten();
        let id = pin.as_ref().map_or(RegionId(self.next_id), |pin| RegionId(pin.first_slot()));
        // Up to the end of the 32 bits and then from the start again: a session does not live to see it.
        self.next_id = self.next_id.checked_add(1).unwrap_or(RegionId::UNPINNED.0);
        let host = HostAddr(mapping.base().as_ptr() as usize);
        self.place(Region { spec, host, id, dma: None, mapping, pin });
        Ok(id)
    }

    /// Removes the region that starts at `guest_addr` with exactly this length; false when there is none.
    pub fn remove(&mut self, guest_addr: GuestAddr, len_bytes: u64) -> bool {
        let before = self.regions.len();
        self.regions.retain(|r| r.spec.guest_addr != guest_addr || r.spec.len_bytes != len_bytes);
        self.regions.len() != before
    }

    /// The regions, sorted by guest address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// True once the owner of any region took its memory away.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.failed())
    }

    /// The memory from `guest_addr` on: at most `len_bytes`, less where a region ends first; `None` outside every region
    /// or for length 0. `hint` is the caller's last hit.
    #[inline]
    pub fn translate(
        &self,
        guest_addr: GuestAddr,
        len_bytes: u32,
        hint: &mut usize,
    ) -> Option<Segment> {
        let region = match self.regions.get(*hint) {
            Some(region)
                if guest_addr.0.wrapping_sub(region.spec.guest_addr.0) < region.spec.len_bytes =>
            {
                region
            }
            _ => self.find(guest_addr, hint)?,
        };
        let offset = guest_addr.0 - region.spec.guest_addr.0;
        let rest = region.spec.len_bytes - offset;
        let len = if u64::from(len_bytes) <= rest { len_bytes } else { len_u32(usize_of(rest)) };
        if len == 0 {
            return None;
        }
        Some(Segment::new(region.host.advanced(usize_of(offset)), len, region.id))
    }

    #[cold]
    #[inline(never)]
    fn find(&self, guest_addr: GuestAddr, hint: &mut usize) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.spec.guest_addr <= guest_addr);
        let at = after.checked_sub(1)?;
        let region = &self.regions[at];
        if guest_addr.0 - region.spec.guest_addr.0 >= region.spec.len_bytes {
            return None;
        }
        *hint = at;
        Some(region)
    }

    /// A window for a ring that the front-end places at `user_addr`; `None` when it is not wholly inside one region.
    #[must_use]
    pub fn window_at_user_addr(
        &self,
        user_addr: u64,
        len_bytes: usize,
        align_bytes: usize,
    ) -> Option<SharedSlice> {
        self.regions.iter().find_map(|r| {
            let offset = user_addr.checked_sub(r.spec.user_addr)?;
            let end = offset.checked_add(len_bytes as u64)?;
            (end <= r.spec.len_bytes)
                .then(|| SharedSlice::new(&r.mapping, usize_of(offset), len_bytes, align_bytes))?
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(ranges: &[(u64, u64)]) -> Result<MemTable, MemTableError> {
        let mapping = Arc::new(Mapping::anonymous(1 << 20).unwrap());
        let mut table = MemTable::new();
        for &(guest, len_bytes) in ranges {
            table.add(
                RegionSpec { guest_addr: GuestAddr(guest), len_bytes, user_addr: guest },
                Arc::clone(&mapping),
            )?;
        }
        Ok(table)
    }

    #[test]
    fn refuses_overlaps_wraps_and_short_mappings() {
        assert!(matches!(table(&[(0, 4096), (4095, 10)]), Err(MemTableError::Overlap { .. })));
        assert!(matches!(table(&[(u64::MAX - 10, 100)]), Err(MemTableError::Range { .. })));
        assert!(matches!(table(&[(0, 0)]), Err(MemTableError::Range { .. })));
        assert!(matches!(table(&[(0, 1 << 30)]), Err(MemTableError::MappingTooShort { .. })));
        assert!(table(&[(4096, 4096), (0, 4096), (8192, 1)]).is_ok());
    }

    #[test]
    fn ids_survive_the_removal_of_other_regions() {
        let mut t = table(&[(0, 4096), (8192, 4096)]).unwrap();
        let before = t.translate(GuestAddr(8192), 16, &mut 0).unwrap();
        assert!(t.remove(GuestAddr(0), 4096));
        assert!(!t.remove(GuestAddr(8192), 1));
        let after = t.translate(GuestAddr(8192), 16, &mut 0).unwrap();
        assert_eq!(before.region(), after.region());
        assert_eq!(before.host(), after.host());
    }

    proptest! {
        /// The naive twin: look at every region, byte by byte arithmetic in 128 bits.
        #[test]
        fn translation_agrees_with_its_naive_twin(
            addr in 0u64..40_000, len in 0u32..20_000, hint in 0usize..5, far in any::<bool>()
        ) {
            let ranges = [(0u64, 4096u64), (4096, 4096), (12_288, 8192), (30_000, 5)];
            let t = table(&ranges).unwrap();
            let addr = if far { u64::MAX - addr } else { addr };
            let twin = ranges.iter().find(|&&(s, l)| addr >= s && u128::from(addr) < u128::from(s) + u128::from(l))
                .map(|&(s, l)| (addr - s, u64::from(len).min(s + l - addr)))
                .filter(|&(_, l)| l > 0);
            let mut hint = hint;
            let got = t.translate(GuestAddr(addr), len, &mut hint);
            match (twin, got) {
                (None, None) => {}
                (Some((offset, l)), Some(seg)) => {
                    prop_assert_eq!(u64::from(seg.len_bytes()), l);
                    let base = t.regions()[0].mapping.base().as_ptr() as u64;
                    prop_assert_eq!(seg.host().0 as u64, base + offset);
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
