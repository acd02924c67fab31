//! A bounds-checked window onto memory that somebody else writes at the same time: rings and their flags.
//!
//! **Invariant:** every access is inside the window and naturally aligned or done bytewise; values are read once, by
//! atomic loads, into locals. The window holds its mapping alive.
#![expect(unsafe_code)] // UNSAFETY: atomic accesses through raw pointers into a mapping that `keep` holds.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::Mapping;
use super::segment::prefetch;
use crate::units::HostAddr;

/// A window of `len_bytes` onto a mapping.
#[derive(Debug)]
pub struct SharedSlice {
    base: NonNull<u8>,
    len_bytes: usize,
    /// Every access of up to 8 bytes that starts before this lies inside: one comparison instead of two.
    inner_bytes: usize,
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
        Some(SharedSlice { base, len_bytes, inner_bytes, keep: Arc::clone(mapping) })
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
    pub fn load_u32(&self, offset_bytes: usize) -> u32 {
        // SAFETY: in bounds by `at`; used only on 4-aligned fields of 4-aligned structures.
        u32::from_le(
            unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) }.load(Ordering::Relaxed),
        )
    }

    /// Stores a little-endian u32 at a multiple of 4.
    #[inline]
    pub fn store_u32(&self, offset_bytes: usize, value: u32) {
        // SAFETY: as in `load_u32`.
        unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) }
            .store(value.to_le(), Ordering::Relaxed);
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
        for len_bytes in [2usize, 4, 6, 8, 16, 4096] {
            let window = SharedSlice::new(&mapping, 0, len_bytes, 2).unwrap();
            let refused = |access: &dyn Fn()| catch_unwind(AssertUnwindSafe(access)).is_err();
            for at in (0..len_bytes + 16).step_by(2).chain([usize::MAX - 1]) {
                let fits = |size: usize| at.checked_add(size).is_some_and(|end| end <= len_bytes);
                let load = || _ = window.load_u16(at, Ordering::Relaxed);
                assert_eq!(refused(&load), !fits(2), "2 bytes at {at} of {len_bytes}");
                if at % 4 == 0 {
                    assert_eq!(refused(&|| _ = window.load_u32(at)), !fits(4), "4 at {at}");
                    let pair = || window.store_u32_pair(at, 1, 2);
                    assert_eq!(refused(&pair), !fits(8), "two times 4 at {at} of {len_bytes}");
                }
                if at % 8 == 0 {
                    assert_eq!(refused(&|| _ = window.load_u64(at)), !fits(8), "8 at {at}");
                }
            }
        }
        assert!(SharedSlice::new(&mapping, 4090, 8, 2).is_none());
    }
}
