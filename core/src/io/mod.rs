//! What travels between a queue worker and a block device: requests, batches, completions, slots.

mod batch;
mod request;
mod slots;

pub use batch::{Batch, BatchView};
pub use request::{Completion, Completions, IoFlags, IoOp, IoRequest, Tag};
pub use slots::Slots;
