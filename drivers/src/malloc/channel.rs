//! HOT PATH
//! The RAM disk's channel.
//!
//! Owner: one reactor. **Invariant:** a request that only copies is complete when `submit` returns; only holes of many
//! pages wait for the kernel.
//!
//! submit: copy | clear | start a hole → ready; poll: holes that are done → ready → completions

use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::bdev::{BdevError, Channel, ReadyQueue, Room};
use ringmill_core::io::{BatchView, Completion, Completions, IoOp, IoRequest, Tag};
use ringmill_core::limits::QUEUE_INFLIGHT_MAX;
use ringmill_core::mem::{Segment, SegmentList};
use ringmill_core::reactor::{IoCx, Ring};
use ringmill_core::units::bytes_u64;

use super::memory::DiskMemory;
use crate::flight::{FlightSlots, Flights, Plain};

/// Bytes that are cleared here and now: some 20 µs of a reactor's time. More goes through the ring.
const CLEAR_BYTES_MAX: u64 = 256 << 10;

/// Holes in the making per channel; more wait on their virtqueue.
pub(super) const PUNCHES_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct MallocChannel {
    memory: Arc<DiskMemory>,
    ready: ReadyQueue,
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
        Ok(MallocChannel { memory, ready: ReadyQueue::new(QUEUE_INFLIGHT_MAX), punches })
    }

    /// Copies between the disk and the request's segments.
    #[inline]
    fn copy(&self, request: &IoRequest, segments: &[Segment]) -> IoStatus {
        let mut offset_bytes = request.offset_bytes;
        let writes = request.op == IoOp::Write;
        for segment in segments {
            let mut rest = *segment;
            while rest.len_bytes() > 0 {
                let Some(disk) = self.memory.at(offset_bytes, u64::from(rest.len_bytes())) else {
                    return IoStatus::Range;
                };
                let copied = if writes { disk.copy_from(&rest) } else { rest.copy_from(&disk) };
                offset_bytes += bytes_u64(copied);
                rest = rest.sub(disk.len_bytes(), u32::MAX);
            }
        }
        IoStatus::Ok
    }

    /// Clears a range; true when the request has been completed or is on its way.
    #[cold]
    #[inline(never)]
    fn clear(&mut self, io: &mut IoCx, request: &IoRequest) -> bool {
        let (start, len) = (request.offset_bytes, request.len_bytes);
        let page = u64::from(self.memory.page_bytes());
        let hole_start = start.next_multiple_of(page);
        let hole_end = (start + len) / page * page;
        let (Some(punches), Some(ring)) = (&mut self.punches, &mut io.ring) else {
            return self.clear_by_hand(request);
        };
        if len <= CLEAR_BYTES_MAX || hole_end <= hole_start {
            return self.clear_by_hand(request);
        }
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

    fn clear_by_hand(&mut self, request: &IoRequest) -> bool {
        self.memory.zero(request.offset_bytes, request.len_bytes);
        self.ready.push(Completion { tag: request.tag, status: IoStatus::Ok });
        true
    }

    #[cold]
    #[inline(never)]
    fn collect_holes(&mut self, io: &mut IoCx) {
        let (Some(punches), Some(ring)) = (&mut self.punches, &mut io.ring) else { return };
        while self.ready.room() > 0
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

impl Channel for MallocChannel {
    #[inline]
    fn room(&self, _io: &IoCx) -> Room {
        Room { requests: self.ready.room(), not_before_ns: 0 }
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        for (at, request) in batch.requests().iter().enumerate() {
            if self.ready.room() == 0 {
                return at;
            }
            let status = match request.op {
                IoOp::Read | IoOp::Write => self.copy(request, batch.segments(request)),
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
        if self.punches_count() > 0 {
            self.collect_holes(io);
        }
        self.ready.drain_into(done);
    }

    fn inflight(&self) -> usize {
        self.ready.len() + self.punches_count()
    }

    fn must_poll(&self) -> bool {
        !self.ready.is_empty()
    }

    #[cold]
    fn close(&mut self, io: &mut IoCx) {
        if let (Some(punches), Some(ring)) = (&mut self.punches, &mut io.ring) {
            punches.close(ring);
        }
    }
}
