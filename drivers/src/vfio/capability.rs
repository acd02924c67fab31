//! What the kernel appends to its answers: chains of capabilities, here those about mappable parts and about IOVAs.
//!
//! In: the bytes of an answer. Out: areas and ranges that are inside what they are parts of, in order, without overlap.
//! **Invariant:** no length or offset in the bytes is believed; each chain is walked in one direction only.

use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, vfio_iommu_type1_info,
    vfio_region_info,
};

/// `vfio_info_cap_header`: id, version (u16 each), offset of the next (u32).
const HEADER_BYTES: usize = 8;

/// Of both lists: header, count (u32), reserved (u32), then pairs of u64.
const LIST_BYTES: usize = HEADER_BYTES + 8;

/// What an IOMMU and mmap count in.
const PAGE_BYTES: u64 = 4096;

/// A region of a device: a BAR or its configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// Where it is in the device's descriptor.
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
    /// What of it can be mapped, from its start: in order, whole pages.
    pub(super) mappable: Vec<Area>,
}

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
}

/// IOVAs that can be mapped, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IovaRange {
    pub(super) first: u64,
    pub(super) last: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// The capability `id` in a chain that starts at `at`, which is not inside the answer's fixed part; with all that follows.
fn find(bytes: &[u8], fixed_bytes: usize, at: u32, id: u32) -> Option<&[u8]> {
    let (mut at, mut before) = (usize::try_from(at).ok()?, fixed_bytes);
    while at >= before {
        if u32::from(u16_at(bytes, at)?) == id {
            return bytes.get(at..);
        }
        before = at.checked_add(HEADER_BYTES)?;
        at = usize::try_from(u32_at(bytes, at.checked_add(4)?)?).ok()?;
    }
    None
}

/// The pairs of a list; a count that the bytes do not hold ends with them.
fn pairs(capability: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let count = u32_at(capability, HEADER_BYTES).unwrap_or(0);
    let (pairs, _) = capability.get(LIST_BYTES..).unwrap_or_default().as_chunks::<16>();
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    pairs.iter().take(count).filter_map(|pair| Some((u64_at(pair, 0)?, u64_at(pair, 8)?)))
}

/// Reads the answer to VFIO_DEVICE_GET_REGION_INFO; `None` when it is cut short or nonsense.
pub(super) fn region(bytes: &[u8]) -> Option<Region> {
    let flags = u32_at(bytes, std::mem::offset_of!(vfio_region_info, flags))?;
    let caps = u32_at(bytes, std::mem::offset_of!(vfio_region_info, cap_offset))?;
    let len_bytes = u64_at(bytes, std::mem::offset_of!(vfio_region_info, size))?;
    let offset_bytes = u64_at(bytes, std::mem::offset_of!(vfio_region_info, offset))?;
    // Offsets go to pread, which counts in i64.
    i64::try_from(offset_bytes.checked_add(len_bytes)?).ok()?;
    let sparse = (flags & VFIO_REGION_INFO_FLAG_CAPS != 0)
        .then(|| find(bytes, size_of::<vfio_region_info>(), caps, VFIO_REGION_INFO_CAP_SPARSE_MMAP))
        .flatten();
    let whole = [(0, len_bytes)];
    let mut mappable = Vec::new();
    if flags & VFIO_REGION_INFO_FLAG_MMAP != 0 {
        match sparse {
            Some(list) => mappable.extend(pairs(list).filter_map(|pair| area(pair, len_bytes))),
            None => mappable.extend(whole.iter().filter_map(|pair| area(*pair, len_bytes))),
        }
    }
    mappable.sort_by_key(|area| area.offset_bytes);
    // What overlaps is nonsense; the first of them is enough.
    let mut end = 0;
    mappable.retain(|area| {
        let is_behind = area.offset_bytes >= end;
        if is_behind {
            end = area.offset_bytes + area.len_bytes;
        }
        is_behind
    });
    Some(Region { offset_bytes, len_bytes, mappable })
}

/// An area of whole pages inside its region.
fn area((offset_bytes, len_bytes): (u64, u64), region_bytes: u64) -> Option<Area> {
    let end = offset_bytes.checked_add(len_bytes)?;
    let is_whole = offset_bytes.is_multiple_of(PAGE_BYTES) && len_bytes.is_multiple_of(PAGE_BYTES);
    (len_bytes > 0 && end <= region_bytes && is_whole).then_some(Area { offset_bytes, len_bytes })
}

/// Reads the IOVA ranges from the answer to VFIO_IOMMU_GET_INFO; none from a kernel that does not tell.
pub(super) fn iova_ranges(bytes: &[u8]) -> Vec<IovaRange> {
    let read = || {
        let flags = u32_at(bytes, std::mem::offset_of!(vfio_iommu_type1_info, flags))?;
        let caps = u32_at(bytes, std::mem::offset_of!(vfio_iommu_type1_info, cap_offset))?;
        (flags & VFIO_IOMMU_INFO_CAPS != 0).then_some(())?;
        let id = VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE;
        find(bytes, size_of::<vfio_iommu_type1_info>(), caps, id)
    };
    let Some(list) = read() else { return Vec::new() };
    pairs(list)
        .filter(|(first, last)| first <= last)
        .map(|(first, last)| IovaRange { first, last })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An answer: its fixed part with flags and chain, and capabilities behind it.
    fn answer(fixed_bytes: usize, cap_at: usize, flags: u32, caps: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; fixed_bytes];
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        let at = u32::try_from(fixed_bytes).unwrap();
        bytes[cap_at..cap_at + 4].copy_from_slice(&at.to_ne_bytes());
        bytes.extend_from_slice(caps);
        bytes
    }

    fn list(id: u16, next: u32, count: u32, pairs: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(id.to_ne_bytes());
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes.extend(count.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        for (first, second) in pairs {
            bytes.extend(first.to_ne_bytes());
            bytes.extend(second.to_ne_bytes());
        }
        bytes
    }

    fn region_of(flags: u32, len_bytes: u64, caps: &[u8]) -> Region {
        let mut bytes = answer(32, 12, flags, caps);
        bytes[16..24].copy_from_slice(&len_bytes.to_ne_bytes());
        bytes[24..32].copy_from_slice(&(1_u64 << 40).to_ne_bytes());
        region(&bytes).unwrap()
    }

    const MAPPED: u32 = VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS;

    fn areas(pairs: &[(u64, u64)]) -> Vec<Area> {
        pairs.iter().map(|&(offset_bytes, len_bytes)| Area { offset_bytes, len_bytes }).collect()
    }

    #[test]
    fn a_region_is_mappable_as_a_whole_in_parts_or_not_at_all() {
        let whole = region_of(VFIO_REGION_INFO_FLAG_MMAP, 0x4000, &[]);
        assert_eq!((whole.offset_bytes, whole.len_bytes), (1 << 40, 0x4000));
        assert_eq!(whole.mappable, areas(&[(0, 0x4000)]));
        assert_eq!(region_of(0, 0x4000, &[]).mappable, []);
        // Not the MSI-X table's page; the list comes second in the chain.
        let mut caps = list(3, 48, 0, &[]);
        caps.extend(list(1, 0, 2, &[(0x3000, 0x1000), (0, 0x2000)]));
        let sparse = region_of(MAPPED, 0x4000, &caps);
        assert_eq!(sparse.mappable, areas(&[(0, 0x2000), (0x3000, 0x1000)]));
    }

    #[test]
    fn areas_that_cannot_be_are_left_out() {
        let pairs = [
            (0x4000, 0x1000),
            (0x1000, u64::MAX - 0xfff),
            (0x800, 0x1000),
            (0x1000, 0x10),
            (0x2000, 0),
            (0x1000, 0x2000),
            (0x2000, 0x1000),
        ];
        let region = region_of(MAPPED, 0x4000, &list(1, 0, 7, &pairs));
        assert_eq!(region.mappable, areas(&[(0x1000, 0x2000)]));
        // More are promised than there are.
        let region = region_of(MAPPED, 0x4000, &list(1, 0, u32::MAX, &[(0, 0x1000)]));
        assert_eq!(region.mappable, areas(&[(0, 0x1000)]));
        let region = region_of(MAPPED, 0x4000, &list(1, 0, 0, &[(0, 0x1000)]));
        assert_eq!(region.mappable, []);
    }

    #[test]
    fn chains_that_turn_back_or_run_off_end() {
        for next in [0, 1, 31, 32, 40, 47, 4096, u32::MAX] {
            let region = region_of(MAPPED, 0x4000, &list(9, next, 0, &[]));
            assert_eq!(region.mappable, areas(&[(0, 0x4000)]), "{next}");
        }
    }

    #[test]
    fn iova_ranges_are_read() {
        let pairs = [(0, 0xfedf_ffff), (5, 4), (0xfef0_0000, (1 << 39) - 1)];
        let bytes = answer(24, 16, VFIO_IOMMU_INFO_CAPS, &list(1, 0, 3, &pairs));
        let ranges = iova_ranges(&bytes);
        assert_eq!(ranges.len(), 2);
        assert_eq!(ranges[1], IovaRange { first: 0xfef0_0000, last: (1 << 39) - 1 });
        assert_eq!(iova_ranges(&answer(24, 16, 0, &list(1, 0, 3, &pairs))), []);
        assert_eq!(iova_ranges(&[]), []);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_much(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0_u32..80) {
            // Half of them get past the flags.
            if bytes.len() > 32 && at % 2 == 0 {
                bytes[4] |= 0xff;
                bytes[12..16].copy_from_slice(&at.to_ne_bytes());
                bytes[16..20].copy_from_slice(&at.to_ne_bytes());
            }
            if let Some(region) = region(&bytes) {
                let mut end = 0;
                for area in &region.mappable {
                    prop_assert!(area.offset_bytes >= end && area.len_bytes > 0);
                    end = area.offset_bytes + area.len_bytes;
                    prop_assert!(end <= region.len_bytes);
                }
            }
            for range in iova_ranges(&bytes) {
                prop_assert!(range.first <= range.last);
            }
        }
    }
}
