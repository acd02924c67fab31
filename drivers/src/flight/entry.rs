//! HOT PATH
//! The ring entries of a channel's operations, and how a list of segments is cut into pieces for them.
//!
//! Flow: segments → `cut` → an entry. Plain data; owner: nobody.

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{opcode, squeue};
use ringmill_core::mem::Segment;
use ringmill_core::reactor::FixedFile;
use ringmill_core::units::{bytes_u64, index, len_u32, usize_of};

/// Segments of one entry (UIO_MAXIOV, `linux/uio.h`).
const ENTRY_SEGMENTS_MAX: usize = 1024;

/// Bytes of one entry, a multiple of every block. The kernel may copy or pin an entry's data inside the reactor's own system
/// call, so a piece is no longer than what a pass may take.
pub(super) const ENTRY_BYTES_MAX: u64 = ringmill_core::limits::FAIR_ALONE_BYTES;

/// BLOCK_URING_CMD_DISCARD, `_IO(0x12, 0)` (`linux/blkdev.h`, Linux 6.12).
pub(crate) const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Medium to memory.
    Read,
    /// Memory to medium, with these RWF_ flags.
    Write(i32),
}

/// An operation without guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plain {
    /// fdatasync.
    DataSync,
    /// fallocate with this mode.
    Fallocate { mode: i32, offset_bytes: u64, len_bytes: u64 },
    /// Discard on a block device.
    BlockDiscard { offset_bytes: u64, len_bytes: u64 },
}

/// The first piece of a list.
pub(super) enum Cut {
    /// One segment: address and length.
    One(usize, u32),
    /// The first so many segments, and their bytes.
    Many(usize, u64),
}

#[inline]
pub(super) fn cut(segments: &[Segment], limit_bytes: u64) -> Cut {
    let Some(first) = segments.first() else { return Cut::One(0, 0) };
    let first_len = u64::from(first.len_bytes());
    if segments.len() == 1 || first_len >= limit_bytes {
        return Cut::One(first.host().0, len_u32(usize_of(first_len.min(limit_bytes))));
    }
    let mut bytes = 0;
    let mut count = 0;
    for segment in segments.iter().take(ENTRY_SEGMENTS_MAX) {
        let len = bytes_u64(index(segment.len_bytes()));
        if bytes + len > limit_bytes {
            break;
        }
        bytes += len;
        count += 1;
    }
    Cut::Many(count, bytes)
}

/// A transfer of one piece of memory, in a registered buffer if it has a slot.
#[inline]
pub(super) fn entry_of_one(
    file: Fixed,
    direction: Direction,
    (host, len): (usize, u32),
    offset_bytes: u64,
    slot: Option<u16>,
) -> squeue::Entry {
    let pointer = host as *mut u8;
    match (direction, slot) {
        (Direction::Read, Some(slot)) => {
            opcode::ReadFixed::new(file, pointer, len, slot).offset(offset_bytes).build()
        }
        (Direction::Read, None) => {
            opcode::Read::new(file, pointer, len).offset(offset_bytes).build()
        }
        (Direction::Write(flags), Some(slot)) => {
            let entry = opcode::WriteFixed::new(file, pointer, len, slot);
            entry.offset(offset_bytes).rw_flags(flags).build()
        }
        (Direction::Write(flags), None) => {
            opcode::Write::new(file, pointer, len).offset(offset_bytes).rw_flags(flags).build()
        }
    }
}

/// A transfer of a list of pieces, all of them in one registered buffer if there is a slot.
#[inline]
pub(super) fn entry_of_many(
    file: Fixed,
    direction: Direction,
    (list, count): (*const libc::iovec, u32),
    offset_bytes: u64,
    slot: Option<u16>,
) -> squeue::Entry {
    match (direction, slot) {
        (Direction::Read, Some(slot)) => {
            opcode::ReadvFixed::new(file, list, count, slot).offset(offset_bytes).build()
        }
        (Direction::Read, None) => {
            opcode::Readv::new(file, list, count).offset(offset_bytes).build()
        }
        (Direction::Write(flags), Some(slot)) => {
            let entry = opcode::WritevFixed::new(file, list, count, slot);
            entry.offset(offset_bytes).rw_flags(flags).build()
        }
        (Direction::Write(flags), None) => {
            opcode::Writev::new(file, list, count).offset(offset_bytes).rw_flags(flags).build()
        }
    }
}

pub(super) fn plain_entry(file: FixedFile, plain: Plain) -> squeue::Entry {
    let file = file.as_fixed();
    match plain {
        Plain::DataSync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        Plain::Fallocate { mode, offset_bytes, len_bytes } => {
            opcode::Fallocate::new(file, len_bytes).offset(offset_bytes).mode(mode).build()
        }
        Plain::BlockDiscard { offset_bytes, len_bytes } => discard_command(
            opcode::UringCmd16::new(file, BLOCK_URING_CMD_DISCARD),
            offset_bytes,
            len_bytes,
        ),
    }
}

/// The command's range lies in `addr` and in the first half of the command bytes, where `addr3` is.
pub(crate) fn discard_command(
    command: opcode::UringCmd16,
    offset_bytes: u64,
    len_bytes: u64,
) -> squeue::Entry {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&len_bytes.to_ne_bytes());
    command.addr(Some(offset_bytes)).cmd(bytes).build()
}
