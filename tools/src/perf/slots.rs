//! HOT PATH
//! The requests of one queue: a cache line each for header and status, and a data buffer, laid out once.
//!
//! Flow: `prepare` writes what differs from request to request (type, sector, status); the device writes the status.
//! Owner: the queue's ring. **Invariant:** a slot's memory belongs to its request from submission to completion; the
//! status is never what a predecessor left there.

use std::sync::atomic::Ordering;

use ringmill_core::limits::SECTOR_BYTES;
use ringmill_core::mem::Segment;
use ringmill_core::spec::virtio_blk::{HEADER_BYTES, T_FLUSH, T_IN, T_OUT};
use ringmill_core::spec::virtio_ring::{DESC_F_NEXT, DESC_F_WRITE};
use ringmill_core::units::{bytes_u64, index};

use super::layout::{LINE_BYTES, QueueLayout, STATUS_AT, TABLE_AT};
use super::memory::{LoadMemory, Window};

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Op {
    /// Disk to memory.
    Read = 0,
    /// Memory to disk.
    Write = 1,
    /// What was written is on stable storage when this completes.
    Flush = 2,
}

impl Op {
    /// Its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
        }
    }

    const fn virtio_type(self) -> u32 {
        match self {
            Op::Read => T_IN,
            Op::Write => T_OUT,
            Op::Flush => T_FLUSH,
        }
    }
}

/// A status that no device writes (virtio 1.2 §5.2.6 has 0 to 2).
pub(crate) const STATUS_UNWRITTEN: u8 = 0xff;

/// A descriptor as its two words: address; length, flags (or id) and next (or flags).
pub(crate) type Words = [u64; 2];

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffer {
    pub(crate) addr: u64,
    pub(crate) len_bytes: u32,
    /// `DESC_F_WRITE` or 0.
    pub(crate) flags: u16,
}

impl Buffer {
    /// As a descriptor of a split ring or an indirect table. A packed indirect table ignores `next` and NEXT, so its
    /// descriptors are made with `more` = false (virtio 1.2 §2.8.7).
    pub(crate) fn split_words(self, more: bool, next: u16) -> Words {
        let flags = if more { self.flags | DESC_F_NEXT } else { self.flags };
        let rest = u64::from(self.len_bytes) | (u64::from(flags) << 32) | (u64::from(next) << 48);
        [self.addr, rest]
    }

    /// As a descriptor of a packed ring or table (virtio 1.2 §2.8.13), without the marks of a lap.
    #[inline]
    pub(crate) fn packed_words(self, more: bool, id: u16) -> Words {
        let flags = if more { self.flags | DESC_F_NEXT } else { self.flags };
        let rest = u64::from(self.len_bytes) | (u64::from(id) << 32) | (u64::from(flags) << 48);
        [self.addr, rest]
    }
}

/// The buffers of a request, header first, status last.
pub(crate) type Chain = arrayvec::ArrayVec<Buffer, 3>;

/// The slots of one queue.
#[derive(Debug)]
pub(crate) struct SlotLines {
    lines: Window,
    data: Box<[Segment]>,
    line_bytes: usize,
    lines_addr: u64,
    data_addr: u64,
    data_stride: u64,
    io_bytes: u32,
}

impl SlotLines {
    /// The slots of the queue whose memory begins at `base` of the shared memory.
    #[cold]
    pub(crate) fn new(memory: &LoadMemory, layout: &QueueLayout, base: usize) -> SlotLines {
        let lines_at = base + layout.lines_at;
        let data_at = bytes_u64(base + layout.data_at);
        let line_bytes = layout.line_bytes();
        let data = (0..u64::from(layout.depth))
            .map(|slot| memory.segment(data_at + slot * layout.data_stride(), layout.io_bytes))
            .collect();
        SlotLines {
            lines: memory.window(lines_at, usize::from(layout.depth) * line_bytes),
            data,
            line_bytes,
            lines_addr: memory.guest_addr(bytes_u64(lines_at)),
            data_addr: memory.guest_addr(data_at),
            data_stride: layout.data_stride(),
            io_bytes: layout.io_bytes,
        }
    }

    #[inline]
    fn line(&self, slot: u16) -> usize {
        usize::from(slot) * self.line_bytes
    }

    /// Fills in what differs between requests of one kind.
    #[inline]
    pub(crate) fn prepare(&self, slot: u16, op: Op, offset_bytes: u64) {
        let line = self.line(slot);
        let sector = offset_bytes / u64::from(SECTOR_BYTES);
        self.lines.store_u64(line, u64::from(op.virtio_type()), Ordering::Relaxed);
        self.lines.store_u64(line + 8, sector, Ordering::Relaxed);
        self.lines.store_u8(line + STATUS_AT, STATUS_UNWRITTEN);
    }

    /// The status byte.
    #[inline]
    pub(crate) fn status(&self, slot: u16) -> u8 {
        self.lines.load_u8(self.line(slot) + STATUS_AT)
    }

    /// Asks for the line of a slot whose status will be read soon.
    #[inline]
    pub(crate) fn prefetch(&self, slot: u16) {
        self.lines.prefetch(self.line(slot));
    }

    /// A slot's data.
    pub(crate) fn data(&self, slot: u16) -> Segment {
        self.data[usize::from(slot)]
    }

    /// The buffers of a request.
    #[cold]
    pub(crate) fn chain(&self, slot: u16, op: Op) -> Chain {
        let line = self.lines_addr + bytes_u64(self.line(slot));
        let data = self.data_addr + u64::from(slot) * self.data_stride;
        let mut chain = Chain::new();
        chain.push(Buffer { addr: line, len_bytes: HEADER_BYTES, flags: 0 });
        if op != Op::Flush {
            let flags = if op == Op::Read { DESC_F_WRITE } else { 0 };
            chain.push(Buffer { addr: data, len_bytes: self.io_bytes, flags });
        }
        let status = line + bytes_u64(STATUS_AT);
        chain.push(Buffer { addr: status, len_bytes: 1, flags: DESC_F_WRITE });
        chain
    }

    /// Writes the slot's indirect table and returns its address and length. `packed` tables need no links.
    #[cold]
    pub(crate) fn write_table(&self, slot: u16, op: Op, packed: bool) -> (u64, u32) {
        let chain = self.chain(slot, op);
        let (table, count) = (self.line(slot) + TABLE_AT, chain.len());
        for ((number, buffer), next) in chain.iter().enumerate().zip(1u16..) {
            let more = number + 1 < count;
            let words = if packed {
                buffer.packed_words(false, 0)
            } else {
                buffer.split_words(more, if more { next } else { 0 })
            };
            self.lines.store_u64(table + 16 * number, words[0], Ordering::Relaxed);
            self.lines.store_u64(table + 16 * number + 8, words[1], Ordering::Relaxed);
        }
        let len_bytes = [0, 16, 32, 48][count];
        (self.lines_addr + bytes_u64(table), len_bytes)
    }
}

const _: () = assert!(STATUS_AT >= HEADER_BYTES as usize && STATUS_AT < LINE_BYTES);
const _: () = assert!(index(SECTOR_BYTES) == 512);
