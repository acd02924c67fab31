//! HOT PATH
//! One virtqueue of one disk on one reactor.
//!
//! Flow: virtqueue → requests → channel → completions → used ring → interrupt. Owner: the queue's reactor; built and
//! dropped by control threads. **Invariant:** a head is in flight at most once and is answered exactly once; what the
//! channel does not take goes back to the ring untouched; a broken queue never writes to the guest's rings again.
//!
//! poll:
//!   intake: available → pop all there is room for → parse all → submit a prefix, put the rest back
//!   channel.poll → status byte, used element
//!   publish used.idx once → at most one interrupt

use ringmill_core::bdev::{Channel, ChannelSeed};
use ringmill_core::io::{Completion, IoOp, Slots};
use ringmill_core::limits::QUEUE_INFLIGHT_MAX;
use ringmill_core::mem::{Segment, lost_mappings_count};
use ringmill_core::reactor::{ClientId, Done, HeldPins, Poller, ReactorCx, Share};
use ringmill_core::units::{len_u32, usize_of};

use crate::virtq::{Chain, QueueError, Virtqueue};

use super::arrivals::Arrivals;
use super::notifier::Notifier;
use super::{QueueState, Tracking};

mod answer;
mod control;
mod finished;
mod intake;
mod parts;
mod placing;

pub use control::WorkerControl;
pub use parts::WorkerParts;
pub use placing::PlaceError;

use finished::FinishedList;
use placing::Trial;

/// A request in flight, as the guest knows it.
#[derive(Debug)]
struct InFlight {
    head: u16,
    op: IoOp,
    written_bytes: u32,
    status: Segment,
    bytes: u64,
    seen_ns: u64,
    submitted_ns: u64,
}

/// One queue's worker, on lines of its own: its neighbour in memory may be another reactor's.
#[repr(align(128))]
pub struct QueueWorker<V, T> {
    parts: WorkerParts<V, T>,
    state: QueueState,
    slots: Slots<InFlight>,
    /// One bit per head: taken and not answered.
    heads: Box<[u64]>,
    arrivals: Arrivals,
    mem_hint: usize,
    notifier: Notifier,
    /// Its part of what the reactor's queues may move.
    share: Share,
    /// Mappings of the process that had lost their memory when this queue last looked.
    lost_seen: u32,
    seed: Option<ChannelSeed>,
    trial: Trial,
    pins: HeldPins,
    waiting: Vec<Done>,
}

impl<V, T> std::fmt::Debug for QueueWorker<V, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueWorker").field("state", &self.state).finish_non_exhaustive()
    }
}

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    /// A worker for `parts`, to be moved to a reactor. All memory is allocated here.
    #[must_use]
    #[cold]
    pub fn new(mut parts: WorkerParts<V, T>) -> QueueWorker<V, T> {
        let size = usize::from(parts.queue.size());
        QueueWorker {
            slots: Slots::new(size.min(QUEUE_INFLIGHT_MAX)),
            heads: std::iter::repeat_n(0, size.div_ceil(64)).collect(),
            arrivals: Arrivals::default(),
            mem_hint: 0,
            notifier: Notifier::new(parts.kick.take(), parts.call.take()),
            share: Share::default(),
            lost_seen: lost_mappings_count(),
            seed: None,
            trial: Trial::default(),
            pins: HeldPins::new(parts.mem.pinned()),
            waiting: Vec::with_capacity(4),
            state: QueueState::Running,
            parts,
        }
    }

    #[inline]
    fn mark_taken(&mut self, head: u16) -> Result<(), QueueError> {
        let (word, bit) = (usize::from(head) / 64, 1u64 << (head % 64));
        if self.heads[word] & bit != 0 {
            return Err(QueueError::HeadInFlight { head });
        }
        self.heads[word] |= bit;
        self.parts.tracking.taken(head);
        Ok(())
    }

    #[inline]
    fn unmark(&mut self, head: u16) {
        self.heads[usize::from(head) / 64] &= !(1u64 << (head % 64));
    }

    /// Answers what the channel has finished, one batch per pass; true when there was anything.
    #[inline]
    fn complete(&mut self, cx: &mut ReactorCx, finished: &mut FinishedList) -> bool {
        if self.slots.live_count() == 0 {
            return false;
        }
        cx.completions.clear();
        self.parts.channel.poll(&mut cx.io, &mut cx.completions);
        if lost_mappings_count() != self.lost_seen {
            self.look_for_lost_memory();
        }
        let mut data_bytes = 0;
        for at in 0..cx.completions.len() {
            let Completion { tag, status } = cx.completions[at];
            let Some(slot) = self.slots.remove(tag) else { continue };
            self.unmark(slot.head);
            data_bytes += slot.op.data_bytes(slot.bytes);
            if self.state == QueueState::Broken {
                continue;
            }
            slot.status.write_u8(status.to_virtio());
            self.parts.tracking.answered(slot.head);
            self.parts.queue.put_used(slot.head, slot.written_bytes);
            let InFlight { op, bytes, seen_ns, submitted_ns, .. } = slot;
            finished.push(op, status.is_ok(), bytes, (seen_ns, submitted_ns));
        }
        cx.io.fair.ended(&mut self.share, data_bytes);
        !cx.completions.is_empty()
    }

    /// Makes answers visible and interrupts the guest if it wants that; then does the book-keeping.
    #[inline]
    fn publish(&mut self, cx: &mut ReactorCx, finished: &FinishedList) {
        if self.state == QueueState::Broken {
            return;
        }
        let completed_ns = if finished.is_empty() { 0 } else { cx.io.clock.now_ns() };
        let ask = self.notifier.can_signal(cx);
        if self.parts.queue.publish(ask) && self.notifier.coalescer.want(cx.pass_ns) {
            self.notifier.signal(cx, &self.parts.status);
        }
        if finished.is_empty() {
            return;
        }
        let published_ns = cx.io.clock.now_ns();
        let count = finished.requests_count();
        self.notifier.coalescer.count(count, published_ns, self.parts.device.coalesce());
        finished.record(&self.parts.status.stats, completed_ns, published_ns);
    }

    #[inline]
    fn show(&self) {
        let (avail, used) = self.parts.queue.indices();
        self.parts.status.show(len_u32(self.slots.live_count()), avail.into(), used.into());
    }

    fn set_state(&mut self, state: QueueState) {
        self.state = state;
        self.parts.status.set_state(state);
    }
}

/// Bytes that the used element claims: the whole writable part, as its last byte (the status) is always written.
#[inline]
fn written(chain: &Chain) -> u32 {
    len_u32(usize_of(chain.writable_bytes))
}

impl<V: Virtqueue, T: Tracking> Poller for QueueWorker<V, T> {
    fn poll(&mut self, cx: &mut ReactorCx) -> bool {
        self.notifier.poll(cx, &self.parts.status);
        let mut work = false;
        cx.io.fair.begin(&mut self.share, cx.pass_ns);
        if self.state == QueueState::Running && self.parts.enabled {
            match self.intake(cx) {
                Ok(found) => work = found,
                Err(error) => self.abandon(cx, error),
            }
        }
        let mut finished = FinishedList::new(self.parts.device.is_recording());
        work |= self.complete(cx, &mut finished);
        cx.io.fair.end(&mut self.share);
        if work {
            self.publish(cx, &finished);
            self.show();
        }
        if !self.waiting.is_empty() && self.slots.live_count() == 0 {
            self.drained();
        }
        work
    }

    fn prepare_sleep(&mut self, cx: &mut ReactorCx) -> bool {
        let busy = self.slots.live_count() > 0;
        if (busy && self.parts.channel.must_poll()) || self.notifier.must_poll(cx) {
            return true;
        }
        let full = self.slots.room().min(self.parts.channel.room(&cx.io).requests) == 0;
        if busy && (full || cx.io.fair.holds_back(&self.share, cx.pass_ns)) {
            // Nothing can be taken before something ends, and that wakes the reactor.
            return false;
        }
        if self.state != QueueState::Running || !self.parts.enabled {
            return false;
        }
        !self.notifier.hears_kicks() || self.parts.queue.request_kick()
    }

    fn park(&mut self, cx: &mut ReactorCx) -> Option<ClientId> {
        if self.slots.live_count() > 0 || !self.waiting.is_empty() || self.prepare_sleep(cx) {
            return None;
        }
        self.notifier.client()
    }

    fn look_after(&mut self, _cx: &mut ReactorCx) {
        self.look_for_lost_memory();
    }

    fn attach(&mut self, cx: &mut ReactorCx) {
        self.arrive(cx);
    }

    fn detach(&mut self, cx: &mut ReactorCx) {
        self.depart(cx);
    }

    fn quiesce(&mut self, _cx: &mut ReactorCx, done: Done) {
        if self.state == QueueState::Running {
            self.set_state(QueueState::Draining);
        }
        if self.slots.live_count() == 0 {
            self.drained();
            done();
        } else {
            self.waiting.push(done);
        }
    }

    fn resume(
        &mut self,
        cx: &mut ReactorCx,
        channel: Option<Box<dyn Channel>>,
    ) -> Option<Box<dyn Channel>> {
        let old = channel.map(|new| {
            let mut old = std::mem::replace(&mut self.parts.channel, new);
            old.close(&mut cx.io);
            old
        });
        if self.state != QueueState::Broken {
            self.set_state(QueueState::Running);
        }
        old
    }
}
