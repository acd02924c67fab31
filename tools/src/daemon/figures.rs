//! Counters and latencies as statistics show them: sums over queues, minus what a reset put behind us.
//!
//! In: the queues' tables (written by reactors). Out: rows for the RPC. **Invariant:** a reset never writes to a table;
//! it remembers the values of that moment.

use std::collections::HashMap;

use ringmill_core::io::IoOp;
use ringmill_core::reactor::ns_to_ticks;
use ringmill_core::stats::{LatencySnapshot, QueueStats, Stage};

use crate::rpc::engine::{IoStats, OpStats, ResetMode};

/// The figures of one operation at one moment.
#[derive(Clone, Debug, Default)]
pub struct OpFigures {
    ops_count: u64,
    bytes: u64,
    total: LatencySnapshot,
}

impl OpFigures {
    fn of(stats: &QueueStats, op: IoOp) -> OpFigures {
        let figures = stats.op(op);
        OpFigures {
            ops_count: figures.ops_count(),
            bytes: figures.bytes(),
            total: figures.stage(Stage::Total).snapshot(),
        }
    }

    fn add(&mut self, other: &OpFigures) {
        self.ops_count += other.ops_count;
        self.bytes += other.bytes;
        self.total.merge(&other.total);
    }

    fn since(&self, base: &OpFigures) -> OpFigures {
        OpFigures {
            ops_count: self.ops_count.wrapping_sub(base.ops_count),
            bytes: self.bytes.wrapping_sub(base.bytes),
            total: self.total.since(&base.total),
        }
    }

    fn to_stats(&self) -> OpStats {
        OpStats {
            ops_count: self.ops_count,
            bytes: self.bytes,
            latency_ticks: ns_to_ticks(self.total.sum_ns()),
            latency_max_ticks: ns_to_ticks(self.total.max_ns()),
            latency_min_ticks: ns_to_ticks(self.total.min_ns()),
        }
    }
}

/// The figures of all operations of one disk at one moment.
#[derive(Clone, Debug, Default)]
pub struct DiskFigures {
    ops: [OpFigures; 5],
}

impl DiskFigures {
    /// The sum over some queues.
    pub fn of<'a>(queues: impl Iterator<Item = &'a QueueStats>) -> DiskFigures {
        let mut sum = DiskFigures::default();
        for queue in queues {
            for (op, figures) in IoOp::ALL.into_iter().zip(&mut sum.ops) {
                figures.add(&OpFigures::of(queue, op));
            }
        }
        sum
    }

    /// Adds the figures of a disk's former controller.
    pub fn add(&mut self, other: &DiskFigures) {
        for (figures, other) in self.ops.iter_mut().zip(&other.ops) {
            figures.add(other);
        }
    }

    /// What came after `base`.
    #[must_use]
    pub fn since(&self, base: &DiskFigures) -> DiskFigures {
        let mut out = self.clone();
        for (figures, base) in out.ops.iter_mut().zip(&base.ops) {
            *figures = figures.since(base);
        }
        out
    }

    /// As the RPC shows them.
    #[must_use]
    pub fn to_io_stats(&self, bdev: &str, thread_id: Option<u64>) -> IoStats {
        let op = |op: IoOp| self.ops[op as usize].to_stats();
        IoStats {
            bdev: bdev.to_owned(),
            thread_id,
            read: op(IoOp::Read),
            write: op(IoOp::Write),
            unmap: op(IoOp::Discard),
            flush: op(IoOp::Flush),
            write_zeroes: op(IoOp::WriteZeroes),
        }
    }

    /// The latencies of one operation, or of all.
    #[must_use]
    pub fn total_latency(&self, only: Option<IoOp>) -> LatencySnapshot {
        let mut sum = LatencySnapshot::default();
        for (op, figures) in IoOp::ALL.into_iter().zip(&self.ops) {
            if only.is_none_or(|o| o == op) {
                sum.merge(&figures.total);
            }
        }
        sum
    }
}

/// What resets of counters put behind us, per bdev.
#[derive(Debug, Default)]
pub struct IoBaselines {
    all: HashMap<String, DiskFigures>,
    /// A reset of maxima and minima only: those are then taken from after this moment.
    extremes: HashMap<String, DiskFigures>,
}

impl IoBaselines {
    /// The figures since the last reset.
    #[must_use]
    pub fn apply(&self, bdev: &str, now: &DiskFigures, thread_id: Option<u64>) -> IoStats {
        let since = |base: Option<&DiskFigures>| base.map_or_else(|| now.clone(), |b| now.since(b));
        let mut stats = since(self.all.get(bdev)).to_io_stats(bdev, thread_id);
        if let Some(base) = self.extremes.get(bdev) {
            let recent = now.since(base).to_io_stats(bdev, thread_id);
            for (stats, recent) in [
                (&mut stats.read, recent.read),
                (&mut stats.write, recent.write),
                (&mut stats.unmap, recent.unmap),
                (&mut stats.flush, recent.flush),
                (&mut stats.write_zeroes, recent.write_zeroes),
            ] {
                stats.latency_max_ticks = recent.latency_max_ticks;
                stats.latency_min_ticks = recent.latency_min_ticks;
            }
        }
        stats
    }

    /// Remembers this moment.
    pub fn reset(&mut self, bdev: &str, now: DiskFigures, mode: ResetMode) {
        match mode {
            ResetMode::None => {}
            ResetMode::All => {
                self.extremes.remove(bdev);
                self.all.insert(bdev.to_owned(), now);
            }
            ResetMode::MaxMin => {
                self.extremes.insert(bdev.to_owned(), now);
            }
        }
    }

    /// The bdev is gone.
    pub fn forget(&mut self, bdev: &str) {
        self.all.remove(bdev);
        self.extremes.remove(bdev);
    }
}
