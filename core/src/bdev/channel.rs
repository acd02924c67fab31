//! HOT PATH
//! The contract between a queue worker (or a layer) and a device.
//!
//! Flow: `room` is a hint; `submit` takes a prefix of the batch and leaves the rest to be offered again; `poll` hands
//! back each taken request exactly once. Owner: one reactor.
//! **Invariant:** a request is completed only when nobody can touch its memory any more; a channel copies what it needs
//! of a batch before `submit` returns; a channel that has nothing in flight and may move bytes takes at least one request.
//!
//! worker: room → submit(batch) → poll(completions)

use std::collections::VecDeque;

use crate::io::{BatchView, Completion, Completions};
use crate::limits::QUEUE_INFLIGHT_MAX;
use crate::reactor::{DeviceSlot, IoCx};
use crate::status::IoStatus;

/// How much a channel would take now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Requests.
    pub requests: usize,
    /// Bytes of their data: for a channel that moves data on this core, what it may move in this poll (0: nothing before
    /// the next one); `u64::MAX` for others.
    pub bytes: u64,
    /// Not before this time (a throttle's hint), nanoseconds of the reactor's clock; 0: now.
    pub not_before_ns: u64,
}

/// One reactor's private way into a bdev.
pub trait Channel: Send {
    /// How much `submit` would take; a hint.
    fn room(&self, io: &IoCx) -> Room;

    /// Takes the first `n` requests of the batch and returns `n`. What is not taken was not touched.
    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize;

    /// Appends completions until there are none or `done` is full.
    fn poll(&mut self, io: &mut IoCx, done: &mut Completions);

    /// Requests taken and not yet handed back.
    fn inflight(&self) -> usize;

    /// True when only polling (and no event of the ring) moves this channel on: the reactor must not sleep.
    fn must_poll(&self) -> bool;

    /// The reactor's device queue behind this channel, if there is one: its bounce buffers are used.
    fn device(&self) -> Option<DeviceSlot> {
        None
    }

    /// Gives back what the channel holds of the reactor (ring places, files). Called once, with nothing in flight.
    fn close(&mut self, io: &mut IoCx);
}

/// Completions of requests that ended inside `submit`: the whole state of a synchronous device.
#[derive(Debug)]
pub struct ReadyQueue {
    ready: VecDeque<Completion>,
    capacity: usize,
}

impl ReadyQueue {
    /// Room for `capacity` completions, allocated now.
    #[must_use]
    #[cold]
    pub fn new(capacity: usize) -> ReadyQueue {
        ReadyQueue { ready: VecDeque::with_capacity(capacity), capacity }
    }

    /// Completions that still fit.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity - self.ready.len()
    }

    /// Completions waiting.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.ready.len()
    }

    /// True without any.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// Adds one; callers check `room` first.
    #[inline]
    pub fn push(&mut self, completion: Completion) {
        debug_assert!(self.ready.len() < self.capacity);
        self.ready.push_back(completion);
    }

    /// Moves as many as fit.
    #[inline]
    pub fn drain_into(&mut self, done: &mut Completions) {
        while !done.is_full() {
            let Some(completion) = self.ready.pop_front() else { break };
            done.push(completion);
        }
    }
}

/// Ends every request at once, with the same status and without touching its data: `Ok` is the null device,
/// [`IoStatus::Gone`] takes the place of a channel whose bdev was removed.
#[derive(Debug)]
pub struct InstantChannel {
    ready: ReadyQueue,
    status: IoStatus,
}

impl InstantChannel {
    /// A channel whose every request ends like this.
    #[must_use]
    #[cold]
    pub fn new(status: IoStatus) -> InstantChannel {
        InstantChannel { ready: ReadyQueue::new(QUEUE_INFLIGHT_MAX), status }
    }
}

impl Channel for InstantChannel {
    #[inline]
    fn room(&self, _io: &IoCx) -> Room {
        Room { requests: self.ready.room(), bytes: u64::MAX, not_before_ns: 0 }
    }

    #[inline]
    fn submit(&mut self, _io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let taken = batch.requests().len().min(self.ready.room());
        for request in &batch.requests()[..taken] {
            self.ready.push(Completion { tag: request.tag, status: self.status });
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
