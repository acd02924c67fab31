//! HOT PATH
//! The requests that were answered in this pass, until their figures are recorded: after the guest could see them.
//!
//! Owner: one worker, within one poll. **Invariant:** every answered request is recorded exactly once.
//!
//! push per answer → publish → record all with one clock read
//!
//! Requests that came in one batch and ended in one batch have the same times, so they are counted in groups: recording
//! costs per group and not per request.

use arrayvec::ArrayVec;
use ringmill_core::io::IoOp;
use ringmill_core::limits::BATCH_REQUESTS_MAX;
use ringmill_core::stats::{QueueStats, Stage};

/// Groups, from the last one back, that a request is compared with: reads and writes mixed make two.
const GROUPS_COMPARED: usize = 4;

/// Answered requests of one kind and with the same times.
#[derive(Debug)]
struct Group {
    op: IoOp,
    ok: bool,
    requests_count: u32,
    bytes: u64,
    /// Seen on the ring, handed to the device.
    times_ns: (u64, u64),
}

/// Those of one pass.
#[derive(Debug)]
pub(super) struct FinishedList {
    groups: ArrayVec<Group, BATCH_REQUESTS_MAX>,
    requests_count: u32,
    /// False: they are only counted, for interrupt coalescing.
    recording: bool,
}

impl FinishedList {
    #[inline]
    pub(super) fn new(recording: bool) -> FinishedList {
        FinishedList { groups: ArrayVec::new(), requests_count: 0, recording }
    }

    /// Adds a request, seen on the ring and handed to the device at `times_ns`; a pass answers at most a batch.
    #[inline]
    pub(super) fn push(&mut self, op: IoOp, ok: bool, bytes: u64, times_ns: (u64, u64)) {
        self.requests_count += 1;
        if !self.recording {
            return;
        }
        let last = self.groups.iter_mut().rev().take(GROUPS_COMPARED);
        for group in last {
            if group.times_ns == times_ns && group.op == op && group.ok == ok {
                group.requests_count += 1;
                group.bytes += bytes;
                return;
            }
        }
        self.groups.push(Group { op, ok, requests_count: 1, bytes, times_ns });
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.requests_count == 0
    }

    #[inline]
    pub(super) fn requests_count(&self) -> u32 {
        self.requests_count
    }

    /// Records all: the device's completions were seen at `completed_ns`, the guest could see the answers at
    /// `published_ns`.
    #[inline]
    pub(super) fn record(&self, stats: &QueueStats, completed_ns: u64, published_ns: u64) {
        let complete_ns = published_ns.saturating_sub(completed_ns);
        for group in &self.groups {
            let (seen_ns, submitted_ns) = group.times_ns;
            let (op, count) = (stats.op(group.op), group.requests_count);
            op.count(count, group.bytes, group.ok);
            op.stage(Stage::Queue).record_many(submitted_ns.saturating_sub(seen_ns), count);
            op.stage(Stage::Device).record_many(completed_ns.saturating_sub(submitted_ns), count);
            op.stage(Stage::Complete).record_many(complete_ns, count);
            op.stage(Stage::Total).record_many(published_ns.saturating_sub(seen_ns), count);
        }
    }
}
