//! What bdevs, controllers and devices refuse, as clients of the RPC see it: bad parameters, or a failure with an errno.

use ringmill_core::bdev::{BdevError, RegistryError};
use ringmill_core::mem::DmaError;
use ringmill_drivers::nvme::NvmeError;
use ringmill_drivers::pci::PciError;
use ringmill_drivers::uring::UringOpenError;
use ringmill_vmm_glue::blk::ControllerError;

use crate::rpc::engine::EngineError;

pub(super) fn failed(errno: i32, message: impl Into<String>) -> EngineError {
    EngineError::Failed { errno, message: message.into() }
}

pub(super) fn io_errno(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

pub(super) fn bdev_error(error: &BdevError) -> EngineError {
    match error {
        BdevError::Geometry { .. } => EngineError::Refused(error.to_string()),
        BdevError::Io { source, .. } => failed(io_errno(source), error.to_string()),
        BdevError::Memory(_) => failed(libc::ENOMEM, error.to_string()),
        BdevError::Ring(_) | BdevError::Refused { .. } => failed(libc::EINVAL, error.to_string()),
    }
}

pub(super) fn registry_error(error: RegistryError) -> EngineError {
    match error {
        RegistryError::Exists(_) => failed(libc::EEXIST, error.to_string()),
        RegistryError::Missing(name) => EngineError::NoBdev(name),
        RegistryError::Claimed { .. } | RegistryError::Name(_) => {
            EngineError::Refused(error.to_string())
        }
    }
}

pub(super) fn controller_error(error: ControllerError) -> EngineError {
    match error {
        ControllerError::Socket { ref source, .. } => failed(io_errno(source), error.to_string()),
        ControllerError::Bdev(error @ RegistryError::Missing(_)) => {
            EngineError::Refused(error.to_string())
        }
        ControllerError::Bdev(error) => registry_error(error),
        other => EngineError::Refused(other.to_string()),
    }
}

pub(super) fn open_error(error: &UringOpenError) -> EngineError {
    failed(error.errno(), error.to_string())
}

/// A device's failure as clients see it.
pub(super) fn nvme_error(error: &NvmeError) -> EngineError {
    let errno = match error {
        NvmeError::Option { .. } => return EngineError::Refused(error.to_string()),
        NvmeError::Pci(PciError::Io { source, .. })
        | NvmeError::Dma(DmaError::Refused { source, .. }) => io_errno(source),
        NvmeError::Pci(PciError::Gone { .. })
        | NvmeError::Dma(DmaError::Gone { .. })
        | NvmeError::Gone { .. }
        | NvmeError::Wanted { .. }
        | NvmeError::Down { .. } => libc::ENODEV,
        NvmeError::Pci(PciError::Refused { .. }) | NvmeError::Refused { .. } => libc::EINVAL,
        NvmeError::Dma(_) | NvmeError::Memory(_) | NvmeError::Queue(_) => libc::ENOMEM,
        NvmeError::Bdev(error) => return bdev_error(error),
        NvmeError::Cancelled { .. } => libc::ECANCELED,
        NvmeError::TooSlow { .. } => libc::ETIMEDOUT,
        NvmeError::Nonsense { .. } => libc::EPROTO,
        NvmeError::Fatal { .. } | NvmeError::Command { .. } => libc::EIO,
    };
    failed(errno, error.to_string())
}
