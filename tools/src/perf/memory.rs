//! The memory that the load generator shares with the disks it drives: one memory file, and windows onto it.
//!
//! In: a length. Out: [`Window`]s for rings and headers, `Segment`s for data. Owner: the load's thread; a disk at the
//! other end of a socket reads and writes the same bytes.
//! **Invariant:** every access is inside its window and naturally aligned; shared values are read once, by atomic loads.
#![expect(unsafe_code)] // UNSAFETY: atomic accesses through raw pointers into a mapping that the window holds.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use ringmill_core::mem::{DmaDomain, DmaError, Mapping, MemTable, RegionSpec, Segment};
use ringmill_core::units::{GuestAddr, bytes_u64, len_u32};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::PerfError;

/// Where the memory file begins in the addresses that requests carry. Not 0, so that a forgotten address is noticed.
const GUEST_BASE: u64 = 1 << 30;

/// Pages of x86-64 and their large kind.
const PAGE_BYTES: u64 = 4096;
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The memory file, mapped.
#[derive(Debug)]
pub(crate) struct LoadMemory {
    file: File,
    mapping: Arc<Mapping>,
    table: MemTable,
    page_bytes: u64,
}

fn huge_file(len_bytes: u64) -> Option<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(memfd_create(c"ringmill-perf", flags).ok()?);
    file.set_len(len_bytes).ok()?;
    // Reserves the pages: without it a shortage would show as SIGBUS in the middle of a load.
    fallocate(&file, FallocateFlags::empty(), 0, len_bytes).ok()?;
    Some(file)
}

fn small_file(len_bytes: u64) -> std::io::Result<File> {
    let file = File::from(memfd_create(c"ringmill-perf", MemfdFlags::CLOEXEC)?);
    file.set_len(len_bytes)?;
    fallocate(&file, FallocateFlags::empty(), 0, len_bytes)?;
    Ok(file)
}

impl LoadMemory {
    /// Zeroed memory of at least `len_bytes`: in 2 MiB pages if that many are free, else in ordinary ones.
    pub(crate) fn new(len_bytes: u64) -> Result<LoadMemory, PerfError> {
        let huge_bytes = len_bytes.max(1).next_multiple_of(HUGE_PAGE_BYTES);
        match huge_file(huge_bytes) {
            Some(file) => LoadMemory::map(file, huge_bytes, HUGE_PAGE_BYTES),
            None => LoadMemory::small(len_bytes),
        }
    }

    /// The same in ordinary pages, for many small pieces.
    pub(crate) fn small(len_bytes: u64) -> Result<LoadMemory, PerfError> {
        let len_bytes = len_bytes.max(1).next_multiple_of(PAGE_BYTES);
        let file = small_file(len_bytes);
        LoadMemory::map(
            file.map_err(|source| PerfError::Memory { len_bytes, source })?,
            len_bytes,
            PAGE_BYTES,
        )
    }

    fn map(file: File, len: u64, page_bytes: u64) -> Result<LoadMemory, PerfError> {
        let failed = |source: std::io::Error| PerfError::Memory { len_bytes: len, source };
        let len = usize::try_from(len).map_err(|e| failed(std::io::Error::other(e)))?;
        let mapping = Mapping::own_file(&file, len)
            .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
        let mapping = Arc::new(mapping);
        let mut table = MemTable::new();
        let spec = RegionSpec {
            guest_addr: GuestAddr(GUEST_BASE),
            len_bytes: bytes_u64(len),
            user_addr: bytes_u64(mapping.base().as_ptr() as usize),
        };
        table
            .add(spec, Arc::clone(&mapping))
            .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
        let memory = LoadMemory { file, mapping, table, page_bytes };
        // Touched now, so that no page fault falls into the measurement.
        for at in (0..bytes_u64(len)).step_by(1 << 30) {
            memory.segment(at, len_u32(len).min(1 << 30)).fill_zero();
        }
        Ok(memory)
    }

    /// Lets a device that moves data by itself reach it, for as long as it is there.
    pub(crate) fn map_into(&mut self, domain: &Arc<dyn DmaDomain>) -> Result<(), DmaError> {
        self.table.map_into(domain, || true).map(drop)
    }

    /// The file, for the other end.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the pages that it is made of.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The address that requests carry for a byte of the file.
    pub(crate) fn guest_addr(&self, offset_bytes: u64) -> u64 {
        GUEST_BASE + offset_bytes
    }

    /// The address of that byte in this process, as vhost-user names rings.
    pub(crate) fn user_addr(&self, offset_bytes: u64) -> u64 {
        bytes_u64(self.mapping.base().as_ptr() as usize) + offset_bytes
    }

    /// A window onto part of it.
    ///
    /// # Panics
    /// When the range is not inside the memory: a bug of the layout.
    pub(crate) fn window(&self, offset_bytes: usize, len_bytes: usize) -> Window {
        let end = offset_bytes.checked_add(len_bytes);
        assert!(end.is_some_and(|end| end <= self.mapping.len_bytes()), "window out of memory");
        // SAFETY: the offset is inside the mapping, asserted above.
        let base = unsafe { self.mapping.base().add(offset_bytes) };
        assert!((base.as_ptr() as usize).is_multiple_of(16), "windows start on multiples of 16");
        Window { base, len_bytes, _keep: Arc::clone(&self.mapping) }
    }

    /// Data of a request: at most `len_bytes` from `offset_bytes` on.
    ///
    /// # Panics
    /// When the range begins outside the memory: a bug of the layout.
    pub(crate) fn segment(&self, offset_bytes: u64, len_bytes: u32) -> Segment {
        let addr = GuestAddr(GUEST_BASE + offset_bytes);
        self.table.translate(addr, len_bytes, &mut 0).expect("the layout lies inside the memory")
    }
}

/// A piece of the shared memory, reached by atomic accesses only.
#[derive(Debug)]
pub(crate) struct Window {
    base: NonNull<u8>,
    len_bytes: usize,
    _keep: Arc<Mapping>,
}

// SAFETY: all accesses are atomic, and the mapping, which `_keep` holds, is shared memory by nature.
unsafe impl Send for Window {}

impl Window {
    /// The address of `offset_bytes` after the checks that every access needs.
    #[inline(always)]
    fn at(&self, offset_bytes: usize, size_bytes: usize) -> *mut u8 {
        assert!(offset_bytes <= self.len_bytes && size_bytes <= self.len_bytes - offset_bytes);
        debug_assert!(offset_bytes.is_multiple_of(size_bytes));
        // SAFETY: inside the window, which is inside the mapping (established in `LoadMemory::window`).
        unsafe { self.base.as_ptr().add(offset_bytes) }
    }

    /// Loads a byte.
    #[inline]
    pub(crate) fn load_u8(&self, offset_bytes: usize) -> u8 {
        // SAFETY: in bounds by `at`.
        unsafe { AtomicU8::from_ptr(self.at(offset_bytes, 1)) }.load(Ordering::Relaxed)
    }

    /// Stores a byte.
    #[inline]
    pub(crate) fn store_u8(&self, offset_bytes: usize, value: u8) {
        // SAFETY: in bounds by `at`.
        unsafe { AtomicU8::from_ptr(self.at(offset_bytes, 1)) }.store(value, Ordering::Relaxed);
    }

    /// Loads a little-endian u16 at a multiple of 2.
    #[inline]
    pub(crate) fn load_u16(&self, offset_bytes: usize, order: Ordering) -> u16 {
        // SAFETY: in bounds by `at`; windows are 16-aligned and callers use the natural offsets of ring fields.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.at(offset_bytes, 2).cast()) }.load(order))
    }

    /// Stores a little-endian u16 at a multiple of 2.
    #[inline]
    pub(crate) fn store_u16(&self, offset_bytes: usize, value: u16, order: Ordering) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(self.at(offset_bytes, 2).cast()) }.store(value.to_le(), order);
    }

    /// Loads a little-endian u32 at a multiple of 4.
    #[inline]
    pub(crate) fn load_u32(&self, offset_bytes: usize) -> u32 {
        // SAFETY: as in `load_u16`.
        let value = unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) };
        u32::from_le(value.load(Ordering::Relaxed))
    }

    /// Stores a little-endian u32 at a multiple of 4.
    #[inline]
    pub(crate) fn store_u32(&self, offset_bytes: usize, value: u32) {
        // SAFETY: as in `load_u16`.
        let at = unsafe { AtomicU32::from_ptr(self.at(offset_bytes, 4).cast()) };
        at.store(value.to_le(), Ordering::Relaxed);
    }

    /// Loads a little-endian u64 at a multiple of 8.
    #[inline]
    pub(crate) fn load_u64(&self, offset_bytes: usize, order: Ordering) -> u64 {
        // SAFETY: as in `load_u16`.
        u64::from_le(unsafe { AtomicU64::from_ptr(self.at(offset_bytes, 8).cast()) }.load(order))
    }

    /// Stores a little-endian u64 at a multiple of 8.
    #[inline]
    pub(crate) fn store_u64(&self, offset_bytes: usize, value: u64, order: Ordering) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU64::from_ptr(self.at(offset_bytes, 8).cast()) }.store(value.to_le(), order);
    }

    /// Asks the processor to fetch the cache line at `offset_bytes`; never faults.
    #[inline]
    pub(crate) fn prefetch(&self, offset_bytes: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: PREFETCHT0 is architecturally a hint and does not fault on any address.
        unsafe {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = self.base.as_ptr().wrapping_add(offset_bytes);
            _mm_prefetch::<_MM_HINT_T0>(at.cast_const().cast());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_and_segments_see_the_same_bytes() {
        let memory = LoadMemory::new(10_000).unwrap();
        assert!(memory.page_bytes() >= 4096);
        let window = memory.window(4096, 64);
        window.store_u64(8, 0x0102_0304_0506_0708, Ordering::Relaxed);
        let mut bytes = [0u8; 8];
        memory.segment(4104, 8).read_into(&mut bytes);
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(window.load_u16(10, Ordering::Relaxed), 0x0506);
        assert_eq!(window.load_u32(8), 0x0506_0708);
        assert_eq!(window.load_u8(15), 1);
        assert_eq!(memory.user_addr(7) - memory.user_addr(0), 7);
    }

    #[test]
    #[should_panic(expected = "window out of memory")]
    fn a_window_beyond_the_memory_is_a_bug() {
        let memory = LoadMemory::new(4096).unwrap();
        memory.window(usize::MAX - 15, 16);
    }
}
