//! The whole data path on one thread under a virtual clock: guest models, split and packed rings, queue workers, a model disk.
//!
//! [`simulate`] runs one seed to its end or to the first broken promise: read your writes, every request answered
//! exactly once, flushed data survives a power cut, no hang, nothing written outside the buffers that a request named.
//! Everything that happens follows from the seed, so a failure is replayed by its number.
//!
//! Scheduler: [`run`]; the driver's side of a ring: [`ring`](GuestRing), [`packed`](PackedDriverRing); the medium: [`disk`]; the expected contents:
//! [`twin`].
//!
//! **Invariant:** the models are written from the specifications and share no code with what they test.

mod dice;
mod disk;
mod guest;
mod memory;
mod packed;
mod ring;
mod run;
mod twin;
mod watch;

pub use dice::Dice;
pub use memory::GuestMemory;
pub use packed::PackedDriverRing;
pub use ring::{Buffer, DriverRing, GuestRing};
pub use run::{Failure, Report, simulate};
