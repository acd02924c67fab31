//! HOT PATH
//! The door of every driver: requests that no device could carry out end here.
//!
//! Owner: one reactor. **Invariant:** what passes lies inside the device, counts whole sectors, is not empty, fits its
//! segments and, on a read-only device, changes nothing; so no channel below checks any of that again.
//!
//! submit: a run of good requests → the device in one call; a bad one → completed with its reason; next run

use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::bdev::{BdevInfo, Channel, ReadyQueue, Room};
use ringmill_core::io::{BatchView, Completion, Completions, IoOp, IoRequest};
use ringmill_core::limits::{BATCH_REQUESTS_MAX, SECTOR_BYTES};
use ringmill_core::mem::{Segment, total_bytes};
use ringmill_core::reactor::IoCx;

/// A driver's channel behind the checks that all drivers share.
#[derive(Debug)]
pub struct GateChannel<C> {
    inner: C,
    info: Arc<BdevInfo>,
    /// Those that ended here; as many as one batch can bring.
    ready: ReadyQueue,
}

/// How the request ends without the device; `None` when it may pass.
#[inline]
fn verdict(
    request: &IoRequest,
    segments: &[Segment],
    size_bytes: u64,
    read_only: bool,
) -> Option<IoStatus> {
    if request.op == IoOp::Flush {
        return None;
    }
    let (offset, len) = (request.offset_bytes, request.len_bytes);
    if read_only && request.op.changes_data() {
        return Some(IoStatus::ReadOnly);
    }
    if (offset | len) & u64::from(SECTOR_BYTES - 1) != 0 {
        return Some(IoStatus::Invalid);
    }
    if offset.checked_add(len).is_none_or(|end| end > size_bytes) {
        return Some(IoStatus::Range);
    }
    if request.op.has_data() && total_bytes(segments) != len {
        return Some(IoStatus::Invalid);
    }
    (len == 0).then_some(IoStatus::Ok)
}

impl<C: Channel> GateChannel<C> {
    /// Puts the door before `inner`.
    #[must_use]
    pub fn new(inner: C, info: Arc<BdevInfo>) -> GateChannel<C> {
        GateChannel { inner, info, ready: ReadyQueue::new(BATCH_REQUESTS_MAX) }
    }
}

impl<C: Channel> Channel for GateChannel<C> {
    #[inline]
    fn room(&self, io: &IoCx) -> Room {
        self.inner.room(io)
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let requests = batch.requests();
        let (size_bytes, read_only) = (self.info.size_bytes(), self.info.geometry().read_only);
        let judge =
            |request: &IoRequest| verdict(request, batch.segments(request), size_bytes, read_only);
        let mut at = 0;
        while at < requests.len() {
            let mut end = at;
            let mut bad = None;
            while end < requests.len() {
                bad = judge(&requests[end]);
                if bad.is_some() {
                    break;
                }
                end += 1;
            }
            if end > at {
                at += self.inner.submit(io, batch.slice(at, end));
                if at < end {
                    return at;
                }
            }
            if let Some(status) = bad {
                if self.ready.room() == 0 {
                    return at;
                }
                self.ready.push(Completion { tag: requests[at].tag, status });
                at += 1;
            }
        }
        at
    }

    #[inline]
    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        if !self.ready.is_empty() {
            self.ready.drain_into(done);
        }
        self.inner.poll(io, done);
    }

    fn inflight(&self) -> usize {
        self.inner.inflight() + self.ready.len()
    }

    fn must_poll(&self) -> bool {
        !self.ready.is_empty() || self.inner.must_poll()
    }

    fn close(&mut self, io: &mut IoCx) {
        self.inner.close(io);
    }
}

#[cfg(test)]
mod tests {
    use ringmill_core::io::{IoFlags, Tag};

    use super::*;

    fn request(op: IoOp, offset_bytes: u64, len_bytes: u64) -> IoRequest {
        let (segments_at, segments_count) = (0, 0);
        let (tag, flags) = (Tag(0), IoFlags::NONE);
        IoRequest { offset_bytes, len_bytes, tag, segments_at, segments_count, op, flags }
    }

    #[test]
    fn nothing_passes_that_reaches_beyond_the_end_or_wraps() {
        let judge = |op, offset, len| verdict(&request(op, offset, len), &[], 1 << 20, false);
        assert_eq!(judge(IoOp::Discard, 0, 1 << 20), None);
        assert_eq!(judge(IoOp::Discard, 512, 1 << 20), Some(IoStatus::Range));
        assert_eq!(judge(IoOp::WriteZeroes, 1 << 20, 512), Some(IoStatus::Range));
        assert_eq!(judge(IoOp::Discard, u64::MAX - 511, 512), Some(IoStatus::Range));
        assert_eq!(judge(IoOp::Discard, u64::MAX - 511, u64::MAX - 511), Some(IoStatus::Range));
        assert_eq!(judge(IoOp::Read, 0, 512), Some(IoStatus::Invalid), "no segments for the data");
        assert_eq!(judge(IoOp::Discard, 1, 512), Some(IoStatus::Invalid));
        assert_eq!(judge(IoOp::Discard, 1 << 20, 0), Some(IoStatus::Ok));
        assert_eq!(judge(IoOp::Flush, 77, 0), None);
    }

    #[test]
    fn a_read_only_device_refuses_every_change() {
        for op in IoOp::ALL {
            let got = verdict(&request(op, 0, 0), &[], 512, true);
            assert_eq!(got == Some(IoStatus::ReadOnly), op.changes_data(), "{op:?}");
        }
    }
}
