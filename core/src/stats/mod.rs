//! Counters and latency tables: written by one reactor, read by anybody.

mod latency;
mod queue;

pub use latency::{LatencySnapshot, LatencyTable};
pub use queue::{OpStats, QueueStats, Stage};
