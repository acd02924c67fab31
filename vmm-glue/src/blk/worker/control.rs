//! What control threads do to a worker, by message: enable it, give it other memory or descriptors, look at it; and how
//! it comes to a stop.
//!
//! [`WorkerControl`] has what does not depend on the ring's format, so that a control thread need not know it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::bdev::{Channel, ChannelSeed, InstantChannel};
use ringmill_core::mem::{MemTable, Pin, lost_mappings_count};
use ringmill_core::reactor::{Done, HeldPins, Poller, ReactorCx};

use crate::virtq::{QueueError, RingWindows};

use crate::blk::WorkerEvent;

use super::{PlaceError, QueueState, QueueWorker, Tracking, Trial, Virtqueue};

/// A worker as a control thread's messages find it on its reactor: the same for all ring formats.
pub trait WorkerControl: Poller {
    /// Takes requests, or takes none until told again (SET_VRING_ENABLE). `done` is called when a disabled queue has
    /// nothing in flight.
    fn set_enabled(&mut self, enabled: bool, done: Done);

    /// Replaces the guest's memory and the windows onto the rings in it. When regions go, the caller quiesces first.
    /// Without windows (the rings are not in the new memory as they must be) the queue is broken. Returns what was there
    /// before, to be dropped by the control thread.
    fn set_memory(
        &mut self,
        mem: Arc<MemTable>,
        windows: Option<RingWindows>,
    ) -> (Arc<MemTable>, Option<RingWindows>);

    /// Replaces the pinned memory that the reactor knows. When pins go, the caller quiesces first, and the memory that they
    /// are part of goes with them. Returns the old ones, to be dropped by the control thread.
    fn set_pins(&mut self, cx: &mut ReactorCx, pins: Vec<Arc<Pin>>) -> HeldPins;

    /// Replaces the call fd and signals it once, in case the old one missed something.
    fn set_call(&mut self, cx: &mut ReactorCx, call: Option<Arc<OwnedFd>>) -> Option<Arc<OwnedFd>>;

    /// Replaces the kick fd.
    fn set_kick(&mut self, cx: &mut ReactorCx, kick: Option<Arc<OwnedFd>>) -> Option<Arc<OwnedFd>>;

    /// Where the queue would go on (GET_VRING_BASE); final once nothing is in flight.
    fn base(&self) -> u32;

    /// The front-end is gone or sent away without asking for the base: leaves a drained ring so that a successor finds its
    /// place.
    fn leave(&self);

    /// How long the oldest request has been with the device, nanoseconds; `None` without any.
    fn oldest_age_ns(&self, now_ns: u64) -> Option<u64>;

    /// Prepares a worker that is on no reactor for its next one: plants `seed` there, and until then and without it every
    /// request fails. With `trial` a reactor that cannot serve it says so by [`WorkerControl::take_problem`], and nothing
    /// else happens. Returns the former channel, to be dropped by the caller.
    fn replant(&mut self, seed: Option<ChannelSeed>, trial: bool) -> Box<dyn Channel>;

    /// Why the reactor that the worker has just come to cannot serve it.
    fn take_problem(&mut self) -> Option<PlaceError>;
}

impl<V: Virtqueue, T: Tracking> WorkerControl for QueueWorker<V, T> {
    #[cold]
    fn set_enabled(&mut self, enabled: bool, done: Done) {
        self.parts.enabled = enabled;
        if enabled || self.slots.live_count() == 0 { done() } else { self.waiting.push(done) }
    }

    #[cold]
    fn set_memory(
        &mut self,
        mem: Arc<MemTable>,
        windows: Option<RingWindows>,
    ) -> (Arc<MemTable>, Option<RingWindows>) {
        self.mem_hint = 0;
        let old = match windows {
            Some(windows) => Some(self.parts.queue.relocate(windows)),
            None => {
                self.break_queue(QueueError::MemoryGone);
                None
            }
        };
        (std::mem::replace(&mut self.parts.mem, mem), old)
    }

    #[cold]
    fn set_pins(&mut self, cx: &mut ReactorCx, pins: Vec<Arc<Pin>>) -> HeldPins {
        let (old, result) = self.pins.exchange(&mut cx.io, pins);
        if let Err(error) = result {
            (self.parts.events)(WorkerEvent::Unpinned(error));
        }
        old
    }

    #[cold]
    fn set_call(&mut self, cx: &mut ReactorCx, call: Option<Arc<OwnedFd>>) -> Option<Arc<OwnedFd>> {
        self.notifier.set_call(cx, call, &self.parts.status)
    }

    #[cold]
    fn set_kick(&mut self, cx: &mut ReactorCx, kick: Option<Arc<OwnedFd>>) -> Option<Arc<OwnedFd>> {
        self.notifier.set_kick(cx, kick)
    }

    fn base(&self) -> u32 {
        self.parts.queue.base()
    }

    #[cold]
    fn leave(&self) {
        if self.state != QueueState::Broken && self.slots.live_count() == 0 {
            self.parts.queue.leave();
        }
    }

    #[cold]
    fn oldest_age_ns(&self, now_ns: u64) -> Option<u64> {
        self.slots.iter().map(|(_, slot)| now_ns.saturating_sub(slot.submitted_ns)).max()
    }

    #[cold]
    fn replant(&mut self, seed: Option<ChannelSeed>, trial: bool) -> Box<dyn Channel> {
        self.seed = seed;
        self.trial = Trial::new(trial);
        let gone = Box::new(InstantChannel::new(IoStatus::Gone));
        std::mem::replace(&mut self.parts.channel, gone)
    }

    #[cold]
    fn take_problem(&mut self) -> Option<PlaceError> {
        self.trial.end()
    }
}

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    /// Plants `seed` on the reactor that takes the worker in; until then, and if that fails, `parts.channel` serves.
    #[must_use]
    #[cold]
    pub fn with_seed(mut self, seed: ChannelSeed) -> Self {
        self.seed = Some(seed);
        self
    }

    #[cold]
    #[inline(never)]
    pub(super) fn hold_pins(&mut self, cx: &mut ReactorCx) {
        if let Err(error) = self.pins.hold(&mut cx.io) {
            (self.parts.events)(WorkerEvent::Unpinned(error));
        }
    }

    /// Requests in flight.
    #[must_use]
    pub fn inflight_count(&self) -> usize {
        self.slots.live_count()
    }

    /// True once (and resets): the guest is to be interrupted. For contexts without a ring, such as the simulator.
    pub fn take_interrupt(&mut self) -> bool {
        self.notifier.take_wanted()
    }

    /// Some mapping of the process has lost its memory. If it was this guest's, its data was zeroes a moment ago: nothing
    /// that was copied may be called done.
    #[cold]
    #[inline(never)]
    pub(super) fn look_for_lost_memory(&mut self) {
        self.lost_seen = lost_mappings_count();
        let gone = self.parts.queue.memory_gone() || self.parts.mem.failed();
        if gone && self.state != QueueState::Broken {
            self.break_queue(QueueError::MemoryGone);
        }
    }

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

    #[cold]
    #[inline(never)]
    pub(super) fn drained(&mut self) {
        if self.state == QueueState::Draining {
            self.set_state(QueueState::Quiesced);
        }
        for done in self.waiting.drain(..) {
            done();
        }
    }
}
