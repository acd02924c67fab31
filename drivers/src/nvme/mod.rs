//! NVMe controllers, driven from user space.
//!
//! A controller has a thread of its own (admin queue, timeouts, resets) and a queue pair per reactor; the two speak through
//! [`QueueShared`] only.

#[allow(dead_code, reason = "as below")]
mod parts;
#[allow(dead_code, reason = "the queue pair, which comes next, uses the reactor's side")]
mod shared;

pub use parts::{
    BindVector, DiscardLimits, Interrupts, NamespaceShape, QueueMemory, QueueMemoryError,
    QueuePairParts, ShadowDoorbells, WriteZeroesLimits,
};
pub use shared::{FailReason, Order, Overdue, QueueCounters, QueueShared, Trouble};
