//! Why a controller cannot be used, in words that say what to do.

use std::time::Duration;

use ringmill_core::bdev::BdevError;
use ringmill_core::mem::{DmaError, MappingError};
use ringmill_core::spec::nvme::Status;
use thiserror::Error;

use super::parts::QueueMemoryError;
use crate::pci::PciError;

/// Why a controller cannot be used. Every message names the device.
#[derive(Debug, Error)]
pub enum NvmeError {
    /// The device below.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// It cannot reach memory.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// No memory for queues.
    #[error(transparent)]
    Memory(#[from] MappingError),
    /// No memory for a queue pair.
    #[error(transparent)]
    Queue(#[from] QueueMemoryError),
    /// A bdev of it could not be made.
    #[error(transparent)]
    Bdev(#[from] BdevError),
    /// An option that makes no sense.
    #[error("NVMe controller {name:?}: {reason}")]
    Option {
        /// The name asked for.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// It answers all ones, or was pulled out.
    #[error("{device} is gone; attach it again when it is back")]
    Gone {
        /// The device.
        device: String,
    },
    /// It is to be let go of at once, in the middle of something.
    #[error("{device} is wanted back while it does not answer")]
    Wanted {
        /// The device.
        device: String,
    },
    /// Attaching it was cancelled.
    #[error("attaching {device} was cancelled")]
    Cancelled {
        /// The device.
        device: String,
    },
    /// It set its fatal status and says nothing more.
    #[error("{device} reports a fatal error (CSTS.CFS); reset it, or power it off and on")]
    Fatal {
        /// The device.
        device: String,
    },
    /// It did not do what it must do in time.
    #[error("{device} did not {what} within {} ms; {advice}", within.as_millis())]
    TooSlow {
        /// The device.
        device: String,
        /// What it was to do.
        what: &'static str,
        /// How long it had.
        within: Duration,
        /// What to do.
        advice: &'static str,
    },
    /// An admin command failed.
    #[error("{device} refuses {command}: {status:?}")]
    Command {
        /// The device.
        device: String,
        /// The command in words.
        command: &'static str,
        /// Its status.
        status: Status,
    },
    /// It contradicts the specification, or itself.
    #[error("{device} answers nonsense: {what}; it is broken, or not an NVMe controller")]
    Nonsense {
        /// The device.
        device: String,
        /// What it answered.
        what: String,
    },
    /// It is sound, but cannot be used as it is.
    #[error("{device}: {reason}")]
    Refused {
        /// The device.
        device: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A controller that was detached or failed.
    #[error("NVMe controller {name:?} is {state}; detach it and attach it again")]
    Down {
        /// Its name.
        name: String,
        /// What became of it.
        state: &'static str,
    },
}

impl NvmeError {
    /// True when there is nobody to talk to any more, or nobody should.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(
            self,
            NvmeError::Gone { .. }
                | NvmeError::Wanted { .. }
                | NvmeError::Pci(PciError::Gone { .. })
                | NvmeError::Dma(DmaError::Gone { .. })
        )
    }
}
