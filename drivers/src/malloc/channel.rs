//! HOT PATH
//! The RAM disk's channel.
//!
//! Owner: one reactor. **Invariant:** neither `submit` nor `poll` moves more than a bounded number of bytes per request: a
//! longer one, and one beyond the credit of its queue, is a job that goes on piece by piece, poll by poll; only holes of
//! many pages wait for the kernel.
//!
//! submit: copy | clear | start a job or a hole → ready; poll: a piece of the first job, holes that are done → completions

use std::collections::VecDeque;
use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::bdev::{BdevError, Channel, ReadyQueue, Room};
use ringmill_core::io::{BatchView, Completion, Completions, IoOp, IoRequest, Tag};
use ringmill_core::limits::{FAIR_ALONE_BYTES, QUEUE_INFLIGHT_MAX};
use ringmill_core::mem::{ListsHeld, Segment, SegmentList, pieces};
use ringmill_core::reactor::{IoCx, Ring};
use ringmill_core::units::bytes_u64;

use super::memory::DiskMemory;
use crate::flight::{FlightSlots, Flights, Plain};

/// Bytes that are cleared here and now: some 20 µs of a reactor's time. More goes through the ring.
const CLEAR_BYTES_MAX: u64 = 256 << 10;

/// The page size below which memory is not reserved.
const SMALL_PAGE_BYTES: u64 = 4096;

/// Holes in the making per channel; more wait on their virtqueue.
pub(super) const PUNCHES_MAX: usize = 64;

/// Jobs per channel; more wait on their virtqueue.
const JOBS_MAX: usize = 16;

/// A long request and how far it is.
#[derive(Debug)]
struct Job {
    request: IoRequest,
    segments: SegmentList,
    done_bytes: u64,
}

#[derive(Debug)]
pub(super) struct MallocChannel {
    memory: Arc<DiskMemory>,
    ready: ReadyQueue,
    /// Worked on one after the other.
    jobs: VecDeque<Job>,
    /// New requests took the whole credit of the last poll: the next one's is the jobs'.
    jobs_starve: bool,
    lists_held: ListsHeld,
    /// Without a ring everything is cleared by hand.
    punches: Option<Flights<Tag>>,
}

impl MallocChannel {
    #[cold]
    pub(super) fn new(
        memory: Arc<DiskMemory>,
        slots: FlightSlots<Tag>,
        ring: Option<&mut Ring>,
    ) -> Result<MallocChannel, BdevError> {
        let punches = match ring {
            Some(ring) => Some(Flights::open(slots, ring, memory.fd())?),
            None => None,
        };
        Ok(MallocChannel {
            memory,
            ready: ReadyQueue::new(QUEUE_INFLIGHT_MAX),
            jobs: VecDeque::with_capacity(JOBS_MAX),
            jobs_starve: false,
            lists_held: ListsHeld::default(),
            punches,
        })
    }

    /// Copies between the disk and the request's segments.
    #[inline]
    fn copy(&self, request: &IoRequest, segments: &[Segment]) -> IoStatus {
        let mut at_bytes = request.offset_bytes;
        for segment in segments {
            let status = copy(&self.memory, at_bytes, *segment, request.op == IoOp::Write);
            if !status.is_ok() {
                return status;
            }
            at_bytes += u64::from(segment.len_bytes());
        }
        IoStatus::Ok
    }

    /// Makes a long request a job; false when there is no room for it now.
    #[cold]
    #[inline(never)]
    fn start_job(&mut self, io: &mut IoCx, request: &IoRequest, segments: &[Segment]) -> bool {
        if self.jobs.len() == JOBS_MAX {
            return false;
        }
        let Some(segments) = io.lists.keep(segments, &mut self.lists_held) else { return false };
        self.jobs.push_back(Job { request: *request, segments, done_bytes: 0 });
        true
    }

    /// Does the next pieces of the first jobs, as far as the credit goes.
    #[cold]
    #[inline(never)]
    fn work(&mut self, io: &mut IoCx) {
        let mut left_bytes = io.fair.credit_bytes().min(FAIR_ALONE_BYTES);
        self.jobs_starve = left_bytes == 0;
        while left_bytes > 0 && !self.jobs.is_empty() {
            left_bytes -= self.work_once(io, left_bytes);
        }
    }

    /// Does a piece of the first job of at most `bytes_max`; its length.
    fn work_once(&mut self, io: &mut IoCx, bytes_max: u64) -> u64 {
        let Some(job) = self.jobs.front_mut() else { return bytes_max };
        let piece_bytes = bytes_max.min(job.request.len_bytes - job.done_bytes);
        io.fair.spend(piece_bytes);
        let mut at_bytes = job.request.offset_bytes + job.done_bytes;
        let mut status = IoStatus::Ok;
        if job.request.op.has_data() {
            let (memory, writes) = (&self.memory, job.request.op == IoOp::Write);
            pieces(job.segments.as_slice(), job.done_bytes, piece_bytes, |segment| {
                if status.is_ok() {
                    status = copy(memory, at_bytes, segment, writes);
                }
                at_bytes += u64::from(segment.len_bytes());
            });
        } else {
            self.memory.zero(at_bytes, piece_bytes);
        }
        job.done_bytes += piece_bytes;
        if job.done_bytes < job.request.len_bytes && status.is_ok() {
            return piece_bytes;
        }
        if let Some(job) = self.jobs.pop_front() {
            io.lists.give_back(job.segments, &mut self.lists_held);
            self.ready.push(Completion { tag: job.request.tag, status });
        }
        piece_bytes
    }

    /// Clears a range; true when the request has been completed or is on its way.
    #[cold]
    #[inline(never)]
    fn clear(&mut self, io: &mut IoCx, request: &IoRequest) -> bool {
        let (start, len) = (request.offset_bytes, request.len_bytes);
        let page = u64::from(self.memory.page_bytes());
        let hole_start = start.next_multiple_of(page);
        let hole_end = (start + len) / page * page;
        if len <= CLEAR_BYTES_MAX.min(io.fair.credit_bytes()) {
            return self.clear_by_hand(io, request);
        }
        // A hole in huge pages would give their reservation away: to be short of one later is fatal.
        let holes = page == SMALL_PAGE_BYTES && hole_end > hole_start;
        let (Some(punches), Some(ring), true) = (&mut self.punches, &mut io.ring, holes) else {
            return self.start_job(io, request, &[]);
        };
        let hole = Plain::Fallocate {
            mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset_bytes: hole_start,
            len_bytes: hole_end - hole_start,
        };
        let Ok(flight) = punches.insert(SegmentList::default(), request.tag) else { return false };
        if !punches.start(ring, flight, hole) {
            punches.remove(flight);
            return false;
        }
        self.memory.zero(start, hole_start - start);
        self.memory.zero(hole_end, start + len - hole_end);
        true
    }

    fn clear_by_hand(&mut self, io: &mut IoCx, request: &IoRequest) -> bool {
        io.fair.spend(request.len_bytes);
        self.memory.zero(request.offset_bytes, request.len_bytes);
        self.ready.push(Completion { tag: request.tag, status: IoStatus::Ok });
        true
    }

    #[cold]
    #[inline(never)]
    fn collect_holes(&mut self, io: &mut IoCx) {
        let (Some(punches), Some(ring)) = (&mut self.punches, &mut io.ring) else { return };
        while self.ready.room() > self.jobs.len()
            && let Some((flight, result)) = punches.landed(ring)
        {
            let Some((_, tag)) = punches.remove(flight) else { continue };
            let status = if result < 0 { IoStatus::from_errno(-result) } else { IoStatus::Ok };
            self.ready.push(Completion { tag, status });
        }
    }

    #[inline]
    fn punches_count(&self) -> usize {
        self.punches.as_ref().map_or(0, Flights::live_count)
    }
}

/// What is copied while its request is taken; a longer request is a job.
#[inline]
fn at_once_bytes(io: &IoCx) -> u64 {
    io.fair.credit_bytes().min(FAIR_ALONE_BYTES)
}

/// Copies between one segment and the disk from `at_bytes` on.
#[inline]
fn copy(memory: &DiskMemory, mut at_bytes: u64, segment: Segment, writes: bool) -> IoStatus {
    let mut rest = segment;
    while rest.len_bytes() > 0 {
        let Some(disk) = memory.at(at_bytes, u64::from(rest.len_bytes())) else {
            return IoStatus::Range;
        };
        let copied = if writes { disk.copy_from(&rest) } else { rest.copy_from(&disk) };
        at_bytes += bytes_u64(copied);
        rest = rest.sub(disk.len_bytes(), u32::MAX);
    }
    IoStatus::Ok
}

impl Channel for MallocChannel {
    #[inline]
    fn room(&self, io: &IoCx) -> Room {
        let credit_bytes = io.fair.credit_bytes();
        let (requests, bytes) = match self.jobs.len() {
            0 => (self.ready.room(), credit_bytes),
            _ if self.jobs_starve => (0, credit_bytes),
            // Half of the credit is the jobs'.
            JOBS_MAX => (0, credit_bytes),
            count => (self.ready.room().saturating_sub(count), credit_bytes / 2),
        };
        Room { requests, bytes, not_before_ns: 0 }
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        for (at, request) in batch.requests().iter().enumerate() {
            if self.ready.room() <= self.jobs.len() {
                return at;
            }
            let status = match request.op {
                IoOp::Read | IoOp::Write if request.len_bytes > at_once_bytes(io) => {
                    if !self.start_job(io, request, batch.segments(request)) {
                        return at;
                    }
                    continue;
                }
                IoOp::Read | IoOp::Write => {
                    io.fair.spend(request.len_bytes);
                    self.copy(request, batch.segments(request))
                }
                IoOp::Flush => IoStatus::Ok,
                IoOp::Discard | IoOp::WriteZeroes => {
                    if !self.clear(io, request) {
                        return at;
                    }
                    continue;
                }
            };
            self.ready.push(Completion { tag: request.tag, status });
        }
        batch.requests().len()
    }

    #[inline]
    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        if !self.jobs.is_empty() {
            self.work(io);
        }
        if self.punches_count() > 0 {
            self.collect_holes(io);
        }
        self.ready.drain_into(done);
    }

    fn inflight(&self) -> usize {
        self.ready.len() + self.jobs.len() + self.punches_count()
    }

    fn must_poll(&self) -> bool {
        !self.ready.is_empty() || !self.jobs.is_empty()
    }

    #[cold]
    fn close(&mut self, io: &mut IoCx) {
        if let (Some(punches), Some(ring)) = (&mut self.punches, &mut io.ring) {
            punches.close(ring);
        }
    }
}
