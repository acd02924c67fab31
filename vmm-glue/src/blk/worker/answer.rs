//! Requests that need no device: GET_ID, refusals, transfers of nothing.

use ringmill_core::io::IoOp;
use ringmill_core::reactor::ReactorCx;
use ringmill_core::stats::Stage;
use ringmill_core::status::IoStatus;

use crate::blk::request::{Parsed, Refusal};
use crate::virtq::Chain;

use super::{QueueWorker, Tracking, Virtqueue, written};

/// How a chain is answered without the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    /// What it is counted as; GET_ID is not.
    op: Option<IoOp>,
    status: IoStatus,
}

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    /// What to answer. A GET_ID gets its data now; if it goes back to the ring, it gets it again.
    #[cold]
    #[inline(never)]
    pub(super) fn prepare_answer(&self, cx: &mut ReactorCx, parsed: &Parsed) -> Answer {
        match *parsed {
            Parsed::GetId { segments_at, segments_count } => {
                let mut rest: &[u8] = self.parts.device.serial();
                for segment in cx.batch.segments_mut(segments_at, segments_count) {
                    rest = &rest[segment.write_from(rest)..];
                }
                Answer { op: None, status: IoStatus::Ok }
            }
            Parsed::Answer(Refusal { op, status }) => Answer { op: Some(op), status },
            // Not asked for; a request without a slot would be the worker's fault and never the medium's.
            Parsed::Io(request) => Answer { op: Some(request.op), status: IoStatus::Memory },
        }
    }

    /// Answers a request that needs no device.
    #[cold]
    #[inline(never)]
    pub(super) fn answer(
        &mut self,
        cx: &mut ReactorCx,
        chain: &Chain,
        seen_ns: u64,
        answer: &Answer,
    ) {
        chain.status.write_u8(answer.status.to_virtio());
        self.unmark(chain.head);
        self.parts.tracking.answered(chain.head);
        self.parts.queue.put_used(chain.head, written(chain));
        if let Some(op) = answer.op
            && self.parts.device.is_recording()
        {
            let stats = self.parts.status.stats.op(op);
            stats.count(1, 0, answer.status.is_ok());
            stats.stage(Stage::Total).record(cx.io.clock.now_ns().saturating_sub(seen_ns));
        }
    }
}
