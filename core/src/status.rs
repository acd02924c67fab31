//! How a request ended: one byte on the data plane, one table towards guests.

use crate::spec::virtio_blk;

/// The end of a request. `Copy`, one byte; the reasons stay apart because a mirror, a retry or an operator treats them
/// differently even where a virtio guest sees the same error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum IoStatus {
    /// Done; for a write with FUA and for a flush: on stable storage.
    #[default]
    Ok = 0,
    /// The medium or the kernel's driver of it reported an I/O error.
    Medium,
    /// The range lies (partly) outside the device.
    Range,
    /// The backing store is full.
    NoSpace,
    /// A write, discard or write-zeroes on a read-only device.
    ReadOnly,
    /// The device cannot do this operation.
    Unsupported,
    /// The request was malformed.
    Invalid,
    /// No answer within the deadline, and the device has been stopped.
    Timeout,
    /// The device was reset under the request, which may or may not have been carried out.
    Reset,
    /// The device is gone.
    Gone,
    /// The request's memory vanished under it.
    Memory,
}

impl IoStatus {
    /// True for [`IoStatus::Ok`].
    #[inline]
    #[must_use]
    pub fn is_ok(self) -> bool {
        self == IoStatus::Ok
    }

    /// The status byte of virtio-blk (virtio 1.2 §5.2.6).
    #[inline]
    #[must_use]
    pub fn to_virtio(self) -> u8 {
        match self {
            IoStatus::Ok => virtio_blk::S_OK,
            IoStatus::Unsupported => virtio_blk::S_UNSUPP,
            _ => virtio_blk::S_IOERR,
        }
    }

    /// Maps a (positive) errno of the kernel's block layer.
    #[must_use]
    pub fn from_errno(errno: i32) -> IoStatus {
        match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => IoStatus::NoSpace,
            libc::EROFS | libc::EPERM | libc::EBADF => IoStatus::ReadOnly,
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY => IoStatus::Unsupported,
            libc::EINVAL => IoStatus::Invalid,
            libc::ENXIO | libc::ENODEV | libc::ENOLINK => IoStatus::Gone,
            libc::EFAULT => IoStatus::Memory,
            libc::ETIMEDOUT | libc::ETIME => IoStatus::Timeout,
            _ => IoStatus::Medium,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ok_reaches_the_guest_as_ok() {
        assert_eq!(IoStatus::Ok.to_virtio(), 0);
        for errno in 1..200 {
            let status = IoStatus::from_errno(errno);
            assert!(!status.is_ok());
            assert_ne!(status.to_virtio(), 0, "errno {errno}");
        }
    }
}
