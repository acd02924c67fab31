//! A piece of memory that a request reads or writes: already translated, already inside its mapping.
//!
//! Flow: made by `MemTable::translate` or a bounce pool, carried by batches, consumed by channels.
//! **Invariant:** `host .. host + len` lies inside one live mapping (see the parent module for who keeps it alive);
//! contents may change under us at any time, so they are only copied, never borrowed.
#![expect(unsafe_code)] // UNSAFETY: copies between segments and our own memory through raw pointers.

use crate::units::{HostAddr, bytes_u64, index, len_u32};

/// Which region a segment lies in. Below [`RING_BUFFERS_MAX`](crate::limits::RING_BUFFERS_MAX) it is the region's first
/// slot in the reactors' tables of registered buffers; other regions have larger numbers, pools [`RegionId::POOL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct RegionId(pub u32);

impl RegionId {
    /// Memory of a reactor's own pools.
    pub const POOL: RegionId = RegionId(u32::MAX);
    /// The first number for regions without slots.
    pub(super) const UNPINNED: RegionId = RegionId(1 << 16);
}

/// One contiguous piece of host memory, 16 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Segment {
    host: HostAddr,
    len_bytes: u32,
    region: RegionId,
}

const _: () = assert!(size_of::<Segment>() == 16);

/// Eight bytes at any address: one load, where an array of bytes would be eight.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned(u64);

impl Segment {
    /// Only this module's siblings vouch for an address.
    #[inline]
    pub(super) fn new(host: HostAddr, len_bytes: u32, region: RegionId) -> Segment {
        Segment { host, len_bytes, region }
    }

    /// Where the piece starts in this process.
    #[inline]
    #[must_use]
    pub fn host(&self) -> HostAddr {
        self.host
    }

    /// Its length, bytes.
    #[inline]
    #[must_use]
    pub fn len_bytes(&self) -> u32 {
        self.len_bytes
    }

    /// The region that it lies in.
    #[inline]
    #[must_use]
    pub fn region(&self) -> RegionId {
        self.region
    }

    /// The part from `from_bytes` on, at most `len_bytes` long; bounds are clamped to the segment.
    #[inline]
    #[must_use]
    pub fn sub(&self, from_bytes: u32, len_bytes: u32) -> Segment {
        let from = from_bytes.min(self.len_bytes);
        let len = len_bytes.min(self.len_bytes - from);
        Segment { host: self.host.advanced(index(from)), len_bytes: len, region: self.region }
    }

    /// Copies the start of the segment out; returns the bytes copied (the shorter of the two).
    #[inline]
    pub fn read_into(&self, out: &mut [u8]) -> usize {
        let len = out.len().min(index(self.len_bytes));
        // SAFETY: `host..host+len` is inside a live mapping (type invariant); `out` is ours, so they cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.host.0 as *const u8, out.as_mut_ptr(), len) };
        len
    }

    /// Copies into the start of the segment; returns the bytes copied (the shorter of the two).
    #[inline]
    pub fn write_from(&self, data: &[u8]) -> usize {
        let len = data.len().min(index(self.len_bytes));
        // SAFETY: as in `read_into`; a translation for writing never yields memory of our own objects.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.host.0 as *mut u8, len) };
        len
    }

    /// Stores one byte at the start. A segment of length 0 is left alone.
    #[inline]
    pub fn write_u8(&self, value: u8) {
        if self.len_bytes > 0 {
            // SAFETY: one byte inside a live mapping (type invariant and the check above).
            unsafe { (self.host.0 as *mut u8).write_volatile(value) };
        }
    }

    /// Fills the whole segment with zeroes.
    pub fn fill_zero(&self) {
        // SAFETY: as in `write_from`.
        unsafe { std::ptr::write_bytes(self.host.0 as *mut u8, 0, index(self.len_bytes)) };
    }

    /// Copies from `other` into this segment; returns the bytes copied (the shorter of the two). Overlap is allowed.
    #[inline]
    pub fn copy_from(&self, other: &Segment) -> usize {
        let len = index(self.len_bytes.min(other.len_bytes));
        // SAFETY: both ranges lie inside live mappings (type invariant); `copy` allows overlap.
        unsafe { std::ptr::copy(other.host.0 as *const u8, self.host.0 as *mut u8, len) };
        len
    }

    /// Asks the processor to fetch the first cache line.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(self.host);
    }

    /// Asks the processor to fetch the first cache line and to take it away from others, as it will be written.
    #[inline]
    pub fn prefetch_for_write(&self) {
        prefetch_for_write(self.host);
    }

    /// The first 16 bytes, read once; `None` when the segment is shorter. Unlike [`Segment::read_into`], no call.
    #[inline]
    #[must_use]
    pub fn front_16(&self) -> Option<[u8; 16]> {
        if self.len_bytes < 16 {
            return None;
        }
        let at = self.host.0 as *const Unaligned;
        // SAFETY: 16 bytes from `host` on lie inside a live mapping (type invariant and the check above); the type has no
        // alignment and no invalid values. Volatile: others may write there meanwhile.
        let [first, second] = unsafe { [at.read_volatile().0, at.add(1).read_volatile().0] };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&first.to_ne_bytes());
        bytes[8..].copy_from_slice(&second.to_ne_bytes());
        Some(bytes)
    }
}

// `as_iovecs` relies on these: address first, then a length whose upper half is the region.
const _: () = assert!(
    size_of::<libc::iovec>() == size_of::<Segment>()
        && std::mem::offset_of!(libc::iovec, iov_base) == std::mem::offset_of!(Segment, host)
        && std::mem::offset_of!(libc::iovec, iov_len) == std::mem::offset_of!(Segment, len_bytes)
        && std::mem::offset_of!(Segment, region) == 12
        && cfg!(target_endian = "little")
);

/// Turns segments, in place, into the kernel's `iovec` array and returns its address. They forget their regions and stay
/// usable as segments otherwise: a driver keeps one copy of a request's list and needs no second array. (Region 0 may be
/// somebody's; a region is only where the search for a registered buffer starts, the address decides.)
#[inline]
pub fn as_iovecs(segments: &mut [Segment]) -> *const libc::iovec {
    for segment in segments.iter_mut() {
        segment.region = RegionId(0);
    }
    segments.as_ptr().cast()
}

/// Asks the processor to fetch the cache line at `addr`; never faults.
#[inline]
pub(super) fn prefetch(addr: HostAddr) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 is architecturally a hint and does not fault on any address.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(
            addr.0 as *const i8,
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = addr;
}

/// Asks the processor to fetch the cache line at `addr` for writing; never faults.
#[inline]
pub(super) fn prefetch_for_write(addr: HostAddr) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW is a hint and does not fault on any address; processors without it do nothing.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_ET0 }>(
            addr.0 as *const i8,
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = addr;
}

/// Walks the overlap of a byte range with a list of segments: calls `each` with every piece, in order.
pub fn pieces(
    segments: &[Segment],
    mut skip_bytes: u64,
    mut len_bytes: u64,
    mut each: impl FnMut(Segment),
) {
    for segment in segments {
        if len_bytes == 0 {
            return;
        }
        let len = u64::from(segment.len_bytes());
        if skip_bytes >= len {
            skip_bytes -= len;
            continue;
        }
        let take = (len - skip_bytes).min(len_bytes);
        each(segment.sub(
            len_u32(crate::units::usize_of(skip_bytes)),
            len_u32(crate::units::usize_of(take)),
        ));
        skip_bytes = 0;
        len_bytes -= take;
    }
}

/// The sum of all lengths, bytes.
#[must_use]
pub fn total_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| bytes_u64(index(s.len_bytes()))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_in_place_are_iovecs() {
        let mut list = [(4096, 7, RegionId::POOL), (1 << 40, u32::MAX, RegionId(3))]
            .map(|(host, len, id)| Segment::new(HostAddr(host), len, id));
        let iovecs = as_iovecs(&mut list);
        // SAFETY: two iovecs lie in `list`, whose layout is asserted above.
        let (first, second) = unsafe { (*iovecs, *iovecs.add(1)) };
        assert_eq!((first.iov_base as usize, first.iov_len), (4096, 7));
        assert_eq!((second.iov_base as usize, second.iov_len), (1 << 40, 0xffff_ffff));
        assert_eq!(list[1].len_bytes(), u32::MAX);
    }
}
