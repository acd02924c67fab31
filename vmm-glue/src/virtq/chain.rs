//! HOT PATH
//! Walking a descriptor chain: each descriptor is read once, checked, and its buffer translated at once.
//!
//! Flow: descriptors from a ring's table or an indirect table → `ChainWalk::add` → segments in the batch's list, those
//! the device reads first, then those it writes. Owner: the queue's reactor.
//! **Invariant:** a buffer outside guest memory poisons the chain but does not end the walk, because the status byte
//! may still be reachable; order and length violations end the queue.
//!
//! for each descriptor: direction check → translate (split at region borders) → push

use ringmill_core::io::Batch;
use ringmill_core::limits::CHAIN_DESCRIPTORS_MAX;
use ringmill_core::mem::{MemTable, Segment};
use ringmill_core::spec::virtio_ring::DESC_F_WRITE;
use ringmill_core::units::{GuestAddr, len_u32};

use super::QueueError;

/// What every request of a block device starts with.
const HEADER_BYTES: u64 = 16;

/// Why a chain's data cannot be used although its status byte can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// A buffer outside guest memory.
    Address,
    /// More pieces than a batch can hold.
    TooManySegments,
}

/// A chain that was taken from a ring. Its segments lie in the batch from `segments_at` on.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// The head, or a packed ring's buffer id: what the guest knows the chain by when it comes back.
    pub head: u16,
    /// Index of the first segment in the batch.
    pub segments_at: usize,
    /// Segments that the device reads; those that it writes follow.
    pub readable_count: usize,
    /// All segments.
    pub segments_count: usize,
    /// Bytes that the device reads.
    pub readable_bytes: u64,
    /// Bytes that the device writes, the status byte included.
    pub writable_bytes: u64,
    /// The last writable byte: where virtio-blk wants its status.
    pub status: Segment,
    /// Set when the data must not be used.
    pub fault: Option<ChainFault>,
}

impl Chain {
    /// Bytes of data that it moves, as far as its lengths tell: without a header's and the status byte.
    #[inline]
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.readable_bytes.saturating_sub(HEADER_BYTES) + self.writable_bytes - 1
    }
}

/// A chain under construction.
pub(super) struct ChainWalk<'a> {
    mem: &'a MemTable,
    hint: &'a mut usize,
    batch: &'a mut Batch,
    start: usize,
    readable_count: usize,
    readable_bytes: u64,
    writable_bytes: u64,
    /// `None`: there is none, or the buffer's end wraps.
    last_writable_addr: Option<u64>,
    fault: Option<ChainFault>,
    descriptors_count: usize,
}

impl<'a> ChainWalk<'a> {
    #[inline]
    pub(super) fn new(
        mem: &'a MemTable,
        hint: &'a mut usize,
        batch: &'a mut Batch,
    ) -> ChainWalk<'a> {
        let start = batch.segments_mark();
        ChainWalk {
            mem,
            hint,
            batch,
            start,
            readable_count: 0,
            readable_bytes: 0,
            writable_bytes: 0,
            last_writable_addr: None,
            fault: None,
            descriptors_count: 0,
        }
    }

    /// The memory of an indirect table, whole.
    #[inline]
    pub(super) fn table(&mut self, addr: u64, len_bytes: u32) -> Option<Segment> {
        self.mem
            .translate(GuestAddr(addr), len_bytes, self.hint)
            .filter(|s| s.len_bytes() == len_bytes)
    }

    /// Adds one buffer. Always inlined: the walk's state stays in registers.
    #[inline(always)]
    pub(super) fn add(&mut self, addr: u64, len_bytes: u32, flags: u16) -> Result<(), QueueError> {
        self.descriptors_count += 1;
        if self.descriptors_count > CHAIN_DESCRIPTORS_MAX {
            return Err(QueueError::Loop { limit: len_u32(CHAIN_DESCRIPTORS_MAX) });
        }
        if len_bytes == 0 {
            return Ok(());
        }
        if flags & DESC_F_WRITE != 0 {
            self.writable_bytes += u64::from(len_bytes);
            self.last_writable_addr = addr.checked_add(u64::from(len_bytes) - 1);
        } else {
            if self.writable_bytes != 0 {
                return Err(QueueError::Order);
            }
            self.readable_bytes += u64::from(len_bytes);
        }
        if self.fault.is_some() {
            // The data will not be used: only lengths, order and the status byte's place still matter.
            return Ok(());
        }
        match self.mem.translate(GuestAddr(addr), len_bytes, self.hint) {
            Some(segment) if segment.len_bytes() == len_bytes => self.push(segment),
            other => self.add_in_pieces(addr, len_bytes, other),
        }
        if flags & DESC_F_WRITE == 0 {
            self.readable_count = self.batch.segments_mark() - self.start;
        }
        Ok(())
    }

    #[inline]
    fn push(&mut self, segment: Segment) {
        if !self.batch.push_segment(segment) {
            self.fault = Some(ChainFault::TooManySegments);
        }
    }

    /// A buffer that crosses regions, or is not guest memory at all.
    #[cold]
    #[inline(never)]
    fn add_in_pieces(&mut self, mut addr: u64, mut len_bytes: u32, mut first: Option<Segment>) {
        while len_bytes > 0 {
            let Some(segment) =
                first.take().or_else(|| self.mem.translate(GuestAddr(addr), len_bytes, self.hint))
            else {
                self.fault = Some(ChainFault::Address);
                return;
            };
            self.push(segment);
            if self.fault.is_some() {
                return;
            }
            len_bytes -= segment.len_bytes();
            addr = match addr.checked_add(u64::from(segment.len_bytes())) {
                Some(next) => next,
                None if len_bytes == 0 => return,
                None => {
                    self.fault = Some(ChainFault::Address);
                    return;
                }
            };
        }
    }

    /// Ends the walk. `Ok(None)`: the batch is too full for this chain; try again with an empty one.
    #[inline]
    pub(super) fn finish(self, head: u16) -> Result<Option<Chain>, QueueError> {
        let ChainWalk { mem, hint, batch, start, .. } = self;
        if self.fault == Some(ChainFault::TooManySegments) && start > 0 {
            batch.truncate_segments(start);
            return Ok(None);
        }
        let addr = self.last_writable_addr.ok_or(QueueError::NoStatus { addr: 0 })?;
        let status =
            mem.translate(GuestAddr(addr), 1, hint).ok_or(QueueError::NoStatus { addr })?;
        Ok(Some(Chain {
            head,
            segments_at: start,
            readable_count: self.readable_count,
            segments_count: batch.segments_mark() - start,
            readable_bytes: self.readable_bytes,
            writable_bytes: self.writable_bytes,
            status,
            fault: self.fault,
        }))
    }
}
