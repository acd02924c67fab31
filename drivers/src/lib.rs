//! ringmill-drivers: the block devices behind ringmill's guests.
//!
//! [`null`] never touches data, [`malloc`] is a RAM disk, [`uring`] serves files and block devices of the kernel. Every
//! driver's channel sits behind the [`GateChannel`], the one place that checks bounds, and uring's also behind core's
//! `AlignChannel`.
//!
//! **Invariant:** nothing here knows a guest protocol.

mod flight;
mod gate;
pub mod malloc;
#[cfg(any(test, feature = "model"))]
pub mod model;
pub mod null;
pub mod nvme;
pub mod pci;
pub mod uring;
pub mod vfio;
pub mod vfio_user;

pub use gate::GateChannel;
