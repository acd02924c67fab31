//! HOT PATH
//! What one command may do of a request.
//!
//! Flow: the rest of a request → the bytes of its next command, and where its data lies. Owner: one reactor.
//! **Invariant:** a command is whole blocks, at least one; the commands of a request follow each other without a gap. It
//! crosses no boundary of the namespace and moves no more than the device takes at once.
//!
//! next: left → bounds of the device → PRPs reach that far? done | SGLs? as far as a page of them | as far as PRPs reach

use ringmill_core::bdev::Alignment;
use ringmill_core::limits::NVME_TRANSFER_BYTES_MAX;
use ringmill_core::mem::{IovaOffset, Segment};
use ringmill_core::spec::nvme::nvm::DSM_RANGES_MAX;
use ringmill_core::units::{bytes_u64, len_u32, usize_of};

use super::list::{Cursor, DataPointer, ListPage};
use super::parts::{DiscardLimits, NamespaceShape};
use super::{prp, sgl};

/// Blocks of one command: 16 bits, counted from zero.
const BLOCKS_MAX: u64 = 1 << 16;

/// The least address and segment unit that commands can name.
const DWORD_BYTES: u32 = 4;

/// Bounds of one namespace's commands, worked out once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) block_shift: u32,
    transfer_bytes_max: u64,
    /// 0: none.
    boundary_bytes: u64,
    sgl: bool,
}

impl NamespaceShape {
    /// What an `AlignChannel` has to see to. With SGLs: descriptors of one page always name a block.
    #[must_use]
    pub fn alignment(&self) -> Alignment {
        let block_bytes = 1u32 << self.block_shift.min(31);
        let descriptors = u32::try_from(sgl::DESCRIPTORS_MAX).unwrap_or(u32::MAX);
        let segment_bytes =
            if self.sgl { (block_bytes / descriptors).max(DWORD_BYTES) } else { block_bytes };
        Alignment { block_bytes, address_bytes: DWORD_BYTES, segment_bytes }
    }

    /// Whether every command that is legal for this is so for `now`, and means the same there. The boundary is a hint, and
    /// may be another one.
    #[must_use]
    #[cold]
    pub fn still_holds(&self, now: &NamespaceShape) -> bool {
        let discard = match (self.discard, now.discard) {
            (None, _) => true,
            (Some(was), Some(is)) => {
                was.ranges_max <= is.ranges_max
                    && was.range_blocks_max <= is.range_blocks_max
                    && was.blocks_max <= is.blocks_max
            }
            (Some(_), None) => false,
        };
        let write_zeroes = match (self.write_zeroes, now.write_zeroes) {
            (None, _) => true,
            (Some(was), Some(is)) => {
                was.blocks_max <= is.blocks_max && (!was.deallocate || is.deallocate)
            }
            (Some(_), None) => false,
        };
        (self.nsid, self.block_shift) == (now.nsid, now.block_shift)
            && self.transfer_bytes_max <= now.transfer_bytes_max
            && (!self.sgl || now.sgl)
            // A cache that nobody flushes loses what guests believe to be stable.
            && (self.write_cache || !now.write_cache)
            && discard
            && write_zeroes
    }
}

impl Bounds {
    #[cold]
    pub(super) fn new(shape: &NamespaceShape) -> Bounds {
        let block_shift = shape.block_shift.min(31);
        let most_bytes = u64::from(shape.transfer_bytes_max.min(NVME_TRANSFER_BYTES_MAX))
            .min(BLOCKS_MAX << block_shift);
        let blocks = |bytes: u64| bytes >> block_shift << block_shift;
        Bounds {
            block_shift,
            transfer_bytes_max: blocks(most_bytes).max(1 << block_shift),
            boundary_bytes: blocks(u64::from(shape.boundary_bytes)),
            sgl: shape.sgl,
        }
    }

    /// Bytes of a transfer's next command, as far as the device is concerned.
    #[inline]
    pub(super) fn transfer_bytes(&self, at_bytes: u64, left_bytes: u64) -> u64 {
        let most_bytes = left_bytes.min(self.transfer_bytes_max);
        if self.boundary_bytes == 0 {
            return most_bytes;
        }
        most_bytes.min(self.boundary_bytes - at_bytes % self.boundary_bytes)
    }

    /// The blocks of a command, from zero: 16 bits.
    #[inline]
    pub(super) fn blocks_z(&self, len_bytes: u64) -> u32 {
        let blocks_z = (len_bytes >> self.block_shift).wrapping_sub(1) & (BLOCKS_MAX - 1);
        len_u32(usize_of(blocks_z))
    }

    /// Where the next at most `len_bytes` of data lie, and how many of them the command can name: whole blocks, 0 when not
    /// even one.
    pub(super) fn point(
        &self,
        segments: &[Segment],
        cursor: Cursor,
        len_bytes: u64,
        offset: IovaOffset,
        page: ListPage<'_>,
    ) -> (DataPointer, u64) {
        let pieces = cursor.pieces(segments, len_bytes, offset);
        if self.sgl {
            let mut few = pieces.clone();
            // One long piece needs no list at all.
            if let (Some((at, one_bytes)), None) = (few.next(), few.next())
                && one_bytes == len_bytes
                && prp::of_two_pages(at, len_bytes).is_none()
            {
                return (sgl::of_one(at, len_bytes), len_bytes);
            }
        }
        let (pointer, covered_bytes) = prp::fill(pieces.clone(), page);
        let block_bytes = 1 << self.block_shift;
        if covered_bytes == len_bytes || !self.sgl {
            let part_bytes = covered_bytes % block_bytes;
            if part_bytes == 0 {
                return (pointer, covered_bytes);
            }
            // What the second pointer means depends on the length.
            let whole_bytes = covered_bytes - part_bytes;
            return prp::fill(cursor.pieces(segments, whole_bytes, offset), page);
        }
        let fitting_bytes = sgl::fitting_bytes(pieces, block_bytes);
        let pieces = cursor.pieces(segments, fitting_bytes, offset);
        (sgl::fill(pieces, page), fitting_bytes)
    }

    /// Bytes of the next write zeroes.
    pub(super) fn zeroes_bytes(&self, left_bytes: u64, blocks_max: u32) -> u64 {
        left_bytes.min(u64::from(blocks_max).clamp(1, BLOCKS_MAX) << self.block_shift)
    }

    /// Writes the ranges of the next discard into the page; returns their number, from zero, and their bytes.
    pub(super) fn ranges(
        &self,
        at_bytes: u64,
        left_bytes: u64,
        limits: &DiscardLimits,
        page: ListPage<'_>,
    ) -> (u32, u64) {
        let ranges_max = u32::from(limits.ranges_max).clamp(1, RANGES_MAX);
        let range_blocks_max = u64::from(limits.range_blocks_max.max(1));
        let mut lba = at_bytes >> self.block_shift;
        let mut left_blocks = (left_bytes >> self.block_shift).min(limits.blocks_max.max(1));
        let first_lba = lba;
        let mut number = 0;
        loop {
            let blocks = left_blocks.min(range_blocks_max);
            // Attributes of the range: none.
            let at = 2 * usize::from(u16::try_from(number).unwrap_or(0));
            page.store(at, blocks << 32);
            page.store(at + 1, lba);
            lba += blocks;
            left_blocks -= blocks;
            if left_blocks == 0 || number + 1 == ranges_max {
                return (number, (lba - first_lba) << self.block_shift);
            }
            number += 1;
        }
    }
}

const RANGES_MAX: u32 = 256;
const _: () = assert!(DSM_RANGES_MAX == 256 && bytes_u64(DSM_RANGES_MAX) == RANGES_MAX as u64);
