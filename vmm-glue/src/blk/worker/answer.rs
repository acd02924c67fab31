//! Requests that need no device: GET_ID, refusals, transfers of nothing.

use ringmill_core::reactor::ReactorCx;
use ringmill_core::stats::Stage;
use ringmill_core::status::IoStatus;

use crate::blk::request::{Parsed, Refusal};
use crate::virtq::Chain;

use super::{QueueWorker, Tracking, Virtqueue, written};

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    /// Gives a GET_ID its data: before `submit`, which empties the batch and with it the list of segments. A request
    /// that goes back to the ring gets it again.
    #[cold]
    #[inline(never)]
    pub(super) fn copy_serial(&self, cx: &mut ReactorCx, answer: &Parsed) {
        let Parsed::GetId { segments_at, segments_count } = *answer else { return };
        let mut rest: &[u8] = self.parts.device.serial();
        for segment in cx.batch.segments_from(segments_at).iter().take(segments_count) {
            rest = &rest[segment.write_from(rest)..];
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
        answer: &Parsed,
    ) {
        let (op, status, bytes) = match answer {
            Parsed::GetId { .. } => (None, IoStatus::Ok, 0),
            Parsed::Answer(Refusal { op, status }) => (Some(*op), *status, 0),
            Parsed::Io(_) => return,
        };
        chain.status.write_u8(status.to_virtio());
        self.unmark(chain.head);
        self.parts.tracking.answered(chain.head);
        self.parts.queue.put_used(chain.head, written(chain));
        if let Some(op) = op {
            let stats = self.parts.status.stats.op(op);
            stats.count(bytes, status.is_ok());
            stats.stage(Stage::Total).record(cx.io.clock.now_ns().saturating_sub(seen_ns));
        }
    }
}
