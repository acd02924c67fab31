//! The image lock: an open-file-description lock over the whole file, on the very descriptor that does the I/O.
//!
//! **Invariant:** the kernel drops the lock with the last reference to the description, and requests in flight are such
//! references; so whoever gets it knows that a dead owner's I/O has ended (fcntl(2), "Open file description locks").
#![expect(unsafe_code)] // UNSAFETY: the fcntl that rustix does not wrap.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Asks once for the lock: shared with other readers, or alone. `Ok(false)`: somebody else has it.
pub(super) fn try_lock(file: &File, shared: bool) -> io::Result<bool> {
    // SAFETY: an all-zero flock is valid: from the start, length 0 for "to the end", and l_pid 0 as OFD locks demand.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    lock.l_type = i16::try_from(kind).unwrap_or_default();
    // SAFETY: the descriptor is open (borrowed for this call) and `lock` lives through it.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) };
    if rc == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
