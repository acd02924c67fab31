//! HOT PATH
//! A requesting reactor's way into a bdev whose device queue another reactor owns.
//!
//! Flow: submit → slots of the request ring → the owner's [`Port`](super::port) → answer ring → poll. Owner: the
//! requesting reactor. **Invariant:** at most one ring's length of requests is out, so neither ring can overflow; a long
//! segment list travels with its request and comes back with its answer, to the pool that it was taken from.
//!
//! submit: while slots and lists: fill → publish once → wake the owner if it sleeps
//! poll:   answers in a batch → lists back → release once | owner gone → what it never took ends here

use arrayvec::ArrayVec;

use crate::bdev::{Channel, Room};
use crate::io::{BatchView, Completion, Completions, IoFlags, IoOp, IoRequest, Tag};
use crate::limits::{CROSS_SLOTS, SEGMENTS_INLINE};
use crate::mem::{ListsHeld, Segment, SegmentList};
use crate::reactor::{IoCx, ReactorHandle};
use crate::status::IoStatus;
use crate::units::{index, len_u32};

use super::spsc::{Consumer, Producer};

/// A request on its way. The first line has all of a request of one segment.
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Crossing {
    pub(super) request: IoRequest,
    inline: ArrayVec<Segment, SEGMENTS_INLINE>,
    /// Instead of `inline` for a longer list; memory of the requester's pool.
    list: Option<Vec<Segment>>,
}

const _: () = assert!(size_of::<Crossing>() == 128, "one pair of lines");

/// An answer on its way back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) completion: Completion,
    pub(super) list: Option<Vec<Segment>>,
}

const _: () = assert!(size_of::<Answer>() == 32, "two answers per line");

impl Crossing {
    #[cold]
    pub(super) fn empty() -> Crossing {
        let (tag, op, flags) = (Tag(0), IoOp::Flush, IoFlags::NONE);
        let (offset_bytes, len_bytes, segments_at, segments_count) = (0, 0, 0, 0);
        let request =
            IoRequest { offset_bytes, len_bytes, tag, segments_at, segments_count, op, flags };
        Crossing { request, inline: ArrayVec::new_const(), list: None }
    }

    #[inline]
    fn put(&mut self, request: &IoRequest, segments: &[Segment], list: Option<Vec<Segment>>) {
        self.request = *request;
        self.inline.clear();
        if list.is_some() {
            self.list = list;
        } else {
            // Longer ones come with a list; the slice is a no-op for those that fit.
            let fits = segments.len().min(SEGMENTS_INLINE);
            self.inline.extend(segments[..fits].iter().copied());
        }
    }

    /// The request's segments.
    #[inline]
    pub(super) fn segments(&self) -> &[Segment] {
        // The count says which, so that the second line is touched only where something is on it.
        if index(self.request.segments_count) <= SEGMENTS_INLINE {
            &self.inline
        } else {
            self.list.as_deref().unwrap_or(&[])
        }
    }

    /// Takes a long list out, to travel on with the request.
    #[inline]
    pub(super) fn take_list(&mut self) -> Option<Vec<Segment>> {
        if index(self.request.segments_count) <= SEGMENTS_INLINE { None } else { self.list.take() }
    }
}

impl Answer {
    #[cold]
    pub(super) fn empty() -> Answer {
        Answer { completion: Completion { tag: Tag(0), status: IoStatus::Ok }, list: None }
    }
}

/// The requester's end.
#[repr(align(128))]
pub(super) struct CrossChannel {
    pub(super) requests: Producer<Crossing>,
    pub(super) answers: Consumer<Answer>,
    pub(super) owner: Option<ReactorHandle>,
    pub(super) inflight: u32,
    pub(super) lists_held: ListsHeld,
}

impl CrossChannel {
    /// The owner is gone with what it had taken; what it never took has touched nothing and ends here.
    #[cold]
    #[inline(never)]
    fn reclaim(&mut self, io: &mut IoCx, done: &mut Completions) {
        while !done.is_full() {
            let mut found = None;
            if !self.requests.take_back(|slot| found = Some((slot.request.tag, slot.take_list()))) {
                return;
            }
            let Some((tag, list)) = found else { return };
            self.give_back(io, list);
            self.inflight -= 1;
            done.push(Completion { tag, status: IoStatus::Gone });
        }
    }

    #[inline]
    fn give_back(&mut self, io: &mut IoCx, list: Option<Vec<Segment>>) {
        if let Some(list) = list {
            io.lists.give_back(SegmentList::Pooled(list), &mut self.lists_held);
        }
    }
}

impl Channel for CrossChannel {
    #[inline]
    fn room(&self, _io: &IoCx) -> Room {
        let requests = index(CROSS_SLOTS - self.inflight);
        // It moves no data on this core.
        Room { requests, bytes: u64::MAX, not_before_ns: 0 }
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let room = index(CROSS_SLOTS - self.inflight);
        let mut taken = 0;
        for request in batch.requests().iter().take(room) {
            let segments = batch.segments(request);
            let mut list = None;
            if segments.len() > SEGMENTS_INLINE {
                match io.lists.keep(segments, &mut self.lists_held) {
                    Some(SegmentList::Pooled(kept)) => list = Some(kept),
                    _ => break,
                }
            }
            let filled = self.requests.fill(|slot| slot.put(request, segments, list));
            debug_assert!(filled, "fewer requests are out than the ring has slots");
            taken += 1;
        }
        if taken > 0 {
            self.inflight += len_u32(taken);
            self.requests.publish();
            if let Some(owner) = &self.owner {
                owner.wake();
            }
        }
        taken
    }

    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        let mut waiting = self.answers.waiting();
        if waiting == 0 {
            if self.inflight == 0 || !self.answers.is_closed() {
                return;
            }
            // Closed: now the ring shows all that there will ever be.
            waiting = self.answers.waiting();
            if waiting == 0 {
                return self.reclaim(io, done);
            }
        }
        let count = waiting.min(len_u32(done.remaining_capacity()));
        for at in 0..count {
            let answer = self.answers.read(at, |slot| (slot.completion, slot.list.take()));
            let Some((completion, list)) = answer else { break };
            self.give_back(io, list);
            done.push(completion);
        }
        self.answers.release(count);
        self.inflight -= count;
    }

    fn inflight(&self) -> usize {
        index(self.inflight)
    }

    /// The last look before the requester sleeps: an answer that is published later wakes it.
    fn must_poll(&self) -> bool {
        !self.answers.is_empty() || (self.inflight > 0 && self.answers.is_closed())
    }

    /// The owner learns of it when the channel is dropped.
    fn close(&mut self, _io: &mut IoCx) {}
}
