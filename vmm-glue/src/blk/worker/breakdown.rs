//! How a queue ends before its time: by a mistake of its guest, or with the memory that it lies in.

use ringmill_core::reactor::ReactorCx;

use crate::blk::WorkerEvent;
use crate::virtq::QueueError;

use super::{QueueState, QueueWorker, Tracking, Virtqueue};

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    #[cold]
    #[inline(never)]
    pub(super) fn break_queue(&mut self, error: QueueError) {
        self.state = QueueState::Broken;
        self.parts.status.set_state(QueueState::Broken);
        (self.parts.events)(WorkerEvent::Broken(error));
    }

    /// Ends the queue in the middle of an intake: what was popped and not yet handed over is forgotten.
    #[cold]
    #[inline(never)]
    pub(super) fn abandon(&mut self, cx: &mut ReactorCx, error: QueueError) {
        for tag in cx.batch.view().tags() {
            self.slots.remove(tag);
        }
        cx.batch.clear();
        self.arrivals.clear();
        self.break_queue(error);
    }
}
