//! Makes any request fit a device that takes only aligned ones: bounce buffers and sub-block writes.
//!
//! Flow: aligned requests pass straight through; the others become jobs that advance piece by piece through one bounce
//! buffer at a time. Owner: one reactor; the block locks are shared with the bdev's channels on other reactors.
//! **Invariant:** a job takes its lock before its buffer, and whoever holds a buffer needs nothing else, so the last
//! buffer of a reactor always comes back. A piece that reads, modifies and writes holds its block alone for all three.
//!
//! job: plan piece → lock → buffer → [read] → [write] → release → next piece → completion

use std::collections::VecDeque;
use std::sync::Arc;

use crate::io::{BatchView, Completion, Completions, IoOp, IoRequest, Slots, Tag};
use crate::limits::{BOUNCE_BYTES, QUEUE_INFLIGHT_MAX};
use crate::mem::{Bounce, ListsHeld, Segment, SegmentList, pieces};
use crate::reactor::IoCx;
use crate::status::IoStatus;
use crate::units::{bytes_u64, len_u32, usize_of};

use super::{BlockLocks, Channel, ReadyQueue, Room};

/// Unaligned requests of one channel in progress at a time; more wait on their virtqueue.
const JOBS_MAX: usize = 64;

/// What a device demands of requests. All powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Offsets and lengths on the medium, bytes.
    pub block_bytes: u32,
    /// Addresses of memory segments, bytes.
    pub address_bytes: u32,
    /// Lengths of memory segments, bytes.
    pub segment_bytes: u32,
}

impl Alignment {
    /// A device that takes everything in units of 512-byte sectors and any memory.
    pub const NONE: Alignment = Alignment { block_bytes: 512, address_bytes: 1, segment_bytes: 1 };

    #[inline]
    fn fits(&self, request: &IoRequest, segments: &[Segment]) -> bool {
        let block_mask = u64::from(self.block_bytes) - 1;
        if (request.offset_bytes | request.len_bytes) & block_mask != 0 {
            return false;
        }
        let (address_mask, length_mask) = (self.address_bytes as usize - 1, self.segment_bytes - 1);
        segments.iter().all(|s| s.host().0 & address_mask == 0 && s.len_bytes() & length_mask == 0)
    }
}

/// One step of a job on the device.
#[derive(Clone, Copy, Debug, Default)]
struct Piece {
    /// First byte on the medium, a multiple of the block.
    at_bytes: u64,
    /// Bytes on the medium, a multiple of the block.
    span_bytes: u64,
    /// The guest's first byte inside the span.
    skip_bytes: u32,
    /// The guest's bytes.
    len_bytes: u64,
    /// Only part of the block changes.
    modifies: bool,
    /// Goes to the device without data (write-zeroes of whole blocks).
    through: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Plan,
    Lock,
    Buffer,
    IssueRead,
    Reading,
    IssueWrite,
    Writing,
}

#[derive(Debug)]
struct Job {
    request: IoRequest,
    segments: SegmentList,
    done_bytes: u64,
    piece: Piece,
    step: Step,
    bounce: Option<Bounce>,
    locked: bool,
}

/// A channel that takes any alignment, over one that does not.
#[derive(Debug)]
pub struct AlignChannel<C> {
    inner: C,
    rules: Alignment,
    locks: Option<Arc<BlockLocks>>,
    /// Spans that passed-through writes hold shared, by the slot of their tag; length 0: none.
    held: Vec<(u64, u64)>,
    jobs: Slots<Job>,
    /// Jobs that can try their next step.
    todo: VecDeque<Tag>,
    /// New requests took the whole credit of the last poll: the next one's is the jobs'.
    todo_starves: bool,
    ready: ReadyQueue,
    lists_held: ListsHeld,
    bounces_held: usize,
}

impl<C: Channel> AlignChannel<C> {
    /// Wraps `inner`. `locks` are needed when the device's block is larger than a sector.
    #[must_use]
    pub fn new(inner: C, rules: Alignment, locks: Option<Arc<BlockLocks>>) -> AlignChannel<C> {
        let held = if locks.is_some() { vec![(0, 0); QUEUE_INFLIGHT_MAX] } else { Vec::new() };
        AlignChannel {
            inner,
            rules,
            locks,
            held,
            jobs: Slots::new(JOBS_MAX),
            todo: VecDeque::with_capacity(JOBS_MAX),
            todo_starves: false,
            ready: ReadyQueue::new(JOBS_MAX),
            lists_held: ListsHeld::default(),
            bounces_held: 0,
        }
    }

    /// The channel below.
    #[must_use]
    pub fn inner(&self) -> &C {
        &self.inner
    }

    /// True when the request can go to the device as it is.
    #[inline]
    fn passes(&self, request: &IoRequest, segments: &[Segment]) -> bool {
        request.op == IoOp::Flush || self.rules.fits(request, segments)
    }

    /// Takes the shared lock of a passed-through write.
    #[inline]
    fn hold(&mut self, request: &IoRequest) -> bool {
        let Some(locks) = &self.locks else { return true };
        if !request.op.changes_data() {
            return true;
        }
        let range = (request.offset_bytes, request.len_bytes.max(1));
        if !locks.try_shared(range.0, range.1) {
            return false;
        }
        self.held[usize::from(request.tag.slot())] = range;
        true
    }

    #[inline]
    fn release(&mut self, tag: Tag) {
        let Some(locks) = &self.locks else { return };
        let range = std::mem::take(&mut self.held[usize::from(tag.slot())]);
        if range.1 > 0 {
            locks.release_shared(range.0, range.1);
        }
    }

    /// Turns an unaligned request into a job; false when there is no room for it now.
    #[cold]
    #[inline(never)]
    fn start_job(&mut self, io: &mut IoCx, request: &IoRequest, segments: &[Segment]) -> bool {
        let mut request = *request;
        if request.op == IoOp::Discard {
            // The parts of blocks at both ends are left alone: a discard is advice.
            let block = u64::from(self.rules.block_bytes);
            let start = request.offset_bytes.next_multiple_of(block);
            let end = (request.offset_bytes + request.len_bytes) / block * block;
            request.offset_bytes = start;
            request.len_bytes = end.saturating_sub(start);
        }
        if self.jobs.room() == 0 || self.ready.room() < self.jobs.live_count() + 1 {
            return false;
        }
        let Some(segments) = io.lists.keep(segments, &mut self.lists_held) else { return false };
        let job = Job {
            request,
            segments,
            done_bytes: 0,
            piece: Piece::default(),
            step: Step::Plan,
            bounce: None,
            locked: false,
        };
        match self.jobs.insert(job) {
            Ok(tag) => {
                self.advance(io, tag);
                true
            }
            Err(job) => {
                io.lists.give_back(job.segments, &mut self.lists_held);
                false
            }
        }
    }

    /// Takes the job as far as it goes without waiting; queues it for the next poll where it must try again.
    #[cold]
    #[inline(never)]
    fn advance(&mut self, io: &mut IoCx, tag: Tag) {
        loop {
            let Some(job) = self.jobs.get_mut(tag) else { return };
            let (step, piece, op) = (job.step, job.piece, job.request.op);
            let next = match step {
                Step::Plan => match job.plan(self.rules.block_bytes) {
                    Some(piece) => {
                        job.piece = piece;
                        Some(Step::Lock)
                    }
                    None => return self.finish(io, tag, IoStatus::Ok),
                },
                Step::Lock => match (&self.locks, op.changes_data()) {
                    (Some(locks), true) => {
                        let got = if piece.modifies {
                            locks.try_alone(piece.at_bytes)
                        } else {
                            locks.try_shared(piece.at_bytes, piece.span_bytes)
                        };
                        job.locked = got;
                        got.then_some(Step::Buffer)
                    }
                    _ => Some(Step::Buffer),
                },
                Step::Buffer if piece.through => Some(Step::IssueWrite),
                Step::Buffer if io.fair.credit_bytes() == 0 => None,
                Step::Buffer => match io.take_bounce(self.inner.device(), self.bounces_held) {
                    None => None,
                    Some(bounce) => {
                        io.fair.spend(piece.len_bytes);
                        self.bounces_held += 1;
                        let reads = op == IoOp::Read || piece.modifies;
                        job.bounce = Some(bounce);
                        if !reads {
                            job.fill_bounce();
                        }
                        Some(if reads { Step::IssueRead } else { Step::IssueWrite })
                    }
                },
                Step::IssueRead => self.issue(io, tag, IoOp::Read).then_some(Step::Reading),
                Step::IssueWrite => {
                    let op = if piece.through { op } else { IoOp::Write };
                    self.issue(io, tag, op).then_some(Step::Writing)
                }
                Step::Reading | Step::Writing => return,
            };
            match next {
                Some(step) => {
                    if let Some(job) = self.jobs.get_mut(tag) {
                        job.step = step;
                    }
                }
                None => return self.todo.push_back(tag),
            }
        }
    }

    /// Sends the piece to the device; false when the device has no room.
    fn issue(&mut self, io: &mut IoCx, tag: Tag, op: IoOp) -> bool {
        let Some(job) = self.jobs.get_mut(tag) else { return false };
        let span = len_u32(usize_of(job.piece.span_bytes));
        let segment = job.bounce.as_ref().map(|b| b.segment().sub(0, span));
        let request = IoRequest {
            offset_bytes: job.piece.at_bytes,
            len_bytes: job.piece.span_bytes,
            tag: Tag(tag.0 | Tag::LAYER_BIT),
            segments_at: 0,
            segments_count: u32::from(segment.is_some()),
            op,
            flags: job.request.flags,
        };
        let segments = segment.as_slice();
        self.inner.submit(io, BatchView::new(&[request], segments)) == 1
    }

    /// The device has finished a piece's read or write.
    #[cold]
    #[inline(never)]
    fn piece_done(&mut self, io: &mut IoCx, completion: Completion) {
        let tag = Tag(completion.tag.0 & !Tag::LAYER_BIT);
        let Some(job) = self.jobs.get_mut(tag) else { return };
        if !completion.status.is_ok() {
            return self.finish(io, tag, completion.status);
        }
        if job.step == Step::Reading && job.piece.modifies {
            job.fill_bounce();
            job.step = Step::IssueWrite;
        } else {
            if job.request.op == IoOp::Read {
                job.empty_bounce();
            }
            job.done_bytes += job.piece.len_bytes;
            job.step = Step::Plan;
            self.let_go(io, tag);
        }
        self.advance(io, tag);
    }

    /// Returns the piece's buffer and lock.
    fn let_go(&mut self, io: &mut IoCx, tag: Tag) {
        let Some(job) = self.jobs.get_mut(tag) else { return };
        if let Some(bounce) = job.bounce.take() {
            self.bounces_held -= 1;
            io.give_back(self.inner.device(), bounce);
        }
        if std::mem::take(&mut job.locked)
            && let Some(locks) = &self.locks
        {
            match job.piece.modifies {
                true => locks.release_alone(job.piece.at_bytes),
                false => locks.release_shared(job.piece.at_bytes, job.piece.span_bytes),
            }
        }
    }

    fn finish(&mut self, io: &mut IoCx, tag: Tag, status: IoStatus) {
        self.let_go(io, tag);
        if let Some(job) = self.jobs.remove(tag) {
            io.lists.give_back(job.segments, &mut self.lists_held);
            self.ready.push(Completion { tag: job.request.tag, status });
        }
    }
}

impl Job {
    /// What the job does next on the device; `None` when it has done everything.
    fn plan(&self, block_bytes: u32) -> Option<Piece> {
        let block = u64::from(block_bytes);
        let bounce = bytes_u64(BOUNCE_BYTES);
        let at = self.request.offset_bytes + self.done_bytes;
        let left = self.request.len_bytes - self.done_bytes;
        if left == 0 {
            return None;
        }
        let skip = at % block;
        let (at_bytes, skip_bytes) = (at - skip, len_u32(usize_of(skip)));
        Some(match self.request.op {
            IoOp::Read => {
                let len_bytes = left.min(bounce - skip);
                let span_bytes = (skip + len_bytes).next_multiple_of(block);
                Piece {
                    at_bytes,
                    span_bytes,
                    skip_bytes,
                    len_bytes,
                    modifies: false,
                    through: false,
                }
            }
            IoOp::Write | IoOp::WriteZeroes if skip != 0 || left < block => {
                let len_bytes = left.min(block - skip);
                Piece {
                    at_bytes,
                    span_bytes: block,
                    skip_bytes,
                    len_bytes,
                    modifies: true,
                    through: false,
                }
            }
            op => {
                let whole = left / block * block;
                let through = op != IoOp::Write;
                let len_bytes = if through { whole } else { whole.min(bounce) };
                Piece {
                    at_bytes,
                    span_bytes: len_bytes,
                    skip_bytes,
                    len_bytes,
                    modifies: false,
                    through,
                }
            }
        })
    }

    /// Puts the guest's bytes (or zeroes) of this piece into the buffer.
    fn fill_bounce(&mut self) {
        let Some(bounce) = &self.bounce else { return };
        let mut target =
            bounce.segment().sub(self.piece.skip_bytes, len_u32(usize_of(self.piece.len_bytes)));
        if self.request.op == IoOp::WriteZeroes {
            return target.fill_zero();
        }
        pieces(self.segments.as_slice(), self.done_bytes, self.piece.len_bytes, |segment| {
            target.copy_from(&segment);
            target = target.sub(segment.len_bytes(), u32::MAX);
        });
    }

    /// Gives the guest its bytes of this piece.
    fn empty_bounce(&mut self) {
        let Some(bounce) = &self.bounce else { return };
        let mut source =
            bounce.segment().sub(self.piece.skip_bytes, len_u32(usize_of(self.piece.len_bytes)));
        pieces(self.segments.as_slice(), self.done_bytes, self.piece.len_bytes, |segment| {
            segment.copy_from(&source);
            source = source.sub(segment.len_bytes(), u32::MAX);
        });
    }
}

impl<C: Channel> Channel for AlignChannel<C> {
    #[inline]
    fn room(&self, io: &IoCx) -> Room {
        let mut room = self.inner.room(io);
        if !self.todo.is_empty() {
            // Half of the credit is the jobs'.
            room.bytes /= 2;
            if self.todo_starves {
                room.requests = 0;
            }
        }
        room
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let requests = batch.requests();
        let mut at = 0;
        while at < requests.len() {
            // A run of requests that pass goes down in one call.
            let mut end = at;
            while end < requests.len()
                && self.passes(&requests[end], batch.segments(&requests[end]))
            {
                if !self.hold(&requests[end]) {
                    break;
                }
                end += 1;
            }
            if end > at {
                let taken = self.inner.submit(io, batch.slice(at, end));
                for request in &requests[at + taken..end] {
                    self.release(request.tag);
                }
                at += taken;
                if at < end {
                    return at;
                }
                continue;
            }
            let request = &requests[at];
            if self.passes(request, batch.segments(request))
                || !self.start_job(io, request, batch.segments(request))
            {
                return at;
            }
            at += 1;
        }
        at
    }

    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        self.todo_starves = !self.todo.is_empty() && io.fair.credit_bytes() == 0;
        for _ in 0..self.todo.len() {
            if let Some(tag) = self.todo.pop_front() {
                self.advance(io, tag);
            }
        }
        self.ready.drain_into(done);
        let before = done.len();
        self.inner.poll(io, done);
        if self.locks.is_none() && self.jobs.live_count() == 0 {
            return;
        }
        let mut at = before;
        while at < done.len() {
            let completion = done[at];
            if completion.tag.is_layer() {
                done.swap_remove(at);
                self.piece_done(io, completion);
            } else {
                self.release(completion.tag);
                at += 1;
            }
        }
        self.ready.drain_into(done);
    }

    fn inflight(&self) -> usize {
        // Children are the inner channel's business; each job counts once here and its child once below.
        let children = self
            .jobs
            .iter()
            .filter(|(_, j)| matches!(j.step, Step::Reading | Step::Writing))
            .count();
        self.inner.inflight() - children + self.jobs.live_count() + self.ready.len()
    }

    fn must_poll(&self) -> bool {
        !self.todo.is_empty() || !self.ready.is_empty() || self.inner.must_poll()
    }

    fn close(&mut self, io: &mut IoCx) {
        self.inner.close(io);
    }
}
