//! Why an image cannot be opened, in sentences for the person who named it.
//!
//! **Invariant:** each message is one line, names the path and the offending value, and says what to do.

use std::io;
use std::path::PathBuf;

use ringmill_core::bdev::BdevError;
use thiserror::Error;

/// Why a disk could not be opened.
#[derive(Debug, Error)]
#[error("disk {name:?}: {problem}")]
pub struct UringOpenError {
    /// The disk's name.
    pub name: String,
    /// What is wrong.
    #[source]
    pub problem: OpenProblem,
}

impl UringOpenError {
    /// True when somebody else has the image now: after a crash that may be the dead process's own requests, which still
    /// run in the kernel, so trying again for a bounded time is right.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self.problem, OpenProblem::Locked { .. } | OpenProblem::Busy { .. })
    }
}

impl UringOpenError {
    /// The errno that says the same, for clients that go by numbers.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match &self.problem {
            OpenProblem::Missing { .. } => libc::ENOENT,
            OpenProblem::Directory { .. } => libc::EISDIR,
            OpenProblem::Permission { .. } => libc::EACCES,
            OpenProblem::ReadOnlyMedium { .. } => libc::EROFS,
            OpenProblem::Mounted { .. }
            | OpenProblem::Swap { .. }
            | OpenProblem::Busy { .. }
            | OpenProblem::Locked { .. } => libc::EBUSY,
            OpenProblem::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EINVAL,
        }
    }
}

impl From<UringOpenError> for BdevError {
    fn from(error: UringOpenError) -> BdevError {
        BdevError::Refused { reason: error.problem.to_string(), name: error.name }
    }
}

/// What is wrong with an image.
#[derive(Debug, Error)]
pub enum OpenProblem {
    /// No such file.
    #[error("{path:?} does not exist; create it first, for example with `truncate -s 10G`")]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// A directory.
    #[error("{path:?} is a directory; give an image file or a block device")]
    Directory {
        /// The image.
        path: PathBuf,
    },
    /// Neither file nor block device.
    #[error("{path:?} is a {kind}; give a regular file or a block device")]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Not allowed.
    #[error("{path:?}: no permission for {access}; change its owner or mode{hint}")]
    Permission {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        access: &'static str,
        /// Another way out.
        hint: &'static str,
    },
    /// On a read-only filesystem or medium.
    #[error("{path:?} is on a read-only filesystem or device; set readonly = true")]
    ReadOnlyMedium {
        /// The image.
        path: PathBuf,
    },
    /// Zero bytes.
    #[error("{path:?} is empty; give it a size, for example with `truncate -s 10G`")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// An odd tail.
    #[error(
        "{path:?} has {size_bytes} bytes, not a multiple of the block size {block_bytes}; grow it to {next_bytes} \
         with `truncate -s {next_bytes}`"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its bytes.
        size_bytes: u64,
        /// The block.
        block_bytes: u32,
        /// The next size that would do.
        next_bytes: u64,
    },
    /// The wanted block is smaller than what the device can do.
    #[error(
        "{path:?} does direct I/O in blocks of {device_bytes} bytes, more than the block size {block_bytes}; leave the \
         block size out, set at least {device_bytes}, or set cache = \"writeback\""
    )]
    Block {
        /// The image.
        path: PathBuf,
        /// The block asked for.
        block_bytes: u32,
        /// The smallest that works.
        device_bytes: u32,
    },
    /// An impossible geometry.
    #[error("{path:?}: {reason}")]
    Geometry {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No O_DIRECT.
    #[error("{path:?} does not support direct I/O (cache = \"none\"); set cache = \"writeback\"")]
    Direct {
        /// The image.
        path: PathBuf,
    },
    /// IOPOLL is impossible.
    #[error("{path:?}: iopoll = true, but {why}; leave iopoll out")]
    Poll {
        /// The image.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// Mounted.
    #[error("{path:?} is mounted at {at:?}; unmount it, or set readonly = true")]
    Mounted {
        /// The device.
        path: PathBuf,
        /// Where.
        at: String,
    },
    /// Used for swapping.
    #[error("{path:?} is used as swap space; run swapoff first")]
    Swap {
        /// The device.
        path: PathBuf,
    },
    /// O_EXCL says no.
    #[error(
        "{path:?} is in use: a mount, RAID, LVM, device-mapper or another program holds it; release it there first"
    )]
    Busy {
        /// The device.
        path: PathBuf,
    },
    /// Somebody has the image lock.
    #[error(
        "{path:?} is locked by another program (a running ringmilld or QEMU?); stop that one, or let both open it with \
         readonly = true"
    )]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// An image format that must not be served as raw.
    #[error(
        "{path:?} is a {format} image, whose contents a guest must not see as a raw disk; convert it with `qemu-img \
         convert -O raw`, or set format = \"raw\" if the guest itself wrote this"
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// Anything else that the kernel said.
    #[error("{path:?}: cannot {what}: {source}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}
