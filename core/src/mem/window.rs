//! HOT PATH: a window onto the registers of a device: mapped from a descriptor, reached by volatile accesses only.
//!
//! Flow: a control thread maps it, reactors ring doorbells through it, a control thread retires it. Owner: shared.
//! **Invariant:** the range stays mapped as long as the window exists, by the device or, once it is gone or retired, by
//! private pages; from then on reads answer ones and writes reach nobody. Nothing else may know the address.
//!
//! write: inside? fence, store — read: inside? load, then: still the device's? else ones
#![expect(unsafe_code)] // UNSAFETY: volatile accesses to a mapping that `raw` holds; MAP_FIXED over that very range.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

use super::MappingError;
use super::sigbus;

/// Registers of a device, little-endian.
#[derive(Debug)]
pub struct DeviceWindow {
    /// Dropped before `raw`: once unmapped, the range may be somebody else's.
    guard: sigbus::Guard,
    raw: MmapRaw,
    len_bytes: usize,
    retired: AtomicBool,
}

impl DeviceWindow {
    /// Maps `len_bytes` of `fd` from `offset_bytes`, a multiple of the page size.
    ///
    /// # Errors
    /// An empty range, too many mappings, or the kernel's refusal.
    pub fn map(
        fd: BorrowedFd<'_>,
        offset_bytes: u64,
        len_bytes: usize,
    ) -> Result<DeviceWindow, MappingError> {
        let len = len_bytes as u64;
        if len_bytes == 0
            || isize::try_from(len_bytes).is_err()
            || offset_bytes.checked_add(len).is_none()
        {
            return Err(MappingError::Length { offset_bytes, len_bytes: len });
        }
        let raw = MmapOptions::new()
            .offset(offset_bytes)
            .len(len_bytes)
            .map_raw(fd.as_raw_fd())
            .map_err(|source| MappingError::Mmap { len_bytes: len, source })?;
        let guard = sigbus::Guard::register(raw.as_mut_ptr() as usize, len_bytes)
            .ok_or(MappingError::TooMany(crate::limits::FOREIGN_MAPPINGS_MAX))?;
        Ok(DeviceWindow { guard, raw, len_bytes, retired: AtomicBool::new(false) })
    }

    /// Bytes in the window.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// True once the window shows the device no more: retired, or an access failed because the device is gone.
    #[inline]
    #[must_use]
    pub fn failed(&self) -> bool {
        // Acquire: whoever put other pages there raised the flag before.
        self.retired.load(Ordering::Acquire) || self.guard.failed()
    }

    #[inline(always)]
    fn at(&self, offset_bytes: usize, size_bytes: usize) -> Option<*mut u8> {
        let inside = offset_bytes <= self.len_bytes && size_bytes <= self.len_bytes - offset_bytes;
        if !inside || !offset_bytes.is_multiple_of(size_bytes) {
            return None;
        }
        // SAFETY: inside the mapping, checked above.
        Some(unsafe { self.raw.as_mut_ptr().add(offset_bytes) })
    }

    /// Reads 32 bits; ones outside the window, at an odd place, or from a device that is gone.
    #[inline]
    #[must_use]
    #[expect(clippy::cast_ptr_alignment, reason = "`at` checks it; the mapping starts on a page")]
    pub fn read_u32(&self, offset_bytes: usize) -> u32 {
        let Some(at) = self.at(offset_bytes, size_of::<u32>()) else { return u32::MAX };
        // SAFETY: in bounds and aligned by `at`; a fault is answered by the SIGBUS handler.
        let value = unsafe { at.cast::<u32>().read_volatile() };
        if self.failed() { u32::MAX } else { u32::from_le(value) }
    }

    /// The same with 64 bits in one access.
    #[inline]
    #[must_use]
    #[expect(clippy::cast_ptr_alignment, reason = "`at` checks it; the mapping starts on a page")]
    pub fn read_u64(&self, offset_bytes: usize) -> u64 {
        let Some(at) = self.at(offset_bytes, size_of::<u64>()) else { return u64::MAX };
        // SAFETY: as in `read_u32`.
        let value = unsafe { at.cast::<u64>().read_volatile() };
        if self.failed() { u64::MAX } else { u64::from_le(value) }
    }

    /// Writes 32 bits after everything that was stored to memory before; ignored outside the window and at an odd place.
    #[inline]
    #[expect(clippy::cast_ptr_alignment, reason = "`at` checks it; the mapping starts on a page")]
    pub fn write_u32(&self, offset_bytes: usize, value: u32) {
        let Some(at) = self.at(offset_bytes, size_of::<u32>()) else { return };
        // On x86 this is for the compiler only: stores to uncached memory come after those to ordinary memory.
        fence(Ordering::Release);
        // SAFETY: as in `read_u32`.
        unsafe { at.cast::<u32>().write_volatile(value.to_le()) };
    }

    /// The same with 64 bits in one access.
    #[inline]
    #[expect(clippy::cast_ptr_alignment, reason = "`at` checks it; the mapping starts on a page")]
    pub fn write_u64(&self, offset_bytes: usize, value: u64) {
        let Some(at) = self.at(offset_bytes, size_of::<u64>()) else { return };
        fence(Ordering::Release);
        // SAFETY: as in `read_u32`.
        unsafe { at.cast::<u64>().write_volatile(value.to_le()) };
    }

    /// Lets go of the device (and of the kernel's hold on its descriptor) while others may still use the window. For
    /// control threads; it may be called again.
    #[cold]
    pub fn retire(&self) {
        if self.retired.swap(true, Ordering::AcqRel) {
            return;
        }
        // Where the kernel has no memory for this, the device's pages stay until the window is dropped.
        // SAFETY: exactly the range that `raw` maps and unmaps when it is dropped; no reference into it exists.
        let _ = unsafe {
            libc::mmap(
                self.raw.as_mut_ptr().cast(),
                self.len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    fn registers(len: u64) -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        File::from(fd)
    }

    #[test]
    fn accesses_are_little_endian_and_stay_inside() {
        use std::os::unix::fs::FileExt;
        let file = registers(4096 * 3);
        let window = DeviceWindow::map(file.as_fd(), 4096, 4096).unwrap();
        window.write_u32(4, 0x0102_0304);
        window.write_u64(8, 0x1112_1314_1516_1718);
        let mut bytes = [0; 16];
        file.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(bytes[4..8], [4, 3, 2, 1]);
        assert_eq!(bytes[8], 0x18);
        assert_eq!((window.read_u32(4), window.read_u64(8)), (0x0102_0304, 0x1112_1314_1516_1718));

        for offset in [4094, 4096, 4100, usize::MAX - 3, usize::MAX] {
            window.write_u32(offset, 7);
            window.write_u64(offset, 7);
            assert_eq!((window.read_u32(offset), window.read_u64(offset)), (u32::MAX, u64::MAX));
        }
        // Neither the page before nor the one behind was touched, and odd places are none.
        window.write_u32(2, 7);
        window.write_u64(4, 7);
        assert_eq!(window.read_u64(12), u64::MAX);
        let mut all = [0; 4096 * 3];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte != 0).count(), 12);
    }

    #[test]
    fn a_device_that_goes_away_answers_ones() {
        super::super::install_sigbus_handler().unwrap();
        let file = registers(8192);
        let window = DeviceWindow::map(file.as_fd(), 0, 8192).unwrap();
        assert_eq!(window.read_u32(4096), 0);
        file.set_len(0).unwrap();
        assert_eq!(window.read_u32(4096), u32::MAX);
        assert!(window.failed());
        window.write_u32(0, 0);
        assert_eq!(window.read_u64(0), u64::MAX);
    }

    #[test]
    fn a_retired_window_reaches_nobody() {
        use std::os::unix::fs::FileExt;
        let file = registers(4096);
        let window = DeviceWindow::map(file.as_fd(), 0, 4096).unwrap();
        window.write_u32(0, 5);
        window.retire();
        window.retire();
        window.write_u32(0, 6);
        assert_eq!(window.read_u32(0), u32::MAX);
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [5, 0, 0, 0]);
    }

    #[test]
    fn empty_and_endless_ranges_are_refused() {
        let file = registers(4096);
        assert!(DeviceWindow::map(file.as_fd(), 0, 0).is_err());
        assert!(DeviceWindow::map(file.as_fd(), u64::MAX - 4095, 4096).is_err());
        assert!(DeviceWindow::map(file.as_fd(), 0, usize::MAX).is_err());
    }
}
