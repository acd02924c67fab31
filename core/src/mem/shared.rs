//! A bounds-checked window onto memory that somebody else writes at the same time: rings and their flags, device queues.
//!
//! **Invariant:** every access is inside the window and naturally aligned or done bytewise; values are read once, by
//! atomic loads, into locals. The window holds its mapping alive.
#![expect(unsafe_code)] // UNSAFETY: atomic accesses through raw pointers into a mapping that `keep` holds.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::segment::prefetch;
use super::{IovaOffset, Mapping, RegionId, Segment};
use crate::units::{HostAddr, Iova, len_u32};

/// Words of 32 bits in the largest entry that is stored at once.
const ENTRY_WORDS: usize = 16;
const ENTRY_BYTES: usize = ENTRY_WORDS * size_of::<u32>();

/// A window of `len_bytes` onto a mapping.
#[derive(Debug)]
pub struct SharedSlice {
    base: NonNull<u8>,
    len_bytes: usize,
    /// Every access of up to 8 bytes that starts before this lies inside: one comparison instead of two.
    inner_bytes: usize,
    /// The same for whole entries.
    entries_bytes: usize,
    keep: Arc<Mapping>,
}

// SAFETY: all accesses are atomic or volatile and the mapping is shared memory by nature; `keep` is Send + Sync.
unsafe impl Send for SharedSlice {}

// SAFETY: as above; what several threads of this process do is what other processes do anyway.
unsafe impl Sync for SharedSlice {}

impl SharedSlice {
    /// A window of `len_bytes` from `offset_bytes` of `mapping`, whose start must be a multiple of `align_bytes`
    /// (a power of two) in this process; `None` when it does not fit or is not aligned.
    #[must_use]
    pub fn new(
        mapping: &Arc<Mapping>,
        offset_bytes: usize,
        len_bytes: usize,
        align_bytes: usize,
    ) -> Option<SharedSlice> {
        let end = offset_bytes.checked_add(len_bytes)?;
        if end > mapping.len_bytes() || !align_bytes.is_power_of_two() {
            return None;
        }
        // SAFETY: `offset_bytes` ≤ the mapping's length, checked above.
        let base = unsafe { mapping.base().add(offset_bytes) };
        if (base.as_ptr() as usize) & (align_bytes - 1) != 0 {
            return None;
        }
        let inner_bytes = len_bytes.saturating_sub(size_of::<u64>() - 1);
        let entries_bytes = len_bytes.saturating_sub(ENTRY_BYTES - 1);
        Some(SharedSlice { base, len_bytes, inner_bytes, entries_bytes, keep: Arc::clone(mapping) })
    }

    /// Bytes in the window.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// True once the memory's owner took it away.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.keep.failed()
    }

    #[cold]
    #[inline(never)]
    fn check_edge(&self, offset_bytes: usize, size_bytes: usize) {
        assert!(offset_bytes <= self.len_bytes && size_bytes <= self.len_bytes - offset_bytes);
    }

    /// The address of `offset_bytes` after the checks that every access needs.
    #[inline(always)]
    fn at(&self, offset_bytes: usize, size_bytes: usize) -> *mut u8 {
        if offset_bytes >= self.inner_bytes || size_bytes > size_of::<u64>() {
            self.check_edge(offset_bytes, size_bytes);
        }
        // SAFETY: the offset is inside the window, which is inside the mapping (established in `new`).
        let at = unsafe { self.base.as_ptr().add(offset_bytes) };
        debug_assert!((at as usize).is_multiple_of(size_bytes));
        at
    }

    /// Loads a little-endian u16 at an even address.
    #[inline]
    #[must_use]
    pub fn load_u16(&self, offset_bytes: usize, order: Ordering) -> u16 {
        // SAFETY: in bounds by `at`; rings are 2-aligned or stricter and their u16 fields lie on even offsets.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.at(offset_bytes, 2).cast()) }.load(order))
    }

    /// Stores a little-endian u16 at an even address.
    #[inline]
    pub fn store_u16(&self, offset_bytes: usize, value: u16, order: Ordering) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(self.at(offset_bytes, 2).cast()) }.store(value.to_le(), order);
    }

    /// Loads 64 bits at a multiple of 8.
    #[inline]
    #[must_use]
    pub fn load_u64(&self, offset_bytes: usize) -> u64 {
        // SAFETY: in bounds by `at`; used only on 8-aligned fields of 16-aligned tables.
        u64::from_le(
            unsafe { AtomicU64::from_ptr(self.at(offset_bytes, 8).cast()) }.load(Ordering::Relaxed),
        )
    }

    /// Stores 64 bits at a multiple of 8.
    #[inline]
    pub fn store_u64(&self, offset_bytes: usize, value: u64, order: Ordering) {
        // SAFETY: as in `load_u64`.
        unsafe { AtomicU64::from_ptr(self.at(offset_bytes, 8).cast()) }.store(value.to_le(), order);
    }

    /// Loads a little-endian u32 at a multiple of 4.
    #[inline]
    #[must_use]
    pub fn load_u32(&self, offset_bytes: usize, order: Ordering) -> u32 {
        // SAFETY: in bounds by `at`; used only on 4-aligned fields of 4-aligned structures.
        u32::from_le(unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) }.load(order))
    }

    /// Stores a little-endian u32 at a multiple of 4.
    #[inline]
    pub fn store_u32(&self, offset_bytes: usize, value: u32, order: Ordering) {
        // SAFETY: as in `load_u32`.
        unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) }.store(value.to_le(), order);
    }

    /// Stores two little-endian u32 next to each other (a used element).
    #[inline]
    pub fn store_u32_pair(&self, offset_bytes: usize, first: u32, second: u32) {
        // SAFETY: in bounds by `at`; used elements start on multiples of 4.
        unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) }
            .store(first.to_le(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.at(offset_bytes + 4, 4).cast()) }
            .store(second.to_le(), Ordering::Relaxed);
    }

    /// The words of 64 bits of an entry of 64 bytes at a multiple of 8, after the check.
    #[inline(always)]
    fn entry(&self, offset_bytes: usize) -> &[AtomicU64; ENTRY_WORDS / 2] {
        if offset_bytes >= self.entries_bytes {
            self.check_edge(offset_bytes, ENTRY_BYTES);
        }
        // SAFETY: the entry is inside the window, which is inside the mapping (established in `new`).
        let at = unsafe { self.base.as_ptr().add(offset_bytes) };
        debug_assert!((at as usize).is_multiple_of(size_of::<u64>()));
        // SAFETY: in bounds by the check above and alive while `self` is; entries are 8-aligned, and atomics have no
        // invalid values.
        unsafe { &*at.cast() }
    }

    /// Stores 16 little-endian u32, a submission entry, at a multiple of 8. In no order: what publishes it comes later.
    #[inline]
    pub fn store_entry(&self, offset_bytes: usize, words: &[u32; ENTRY_WORDS]) {
        let (pairs, _) = words.as_chunks::<2>();
        for (place, &[low, high]) in self.entry(offset_bytes).iter().zip(pairs) {
            let pair = u64::from(low) | u64::from(high) << 32;
            place.store(pair.to_le(), Ordering::Relaxed);
        }
    }

    /// Loads 16 little-endian u32 at a multiple of 8, each once.
    #[inline]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
    pub fn load_entry(&self, offset_bytes: usize) -> [u32; ENTRY_WORDS] {
        let places = self.entry(offset_bytes);
        let mut words = [0; ENTRY_WORDS];
        for (place, pair) in places.iter().zip(words.as_chunks_mut::<2>().0) {
            let value = u64::from_le(place.load(Ordering::Relaxed));
            *pair = [value as u32, (value >> 32) as u32];
        }
        words
    }

    /// The piece of `len_bytes` from `offset_bytes` on, to be copied from and to; `None` outside the window. The caller
    /// keeps the window for as long as the segment is used.
    #[inline]
    #[must_use]
    pub fn segment(&self, offset_bytes: usize, len_bytes: usize) -> Option<Segment> {
        let end = offset_bytes.checked_add(len_bytes)?;
        let is_inside = end <= self.len_bytes && u32::try_from(len_bytes).is_ok();
        let host = self.host().advanced(offset_bytes);
        is_inside.then(|| Segment::new(host, len_u32(len_bytes), RegionId::POOL))
    }

    /// Fills the window with zeroes. For windows that nobody else uses yet.
    pub fn fill_zero(&self) {
        // SAFETY: the window lies inside the mapping, which `keep` holds (established in `new`).
        unsafe { self.base.as_ptr().write_bytes(0, self.len_bytes) };
    }

    /// Where the window starts in this process.
    #[inline]
    #[must_use]
    pub fn host(&self) -> HostAddr {
        HostAddr(self.base.as_ptr() as usize)
    }

    /// Where a device of that domain finds the window's first byte. It reaches it once the mapping is mapped there.
    #[inline]
    #[must_use]
    pub fn iova(&self, offset: IovaOffset) -> Iova {
        offset.iova(self.host())
    }

    /// The memory that it looks at.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.keep
    }

    /// Asks the processor to fetch the cache line at `offset_bytes`; out-of-window offsets are ignored.
    #[inline]
    pub fn prefetch(&self, offset_bytes: usize) {
        prefetch(HostAddr((self.base.as_ptr() as usize).wrapping_add(offset_bytes)));
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn every_access_is_inside_the_window_or_refused() {
        let mapping = Arc::new(Mapping::anonymous(4096).unwrap());
        for len_bytes in [2usize, 4, 6, 8, 16, 64, 72, 4096] {
            let window = SharedSlice::new(&mapping, 0, len_bytes, 2).unwrap();
            let refused = |access: &dyn Fn()| catch_unwind(AssertUnwindSafe(access)).is_err();
            for at in (0..len_bytes + 16).step_by(2).chain([usize::MAX - 1]) {
                let fits = |size: usize| at.checked_add(size).is_some_and(|end| end <= len_bytes);
                let load = || _ = window.load_u16(at, Ordering::Relaxed);
                assert_eq!(refused(&load), !fits(2), "2 bytes at {at} of {len_bytes}");
                if at % 4 == 0 {
                    assert_eq!(
                        refused(&|| _ = window.load_u32(at, Ordering::Relaxed)),
                        !fits(4),
                        "4 at {at}"
                    );
                    let pair = || window.store_u32_pair(at, 1, 2);
                    assert_eq!(refused(&pair), !fits(8), "two times 4 at {at} of {len_bytes}");
                }
                if at % 8 == 0 {
                    assert_eq!(refused(&|| _ = window.load_u64(at)), !fits(8), "8 at {at}");
                    assert_eq!(refused(&|| _ = window.load_entry(at)), !fits(64), "64 at {at}");
                    let store = || window.store_entry(at, &[0; 16]);
                    assert_eq!(refused(&store), !fits(64), "64 bytes at {at} of {len_bytes}");
                }
            }
        }
        assert!(SharedSlice::new(&mapping, 4090, 8, 2).is_none());
    }

    #[test]
    fn an_entry_lies_in_memory_word_by_word() {
        let mapping = Arc::new(Mapping::anonymous(4096).unwrap());
        let window = SharedSlice::new(&mapping, 1024, 192, 64).unwrap();
        let words: [u32; 16] = std::array::from_fn(|at| 0x8070_6050 + len_u32(at));
        window.store_entry(64, &words);
        assert_eq!(window.load_entry(64), words);
        for (at, word) in words.iter().enumerate() {
            assert_eq!(window.load_u32(64 + 4 * at, Ordering::Acquire), *word);
        }
        let mut bytes = [0; 192];
        assert_eq!(window.segment(0, 192).unwrap().read_into(&mut bytes), 192);
        assert!(bytes[..64].iter().chain(&bytes[128..]).all(|&byte| byte == 0));
        assert_eq!(bytes[64..72], [0x50, 0x60, 0x70, 0x80, 0x51, 0x60, 0x70, 0x80]);
        window.fill_zero();
        assert_eq!(window.load_entry(64), [0; 16]);
    }

    #[test]
    fn pieces_end_where_the_window_does_and_addresses_start_there() {
        let mapping = Arc::new(Mapping::anonymous(8192).unwrap());
        let window = SharedSlice::new(&mapping, 4096, 100, 1).unwrap();
        let base = mapping.base().as_ptr() as usize;
        assert_eq!(window.segment(90, 10).map(|s| s.host()), Some(HostAddr(base + 4096 + 90)));
        assert!(window.segment(90, 11).is_none() && window.segment(usize::MAX, 2).is_none());
        assert!(window.segment(101, 0).is_none());
        let offset = IovaOffset(0x1000u64.wrapping_sub(base as u64));
        assert_eq!(window.iova(offset), Iova(0x2000));
    }
}
