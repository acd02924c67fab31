//! The guest's memory as the front-end describes it: which regions exist, and whether a new one makes sense.
//!
//! In: region descriptions from SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG. Out: validated [`RegionDesc`]s for the
//! [`Backend`](super::Backend), which maps them. Owner: the control thread.
//!
//! **Invariant:** the regions of a [`MemoryTable`] are not empty, do not wrap, and overlap neither in guest nor in user
//! addresses: a translation has at most one answer.
//!
//! Spec: vhost-user protocol, "Memory region description", "VHOST_USER_ADD_MEM_REG".

use std::fmt;
use std::os::fd::OwnedFd;

use super::error::Error;
use super::message::MemoryRegion;

pub use ringmill_core::units::GuestAddr;

/// An address in the front-end's own address space, bytes. It names ring memory and means nothing in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserAddr(pub u64);

impl fmt::LowerHex for UserAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// A region to map: validated, with its file.
#[derive(Debug)]
pub struct RegionDesc {
    /// Where the guest sees it.
    pub guest_addr: GuestAddr,
    /// Its length, at least 1. Any multiple of the page size is usual, none is promised.
    pub len_bytes: u64,
    /// Where the front-end has mapped it; ring addresses are given in these terms.
    pub user_addr: UserAddr,
    /// Where it starts in the file; `mmap_offset + len_bytes` does not overflow, but may lie beyond the file's end.
    pub mmap_offset: u64,
    /// The file. Untrusted: it may be of any kind and may be truncated at any time.
    pub fd: OwnedFd,
}

/// A region without its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub guest_addr: GuestAddr,
    /// Its length, at least 1.
    pub len_bytes: u64,
    /// Where the front-end has mapped it.
    pub user_addr: UserAddr,
}

impl Region {
    /// Checks one description for itself.
    pub(super) fn new(region: &MemoryRegion) -> Result<Self, Error> {
        let guest_addr = GuestAddr(region.guest_addr);
        let len_bytes = region.len_bytes;
        if len_bytes == 0 {
            return Err(Error::RegionEmpty { guest_addr });
        }
        let fields = [
            ("guest address", region.guest_addr),
            ("user address", region.user_addr),
            ("file offset", region.mmap_offset),
        ];
        for (field, start) in fields {
            if start.checked_add(len_bytes).is_none() {
                return Err(Error::RegionOverflow { guest_addr, len_bytes, field });
            }
        }
        Ok(Self { guest_addr, len_bytes, user_addr: UserAddr(region.user_addr) })
    }

    /// Joins the description with its file.
    pub(super) fn describe(&self, mmap_offset: u64, fd: OwnedFd) -> RegionDesc {
        let Self { guest_addr, len_bytes, user_addr } = *self;
        RegionDesc { guest_addr, len_bytes, user_addr, mmap_offset, fd }
    }

    fn covers(&self, addr: UserAddr, len_bytes: u64) -> bool {
        // The region's own end cannot wrap, so the distance is compared instead of a sum that could.
        addr.0.checked_sub(self.user_addr.0).is_some_and(|distance| {
            distance <= self.len_bytes && len_bytes <= self.len_bytes - distance
        })
    }
}

/// Every region that the front-end has described and not taken back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// A table of exactly these regions.
    pub fn new(regions: &[Region]) -> Result<Self, Error> {
        let mut table = Self::default();
        for region in regions {
            table = table.with(*region)?;
        }
        Ok(table)
    }

    /// This table and one more region.
    pub fn with(&self, region: Region) -> Result<Self, Error> {
        for other in &self.regions {
            let overlap = |space| Error::RegionOverlap {
                guest_addr: region.guest_addr,
                other: other.guest_addr,
                space,
            };
            if ranges_meet(
                region.guest_addr.0,
                region.len_bytes,
                other.guest_addr.0,
                other.len_bytes,
            ) {
                return Err(overlap("guest"));
            }
            if ranges_meet(region.user_addr.0, region.len_bytes, other.user_addr.0, other.len_bytes)
            {
                return Err(overlap("user"));
            }
        }
        let mut regions = self.regions.clone();
        regions.push(region);
        Ok(Self { regions })
    }

    /// This table without one region, which must match in guest address, user address and length.
    pub fn without(&self, region: Region) -> Result<Self, Error> {
        let mut regions = self.regions.clone();
        let Some(position) = regions.iter().position(|other| *other == region) else {
            let Region { guest_addr, len_bytes, user_addr } = region;
            return Err(Error::RegionUnknown { guest_addr, user_addr, len_bytes });
        };
        regions.remove(position);
        Ok(Self { regions })
    }

    /// The regions, in the order of their arrival.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Whether one region holds all of these bytes. A ring area is never pieced together from two.
    pub fn covers(&self, addr: UserAddr, len_bytes: u64) -> bool {
        self.regions.iter().any(|region| region.covers(addr, len_bytes))
    }
}

/// Whether two ranges that neither are empty nor wrap have a byte in common.
fn ranges_meet(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    if a <= b { b - a < a_len } else { a - b < b_len }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(guest_addr: u64, len_bytes: u64, user_addr: u64) -> Region {
        Region { guest_addr: GuestAddr(guest_addr), len_bytes, user_addr: UserAddr(user_addr) }
    }

    #[test]
    fn empty_and_wrapping_regions_are_refused() {
        let wire = |guest_addr, len_bytes, user_addr, mmap_offset| MemoryRegion {
            guest_addr,
            len_bytes,
            user_addr,
            mmap_offset,
        };
        assert!(Region::new(&wire(0, 1, u64::MAX - 1, 0)).is_ok());
        assert!(matches!(Region::new(&wire(7, 0, 0, 0)), Err(Error::RegionEmpty { .. })));
        for (region, name) in [
            (wire(u64::MAX, 1, 0, 0), "guest address"),
            (wire(0, 2, u64::MAX - 1, 0), "user address"),
            (wire(0, u64::MAX, 0, 1), "file offset"),
        ] {
            let Err(Error::RegionOverflow { field, .. }) = Region::new(&region) else { panic!() };
            assert_eq!(field, name);
        }
    }

    #[test]
    fn overlap_in_either_address_space_is_refused_and_touching_is_not() {
        let table = MemoryTable::new(&[region(0x1000, 0x1000, 0x8000)]).unwrap();
        assert!(table.with(region(0x2000, 0x1000, 0x9000)).is_ok());
        assert!(table.with(region(0x0, 0x1000, 0x7000)).is_ok());
        for (guest, user, in_space) in
            [(0x1fff, 0x20000, "guest"), (0x1, 0x20000, "guest"), (0x20000, 0x8fff, "user")]
        {
            let Err(Error::RegionOverlap { space, .. }) = table.with(region(guest, 0x1000, user))
            else {
                panic!()
            };
            assert_eq!(space, in_space);
        }
    }

    #[test]
    fn a_region_is_removed_only_by_all_that_identifies_it() {
        let first = region(0x1000, 0x1000, 0x8000);
        let table = MemoryTable::new(&[first]).unwrap();
        assert!(table.without(region(0x1000, 0x800, 0x8000)).is_err());
        assert!(table.without(region(0x1000, 0x1000, 0x9000)).is_err());
        assert_eq!(table.without(first).unwrap(), MemoryTable::default());
    }

    #[test]
    fn a_range_across_two_neighbouring_regions_is_not_covered() {
        let table =
            MemoryTable::new(&[region(0, 0x1000, 0x1000), region(0x1000, 0x1000, 0x2000)]).unwrap();
        assert!(table.covers(UserAddr(0x1000), 0x1000));
        assert!(table.covers(UserAddr(0x2fff), 1));
        assert!(!table.covers(UserAddr(0x1fff), 2));
        assert!(!table.covers(UserAddr(0xfff), 1));
        assert!(!table.covers(UserAddr(u64::MAX), u64::MAX));
    }

    proptest! {
        #[test]
        fn overlap_agrees_with_wide_arithmetic(a: u64, b: u64, a_len in 1u64.., b_len in 1u64..) {
            prop_assume!(a.checked_add(a_len).is_some() && b.checked_add(b_len).is_some());
            let naive = a < b + b_len && b < a + a_len;
            prop_assert_eq!(ranges_meet(a, a_len, b, b_len), naive);
        }

        #[test]
        fn coverage_agrees_with_wide_arithmetic(
            start: u64, len in 1u64.., addr: u64, addr_len: u64,
        ) {
            prop_assume!(start.checked_add(len).is_some());
            let wide = |value: u64| u128::from(value);
            let naive = addr >= start
                && wide(addr) + wide(addr_len) <= wide(start) + wide(len);
            prop_assert_eq!(region(0, len, start).covers(UserAddr(addr), addr_len), naive);
        }
    }
}
