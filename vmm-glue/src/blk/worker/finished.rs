//! HOT PATH
//! The requests that were answered in this pass, until their figures are recorded: after the guest could see them.
//!
//! Owner: one worker, within one poll. **Invariant:** every answered request is recorded exactly once.
//!
//! push per answer → publish → record all with one clock read

use arrayvec::ArrayVec;
use ringmill_core::io::IoOp;
use ringmill_core::limits::BATCH_REQUESTS_MAX;
use ringmill_core::stats::{QueueStats, Stage};

/// One answered request.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) op: IoOp,
    pub(super) ok: bool,
    pub(super) bytes: u64,
    pub(super) seen_ns: u64,
    pub(super) submitted_ns: u64,
}

/// Those of one pass.
#[derive(Debug, Default)]
pub(super) struct FinishedList {
    list: ArrayVec<Finished, BATCH_REQUESTS_MAX>,
}

impl FinishedList {
    /// Adds one; a pass answers at most a batch.
    #[inline]
    pub(super) fn push(&mut self, finished: Finished) {
        self.list.push(finished);
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Records all: the device's completions were seen at `completed_ns`, the guest could see the answers at
    /// `published_ns`.
    #[inline]
    pub(super) fn record(&mut self, stats: &QueueStats, completed_ns: u64, published_ns: u64) {
        let complete_ns = published_ns.saturating_sub(completed_ns);
        for done in self.list.drain(..) {
            let op = stats.op(done.op);
            op.count(done.bytes, done.ok);
            op.stage(Stage::Queue).record(done.submitted_ns.saturating_sub(done.seen_ns));
            op.stage(Stage::Device).record(completed_ns.saturating_sub(done.submitted_ns));
            op.stage(Stage::Complete).record(complete_ns);
            op.stage(Stage::Total).record(published_ns.saturating_sub(done.seen_ns));
        }
    }
}
