//! Requests of more than one command.
//!
//! Flow: a request that one command cannot do → a job with a copy of its segments → its parts go out as there is room → the
//! last one's end ends it. Owner: one reactor. **Invariant:** a job ends once nothing of it is out; after the first error no
//! more of it is sent, and that error is its status.

use ringmill_core::IoStatus;
use ringmill_core::io::{Completion, Completions, IoRequest, Slots, Tag};
use ringmill_core::mem::{SegmentList, SegmentLists};

use super::channel::NvmeChannel;
use super::list::Cursor;
use super::qpair::{QueuePair, State};
use super::slots::{Ended, MemberId, Owner};
use super::target::Step;
use crate::pci::Registers;

/// A request on its way in parts.
#[derive(Debug)]
pub(super) struct Job {
    request: IoRequest,
    pub(super) segments: SegmentList,
    cursor: Cursor,
    /// Bytes of the request that were sent.
    sent_bytes: u64,
    /// Parts that are out.
    out: usize,
    status: IoStatus,
    /// It is in the list of those that wait.
    waits: bool,
}

impl Job {
    pub(super) fn new(request: IoRequest, segments: SegmentList) -> Job {
        Job {
            request,
            segments,
            cursor: Cursor::default(),
            sent_bytes: 0,
            out: 0,
            status: IoStatus::Ok,
            waits: true,
        }
    }

    fn has_more(&self) -> bool {
        self.status.is_ok() && self.sent_bytes < self.request.len_bytes
    }
}

impl<R: Registers> NvmeChannel<R> {
    /// Takes the end of a command: a request's goes to `done`, which has a place for it, a part's to its job.
    #[inline]
    pub(super) fn note(
        (jobs, over): (&mut Slots<Job>, &mut Vec<Tag>),
        ended: Ended,
        done: &mut Completions,
    ) -> bool {
        if !ended.part {
            done.push(Completion { tag: ended.tag, status: ended.status });
            return true;
        }
        Self::note_part((jobs, over), ended);
        true
    }

    #[cold]
    #[inline(never)]
    fn note_part((jobs, over): (&mut Slots<Job>, &mut Vec<Tag>), ended: Ended) {
        let Some(job) = jobs.get_mut(ended.tag) else { return };
        job.out -= 1;
        if job.status.is_ok() {
            job.status = ended.status;
        }
        if job.out == 0 && !job.waits {
            over.push(ended.tag);
        }
    }

    /// Sends a part in a slot that was taken for it.
    pub(super) fn send_part(
        &mut self,
        (pair, member, slot): (&mut QueuePair<R>, MemberId, u16),
        tag: Tag,
        step: Step,
    ) {
        let Some(job) = self.jobs.get_mut(tag) else {
            return pair.slots.give_back(member, slot);
        };
        job.out += 1;
        job.sent_bytes += step.len_bytes;
        if job.request.op.has_data() {
            job.cursor = job.cursor.advanced(job.segments.as_slice(), step.len_bytes);
        }
        pair.send(slot, Owner { member, tag, part: true }, step.command);
    }

    /// Ends jobs whose last part has ended, and sends parts of those that wait, in turn: half of the room is theirs.
    #[cold]
    #[inline(never)]
    pub(super) fn go_on(&mut self, pair: &mut QueuePair<R>, lists: &mut SegmentLists) {
        let Some(member) = self.member else { return };
        while let Some(tag) = self.over.pop() {
            self.end_job(lists, tag);
        }
        let mut parts = pair.room(member).div_ceil(2);
        let mut rested = 0;
        while rested < self.waiting.len()
            && let Some(tag) = self.waiting.pop_front()
        {
            let Some(job) = self.jobs.get_mut(tag) else { continue };
            let refusal = match pair.state {
                State::Failed(status) => Some(status),
                _ => self.info.is_fenced().then_some(IoStatus::Gone),
            };
            if let Some(status) = refusal
                && job.status.is_ok()
            {
                job.status = status;
            }
            if job.has_more() {
                if parts > 0 && self.send_next(pair, member, tag) {
                    parts -= 1;
                    rested = 0;
                } else {
                    rested += 1;
                }
                self.waiting.push_back(tag);
                continue;
            }
            job.waits = false;
            if job.out == 0 {
                self.end_job(lists, tag);
            }
        }
    }

    /// Sends a job's next part; false when that was not possible (now).
    fn send_next(&mut self, pair: &mut QueuePair<R>, member: MemberId, tag: Tag) -> bool {
        let Some(job) = self.jobs.get_mut(tag) else { return false };
        let Some(slot) = pair.slots.take(member) else { return false };
        let data = (job.segments.as_slice(), job.cursor);
        match self.target.step(&job.request, job.sent_bytes, data, (pair, slot)) {
            Some(step) => {
                self.send_part((pair, member, slot), tag, step);
                true
            }
            None => {
                job.status = IoStatus::Invalid;
                pair.slots.give_back(member, slot);
                true
            }
        }
    }

    /// Their pair is gone: nothing of them is out.
    #[cold]
    #[inline(never)]
    pub(super) fn end_jobs(&mut self, lists: &mut SegmentLists, status: IoStatus) {
        self.over.clear();
        self.waiting.clear();
        loop {
            let first = self.jobs.iter().next().map(|(tag, _)| tag);
            let Some(tag) = first else { return };
            if let Some(job) = self.jobs.get_mut(tag)
                && job.status.is_ok()
            {
                job.status = status;
            }
            self.end_job(lists, tag);
        }
    }

    fn end_job(&mut self, lists: &mut SegmentLists, tag: Tag) {
        if let Some(job) = self.jobs.remove(tag) {
            lists.give_back(job.segments, &mut self.lists_held);
            self.ready.push(Completion { tag: job.request.tag, status: job.status });
        }
    }
}
