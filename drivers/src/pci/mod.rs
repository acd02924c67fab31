//! The seam between a PCI driver and its device: registers, memory, interrupts, reset.
//!
//! Flow: a driver is generic over [`PciBacking`] and compiled once per kind: VFIO, vfio-user, the device models. Owner:
//! control threads; only [`Registers`] (doorbells) go to reactors. **Invariant:** whatever a device answers, no call here
//! panics or blocks for longer than it says.

mod address;
mod cancel;
mod signal;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ringmill_core::mem::DmaDomain;
use thiserror::Error;

pub use address::{PciAddress, PciAddressError};
pub use cancel::{CancelToken, Ended};
pub(crate) use signal::take_signal;

/// Why a device cannot be used. Messages name the device and say what to do.
#[derive(Debug, Error)]
pub enum PciError {
    /// It is gone: pulled out, its process has ended, or it answers nothing but ones.
    #[error("{device} is gone")]
    Gone {
        /// The device.
        device: String,
    },
    /// The kernel, or the process behind the device, refuses.
    #[error("{device}: {what}: {source}")]
    Io {
        /// The device.
        device: String,
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// What a user can mend.
    #[error("{device}: {reason}")]
    Refused {
        /// The device.
        device: String,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// A window of device registers. Accesses are little-endian, naturally aligned, volatile and in program order among
/// themselves; stores to memory before a register write are visible to the device before it.
pub trait Registers: Send + Sync + 'static {
    /// Bytes in the window.
    fn len_bytes(&self) -> usize;

    /// Reads 32 bits at `offset_bytes`; all ones from a device that is gone, and outside the window.
    fn read_u32(&self, offset_bytes: usize) -> u32;

    /// Reads 64 bits, as one access where the platform and device can, otherwise the lower half first.
    fn read_u64(&self, offset_bytes: usize) -> u64 {
        let low = self.read_u32(offset_bytes);
        u64::from(low) | u64::from(self.read_u32(offset_bytes + 4)) << 32
    }

    /// Writes 32 bits; ignored outside the window.
    fn write_u32(&self, offset_bytes: usize, value: u32);

    /// Writes 64 bits, the lower half first.
    fn write_u64(&self, offset_bytes: usize, value: u64) {
        let bytes = value.to_le_bytes();
        self.write_u32(offset_bytes, u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        self.write_u32(
            offset_bytes + 4,
            u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        );
    }
}

/// News that concern the whole device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceNews {
    /// Somebody wants the device back (VFIO_PCI_REQ_IRQ): let go of it soon.
    Requested,
    /// The bus reported an error (VFIO_PCI_ERR_IRQ).
    Error,
    /// It went away.
    Gone,
}

/// A PCI function that this process drives.
pub trait PciBacking: Send + Sync + fmt::Debug + 'static {
    /// Registers of a BAR.
    type Registers: Registers;

    /// What people call it: `0000:01:00.0`, or a socket's path.
    fn name(&self) -> &str;

    /// The memory that it reaches.
    fn dma(&self) -> Arc<dyn DmaDomain>;

    /// Maps the registers of a BAR (0 to 5), at least `len_bytes_min` of them. The window lives as long as it is held, and
    /// answers ones once the device is gone.
    ///
    /// # Errors
    /// No such BAR, too short, not memory, or gone.
    fn registers(&self, bar: u8, len_bytes_min: usize) -> Result<Arc<Self::Registers>, PciError>;

    /// Reads from configuration space.
    ///
    /// # Errors
    /// When the device is gone or the range is outside.
    fn config_read(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), PciError>;

    /// Lets the device be a bus master (write to memory, send interrupts), or no longer. Off, it cannot touch memory.
    ///
    /// # Errors
    /// When the device is gone.
    fn set_bus_master(&self, on: bool) -> Result<(), PciError>;

    /// Resets the function (FLR). Blocks for at most some seconds.
    ///
    /// # Errors
    /// When the device cannot be reset, or does not come back.
    fn reset(&self) -> Result<(), PciError>;

    /// Interrupt vectors that can be bound: MSI-X, MSI, or one for INTx; 0 when there are none.
    fn vectors_count(&self) -> u16;

    /// Has `vector` signal this eventfd from now on; `None`: nobody, the device's interrupt is not even raised. May be
    /// called on a reactor that goes to sleep; it does not block.
    ///
    /// # Errors
    /// When the vector does not exist or the kernel refuses.
    fn bind_vector(&self, vector: u16, eventfd: Option<BorrowedFd<'_>>) -> Result<(), PciError>;

    /// After an interrupt by a level (INTx) was handled: allows the next one. Nothing for messages.
    ///
    /// # Errors
    /// When the device is gone.
    fn unmask(&self, _vector: u16) -> Result<(), PciError> {
        Ok(())
    }

    /// A descriptor that becomes readable when there may be news; `None` where there never are.
    fn news_fd(&self) -> Option<BorrowedFd<'_>>;

    /// The next piece of news. Does not block.
    fn news(&self) -> Option<DeviceNews>;

    /// Somebody waits for the end of the device: waits that are generous because guests would lose by it end soon.
    fn hurry_up(&self) {}

    /// Keeps the device from memory at once, if that can be proved here without waiting: the first part of
    /// [`PciBacking::close`], whose other parts may take long. True when it reaches none from now on.
    fn silence(&self) -> bool {
        false
    }

    /// Ends all access: bus master off, reset, interrupts unbound, memory unmapped from the device, descriptors closed.
    /// Further calls answer [`PciError::Gone`], registers ones. Called once nobody needs the device; never waits for long,
    /// and is done by dropping, too.
    fn close(&self);
}
