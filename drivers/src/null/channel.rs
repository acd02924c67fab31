//! HOT PATH
//! The null device's channel.
//!
//! submit: every request → ready; poll: ready → completions

use ringmill_core::IoStatus;
use ringmill_core::bdev::{Channel, ReadyQueue, Room};
use ringmill_core::io::{BatchView, Completion, Completions};
use ringmill_core::limits::QUEUE_INFLIGHT_MAX;
use ringmill_core::reactor::IoCx;

#[derive(Debug)]
pub(super) struct NullChannel {
    ready: ReadyQueue,
}

impl NullChannel {
    #[cold]
    pub(super) fn new() -> NullChannel {
        NullChannel { ready: ReadyQueue::new(QUEUE_INFLIGHT_MAX) }
    }
}

impl Channel for NullChannel {
    #[inline]
    fn room(&self, _io: &IoCx) -> Room {
        Room { requests: self.ready.room(), not_before_ns: 0 }
    }

    #[inline]
    fn submit(&mut self, _io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let taken = batch.requests().len().min(self.ready.room());
        for request in &batch.requests()[..taken] {
            self.ready.push(Completion { tag: request.tag, status: IoStatus::Ok });
        }
        taken
    }

    #[inline]
    fn poll(&mut self, _io: &mut IoCx, done: &mut Completions) {
        self.ready.drain_into(done);
    }

    fn inflight(&self) -> usize {
        self.ready.len()
    }

    fn must_poll(&self) -> bool {
        !self.ready.is_empty()
    }

    fn close(&mut self, _io: &mut IoCx) {}
}
