//! HOT PATH
//! Transfers that are done at once, on the reactor's own core, by a system call of their own.
//!
//! For media that are memory: their kernel drivers cannot promise not to wait, so io_uring would hand each request to a
//! worker thread, which takes several times as long as the copying. Owner: one reactor. **Invariant:** nothing is out
//! afterwards: the result is there when the call returns.
//!
//! segments → iovecs → preadv2 | pwritev2 → result
#![expect(unsafe_code)] // UNSAFETY: system calls that copy between a file and guest memory.

use std::os::fd::{AsRawFd, BorrowedFd};

use ringmill_core::io::Tag;
use ringmill_core::mem::as_iovecs;
use ringmill_core::units::len_u32;

use super::Flights;
use super::entry::{Cut, Direction, ENTRY_BYTES_MAX, cut};

impl<T> Flights<T> {
    /// Moves the next piece of at most `left_bytes` to or from `offset_bytes`; returns its length and what the kernel says
    /// (bytes moved, or a negative errno). `None` for a request that is not here or out.
    #[inline]
    pub(crate) fn transfer_in_place(
        &mut self,
        fd: BorrowedFd<'_>,
        tag: Tag,
        direction: Direction,
        offset_bytes: u64,
        left_bytes: u64,
    ) -> Option<(u64, i32)> {
        let flight = self.slots.get_mut(tag).filter(|flight| !flight.out)?;
        let segments = flight.segments.as_mut_slice().get_mut(flight.first..).unwrap_or(&mut []);
        let one;
        let (list, count, piece_bytes) = match cut(segments, left_bytes.min(ENTRY_BYTES_MAX)) {
            Cut::One(host, len) => {
                one = libc::iovec { iov_base: host as *mut libc::c_void, iov_len: len as usize };
                (&raw const one, 1, u64::from(len))
            }
            Cut::Many(count, bytes) => (as_iovecs(&mut segments[..count]), len_u32(count), bytes),
        };
        let (fd, at) = (fd.as_raw_fd(), offset_bytes.cast_signed());
        let count = count.cast_signed();
        let moved = match direction {
            // SAFETY: each iovec names memory inside a live mapping (invariant of `Segment`); the kernel copies and answers
            // EFAULT where such memory went away. The array lies here or in the slot, until the call returns.
            Direction::Read => unsafe { libc::preadv2(fd, list, count, at, 0) },
            // SAFETY: as above.
            Direction::Write(flags) => unsafe { libc::pwritev2(fd, list, count, at, flags) },
        };
        let result = i32::try_from(moved).unwrap_or(i32::MAX);
        if result >= 0 {
            return Some((piece_bytes, result));
        }
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Some((piece_bytes, -errno))
    }
}
