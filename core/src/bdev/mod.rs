//! Block devices: what they are, how a reactor reaches them, who may use them.
//!
//! A [`Bdev`] is a named device that control threads know; a [`Channel`] is one reactor's private way into it. The
//! [`registry`](Registry) keeps names, claims and events. [`AlignChannel`] gives every block driver bounce buffers and
//! sub-block writes.

mod align;
mod block_lock;
mod channel;
#[cfg(feature = "conformance")]
pub mod conformance;
mod info;
mod registry;

pub use align::{AlignChannel, Alignment};
pub use block_lock::BlockLocks;
pub use channel::{Channel, InstantChannel, ReadyQueue, Room};
pub use info::{Bdev, BdevError, BdevInfo, ChannelSeed, Geometry};
pub use registry::{BdevEvent, Claim, Listener, Registry, RegistryError};
