//! HOT PATH
//! One reactor's way into a file or block device.
//!
//! Owner: one reactor; entries go onto its shared ring. **Invariant:** a request is completed only after the kernel's
//! result for its last piece; nothing allocates after construction.
//!
//! submit: request → slot → entry on the ring (the reactor commits once per pass)
//! poll:   result → done? → completion | short, interrupted, other stage → next entry | later → waiting list

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ringmill_core::IoStatus;
use ringmill_core::bdev::{Channel, Room};
use ringmill_core::io::{BatchView, Completion, Completions, IoFlags, IoOp, Tag};
use ringmill_core::mem::ListsHeld;
use ringmill_core::reactor::{IoCx, Ring, RingError};

use super::discard_thread::Answers;
use super::work::{Outcome, Stage, Work};
use super::{Counters, OldestStart, REQUESTS_MAX, Shared};
use crate::flight::{Direction, FlightSlots, Flights, Plain};

/// Polls without a result between two looks at the clock.
const QUIET_POLLS: u32 = 16;

/// Flushes, discards and write-zeroes of one channel in the kernel at a time. They occupy worker threads of the
/// reactor's ring, of which a disk that does not answer must not take all.
const SLOW_MAX: usize = 4;

/// The least that a piece is cut to: a page of the media that are memory.
const PIECE_LEAST_BYTES: u32 = 4096;

/// How often the oldest request is published, nanoseconds.
const OLDEST_PERIOD_NS: u64 = 100_000_000;

#[derive(Debug)]
pub(super) struct UringChannel {
    pub(super) shared: Arc<Shared>,
    pub(super) flights: Flights<Work>,
    /// Requests with nothing in the kernel, and when to try again.
    pub(super) waiting: VecDeque<(Tag, u64)>,
    /// New requests took the whole credit of the last poll: the next one's is for those that wait.
    waiting_starve: bool,
    /// Results that do not come through the ring, and how many are awaited.
    pub(super) answers: Arc<Answers>,
    pub(super) off_ring_count: usize,
    /// Transfers that were done in place, and their results.
    ended: VecDeque<(Tag, i32)>,
    /// What it holds of the reactor's pool.
    pub(super) lists_held: ListsHeld,
    /// Requests that the kernel does in worker threads: syncs and ranges.
    slow_count: usize,
    write_flags: i32,
    /// Plain transfers go to the ring of polled devices.
    polls: bool,
    /// A ring that this channel brought and the reactor did not need: kept for the control thread to drop.
    spare: Option<Ring>,
    oldest: Arc<OldestStart>,
    oldest_due_ns: u64,
    quiet_polls: u32,
}

impl UringChannel {
    #[cold]
    pub(super) fn open(
        shared: Arc<Shared>,
        slots: FlightSlots<Work>,
        answers: Arc<Answers>,
        oldest: Arc<OldestStart>,
        ring: &mut Ring,
    ) -> Result<UringChannel, RingError> {
        let flights = Flights::open(slots, ring, shared.fd())?;
        let write_flags = shared.write_flags;
        Ok(UringChannel {
            shared,
            flights,
            waiting: VecDeque::with_capacity(REQUESTS_MAX),
            waiting_starve: false,
            answers,
            off_ring_count: 0,
            ended: VecDeque::with_capacity(REQUESTS_MAX),
            lists_held: ListsHeld::default(),
            slow_count: 0,
            write_flags,
            polls: false,
            spare: None,
            oldest,
            oldest_due_ns: 0,
            quiet_polls: 0,
        })
    }

    /// Has the device polled from now on, with this ring unless the reactor has one.
    #[cold]
    pub(super) fn poll_device(&mut self, io: &mut IoCx, ring: Ring) -> Result<(), RingError> {
        self.spare = io.use_polled(ring)?;
        match &mut io.polled {
            Some(ring) => self.flights.open_polled(ring, self.shared.fd())?,
            None => return Ok(()),
        }
        self.polls = true;
        Ok(())
    }

    /// The next result, from wherever it comes.
    #[inline]
    fn result(&mut self, io: &mut IoCx) -> Option<(Tag, i32)> {
        if let Some(ended) = self.ended.pop_front() {
            return Some(ended);
        }
        if let Some(ring) = &mut io.ring
            && let Some(landed) = self.flights.landed(ring)
        {
            return Some(landed);
        }
        while self.flights.polled_count() > 0 {
            let (flight, result) = self.flights.landed_polled(io.polled.as_mut()?)?;
            if result != -libc::EOPNOTSUPP {
                return Some((flight, result));
            }
            self.stop_polling(io, flight);
        }
        None
    }

    /// The device gave up its queues for polling (a reset may do that): from now on it is not polled.
    #[cold]
    #[inline(never)]
    fn stop_polling(&mut self, io: &mut IoCx, flight: Tag) {
        self.polls = false;
        self.go_on(io, flight, Outcome::Again(0));
    }

    /// Puts the request's next entry on the ring; false when the ring takes nothing now.
    #[inline]
    pub(super) fn launch(&mut self, io: &mut IoCx, flight: Tag) -> bool {
        let Some(work) = self.flights.state(flight) else { return true };
        let Some(ring) = &mut io.ring else { return false };
        let (at_bytes, mut left_bytes) = (work.at_bytes(), work.left_bytes());
        let direction = match (work.stage, work.op) {
            (Stage::Transfer, IoOp::Read) => Direction::Read,
            (Stage::Transfer, IoOp::Write) if work.flags.contains(IoFlags::FUA) => {
                Direction::Write(libc::RWF_DSYNC)
            }
            (Stage::Transfer, IoOp::Write) => Direction::Write(self.write_flags),
            (Stage::Sync, _) => return self.flights.start(ring, flight, Plain::DataSync),
            _ => return self.launch_range(io, flight),
        };
        if io.fair.credit_bytes() == 0 {
            return false;
        }
        // The kernel may copy the piece inside the reactor's own system call. Stable writes are not cut shorter: each
        // piece would wait for the medium.
        if direction != Direction::Write(libc::RWF_DSYNC) {
            left_bytes = left_bytes.min(io.fair.piece_bytes());
        }
        if self.shared.in_place {
            return self.transfer_in_place(io, flight, direction, (at_bytes, left_bytes));
        }
        // What has to be stable goes the ordinary way: the flush behind it is nothing that can be polled for.
        let plain = matches!(direction, Direction::Read | Direction::Write(0));
        let piece = match &mut io.polled {
            Some(polled) if self.polls && plain => {
                self.flights.transfer_polled(polled, flight, direction, at_bytes, left_bytes)
            }
            _ => self.flights.transfer(ring, flight, direction, at_bytes, left_bytes),
        };
        let (Some(piece_bytes), Some(work)) = (piece, self.flights.state(flight)) else {
            return false;
        };
        io.fair.spend(piece_bytes);
        work.piece_bytes = piece_bytes;
        true
    }

    /// Moves the next piece now; its result waits for the next poll.
    #[inline]
    fn transfer_in_place(
        &mut self,
        io: &mut IoCx,
        flight: Tag,
        direction: Direction,
        (at_bytes, left_bytes): (u64, u64),
    ) -> bool {
        let unit_bytes = u64::from(self.shared.transfer_unit_bytes.max(PIECE_LEAST_BYTES));
        let credit_bytes = io.fair.credit_bytes().min(left_bytes);
        let left_bytes = left_bytes.min(credit_bytes.next_multiple_of(unit_bytes));
        let (fd, flights) = (self.shared.fd(), &mut self.flights);
        let moved = flights.transfer_in_place(fd, flight, direction, at_bytes, left_bytes);
        let (Some((piece_bytes, result)), Some(work)) = (moved, self.flights.state(flight)) else {
            return false;
        };
        io.fair.spend(piece_bytes);
        work.piece_bytes = piece_bytes;
        self.ended.push_back((flight, result));
        true
    }

    /// Acts on a result; the status when the request is over.
    #[inline]
    pub(super) fn settle(&mut self, io: &mut IoCx, flight: Tag, result: i32) -> Option<IoStatus> {
        let work = self.flights.state(flight)?;
        let sync_after = self.shared.write_through || work.flags.contains(IoFlags::FUA);
        let stable = sync_after && work.op == IoOp::Write;
        let result = self.shared.sync_result(work.stage, stable, result);
        match work.outcome(result, self.shared.transfer_unit_bytes, sync_after) {
            Outcome::Done(status) => Some(status),
            other => {
                self.go_on(io, flight, other);
                None
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn go_on(&mut self, io: &mut IoCx, flight: Tag, outcome: Outcome) {
        let mut not_before_ns = 0;
        match outcome {
            Outcome::Done(_) => return,
            Outcome::Onward(moved_bytes) => {
                self.flights.advance(flight, moved_bytes);
                Counters::note(&self.shared.counters.continued, 1);
            }
            Outcome::Again(pause_ns) => {
                Counters::note(&self.shared.counters.retried, 1);
                not_before_ns = io.clock.now_ns() + pause_ns;
            }
            Outcome::OtherWay(way) => {
                self.shared.abilities.strike(way);
                if let Some(work) = self.flights.state(flight) {
                    work.stage = Stage::Transfer;
                }
            }
        }
        if not_before_ns > 0 || !self.launch(io, flight) {
            self.waiting.push_back((flight, not_before_ns));
        }
    }

    /// Ends a request.
    #[inline]
    fn finish(&mut self, io: &mut IoCx, flight: Tag, status: IoStatus, done: &mut Completions) {
        if let Some((segments, work)) = self.flights.remove(flight) {
            self.slow_count -= usize::from(!work.op.has_data());
            io.lists.give_back(segments, &mut self.lists_held);
            done.push(Completion { tag: work.tag, status });
        }
    }

    #[cold]
    #[inline(never)]
    fn poll_waiting(&mut self, io: &mut IoCx) {
        let now_ns = io.clock.now_ns();
        self.waiting_starve = io.fair.credit_bytes() == 0;
        for _ in 0..self.waiting.len() {
            if io.fair.credit_bytes() == 0 {
                return;
            }
            let Some((flight, not_before_ns)) = self.waiting.pop_front() else { return };
            if not_before_ns > now_ns || !self.launch(io, flight) {
                self.waiting.push_back((flight, not_before_ns));
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn publish_oldest(&mut self, io: &IoCx) {
        self.quiet_polls = 0;
        let now_ns = io.clock.now_ns();
        if now_ns < self.oldest_due_ns {
            return;
        }
        self.oldest_due_ns = now_ns + OLDEST_PERIOD_NS;
        let oldest_ns = self.flights.states().map(|work| work.started_ns).min().unwrap_or(0);
        self.oldest.store(oldest_ns, Ordering::Relaxed);
        let stale = self.flights.take_stale();
        if stale > 0 {
            Counters::note(&self.shared.counters.stale, stale);
        }
    }
}

impl Channel for UringChannel {
    #[inline]
    fn room(&self, io: &IoCx) -> Room {
        let ring_room = io.ring.as_ref().map_or(0, |ring| self.flights.entries_room(ring));
        let polled_room = io.polled.as_ref().and_then(|ring| self.flights.polled_room(ring));
        let ring_room = ring_room.min(polled_room.unwrap_or(u32::MAX));
        let mut requests = self.flights.room().min(ringmill_core::units::index(ring_room));
        let mut bytes = io.fair.credit_bytes();
        if !self.waiting.is_empty() {
            // Half of the credit is for those that wait for their next piece.
            bytes /= 2;
            if self.waiting_starve {
                requests = 0;
            }
        }
        Room { requests, bytes, not_before_ns: 0 }
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let started_ns = io.clock.now_ns();
        let was_idle = self.flights.live_count() == 0;
        let room = self.room(io).requests;
        let mut taken = 0;
        for request in batch.requests().iter().take(room) {
            let slow = !request.op.has_data();
            if slow && self.slow_count == SLOW_MAX {
                break;
            }
            let Some(segments) = io.lists.keep(batch.segments(request), &mut self.lists_held)
            else {
                break;
            };
            let flight = match self.flights.insert(segments, Work::new(request, started_ns)) {
                Ok(flight) => flight,
                Err(segments) => {
                    io.lists.give_back(segments, &mut self.lists_held);
                    break;
                }
            };
            if !self.launch(io, flight) {
                if let Some((segments, _)) = self.flights.remove(flight) {
                    io.lists.give_back(segments, &mut self.lists_held);
                }
                break;
            }
            self.slow_count += usize::from(slow);
            taken += 1;
        }
        if was_idle && taken > 0 {
            self.oldest.store(started_ns, Ordering::Relaxed);
        }
        taken
    }

    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        let before = done.len();
        while !done.is_full() {
            let Some((flight, result)) = self.result(io) else { break };
            if let Some(status) = self.settle(io, flight, result) {
                self.finish(io, flight, status, done);
            }
        }
        if !self.waiting.is_empty() {
            self.poll_waiting(io);
        }
        if self.off_ring_count > 0 {
            while !done.is_full() {
                let Some((flight, result)) = self.off_ring_result() else { break };
                if let Some(status) = self.settle(io, flight, result) {
                    self.finish(io, flight, status, done);
                }
            }
        }
        if self.flights.live_count() == 0 {
            if done.len() > before {
                self.oldest.store(0, Ordering::Relaxed);
            }
        } else if done.len() == before {
            self.quiet_polls += 1;
            if self.quiet_polls >= QUIET_POLLS {
                self.publish_oldest(io);
            }
        }
    }

    fn inflight(&self) -> usize {
        self.flights.live_count()
    }

    fn must_poll(&self) -> bool {
        !self.waiting.is_empty()
            || !self.ended.is_empty()
            || self.off_ring_count > 0
            || self.flights.polled_count() > 0
    }

    #[cold]
    fn close(&mut self, io: &mut IoCx) {
        if let Some(ring) = &mut io.ring {
            self.flights.close(ring);
        }
        if let Some(ring) = &mut io.polled {
            self.flights.close_polled(ring);
        }
    }
}
