//! HOT PATH
//! Scatter-gather lists: data blocks of any length (Base 2.0 §4.1.2).
//!
//! Flow: pieces of memory → one descriptor in the command, or one there that names a last segment of them in the slot's
//! page. Owner: one reactor. **Invariant:** the lengths add up to what the command moves.

use ringmill_core::spec::nvme::sgl::{BYTES, DATA_BLOCK, LAST_SEGMENT};
use ringmill_core::units::bytes_u64;

use super::list::{DataPointer, ListPage};
use super::parts::PAGE_BYTES;

/// Descriptors of a page.
pub(super) const DESCRIPTORS_MAX: usize = PAGE_BYTES / BYTES;

/// The upper half of a descriptor.
#[inline]
const fn upper(kind: u8, len_bytes: u64) -> u64 {
    (kind as u64) << 56 | (len_bytes & 0xffff_ffff)
}

/// One piece of memory.
#[inline]
pub(super) fn of_one(at: u64, len_bytes: u64) -> DataPointer {
    DataPointer { first: at, second: upper(DATA_BLOCK, len_bytes), is_sgl: true }
}

/// How many bytes of the pieces, in order, a page of descriptors takes, in whole blocks.
pub(super) fn fitting_bytes(pieces: impl Iterator<Item = (u64, u64)>, block_bytes: u64) -> u64 {
    let bytes: u64 = pieces.take(DESCRIPTORS_MAX).map(|(_, len_bytes)| len_bytes).sum();
    bytes - bytes % block_bytes
}

/// Points to all of the pieces; those beyond [`DESCRIPTORS_MAX`] are left out, so callers ask [`fitting_bytes`] first.
pub(super) fn fill(pieces: impl Iterator<Item = (u64, u64)>, page: ListPage<'_>) -> DataPointer {
    let mut count = 0;
    let mut only = (0, 0);
    for (at, len_bytes) in pieces.take(DESCRIPTORS_MAX) {
        page.store(2 * count, at);
        page.store(2 * count + 1, upper(DATA_BLOCK, len_bytes));
        only = (at, len_bytes);
        count += 1;
    }
    if count == 1 {
        return of_one(only.0, only.1);
    }
    let second = upper(LAST_SEGMENT, bytes_u64(count * BYTES));
    DataPointer { first: page.iova.0, second, is_sgl: true }
}
