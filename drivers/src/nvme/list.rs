//! HOT PATH
//! A command slot's own page, and the place in a request's segments that the next command starts at.
//!
//! Owner: one reactor. **Invariant:** what is written here is never read back: the device can write to it, too.
//!
//! each command: cursor → prp or sgl fills the page → cursor moves on by what they covered

use std::sync::atomic::Ordering;

use ringmill_core::mem::{IovaOffset, Segment, SharedSlice};
use ringmill_core::units::{Iova, bytes_u64};

use super::parts::PAGE_BYTES;

/// Where data lies for the device: dwords 6 to 9 of a command, and how to read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct DataPointer {
    pub(super) first: u64,
    pub(super) second: u64,
    /// They are one SGL descriptor.
    pub(super) is_sgl: bool,
}

/// One slot's page.
#[derive(Clone, Copy, Debug)]
pub(super) struct ListPage<'a> {
    pub(super) window: &'a SharedSlice,
    pub(super) at_bytes: usize,
    pub(super) iova: Iova,
}

impl ListPage<'_> {
    /// Stores a word of 64 bits; one beyond the page is not stored.
    #[inline]
    pub(super) fn store(&self, number: usize, word: u64) {
        let at_bytes = number * size_of::<u64>();
        debug_assert!(at_bytes < PAGE_BYTES);
        if at_bytes < PAGE_BYTES {
            self.window.store_u64(self.at_bytes + at_bytes, word, Ordering::Relaxed);
        }
    }
}

/// A place in a list of segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The segment.
    pub(super) number: usize,
    /// Bytes of it that are behind.
    pub(super) skip_bytes: u32,
}

impl Cursor {
    /// The pieces of memory from here on, `len_bytes` of them at most, as the device sees them: address and length. None is
    /// empty.
    #[inline]
    pub(super) fn pieces(
        self,
        segments: &[Segment],
        len_bytes: u64,
        offset: IovaOffset,
    ) -> impl Iterator<Item = (u64, u64)> + Clone {
        let rest = segments.get(self.number..).unwrap_or(&[]);
        rest.iter()
            .scan((u64::from(self.skip_bytes), len_bytes), move |(skip, left), segment| {
                let skipped = std::mem::take(skip);
                let take = u64::from(segment.len_bytes()).saturating_sub(skipped).min(*left);
                let at = offset.iova(segment.host()).0.wrapping_add(skipped);
                let is_over = *left == 0;
                *left -= take;
                (!is_over).then_some((at, take))
            })
            .filter(|(_, len_bytes)| *len_bytes > 0)
    }

    /// The place `by_bytes` further on.
    pub(super) fn advanced(mut self, segments: &[Segment], mut by_bytes: u64) -> Cursor {
        while let Some(segment) = segments.get(self.number) {
            let left_bytes = segment.len_bytes().saturating_sub(self.skip_bytes);
            match u32::try_from(by_bytes) {
                Ok(by_bytes) if by_bytes < left_bytes => {
                    self.skip_bytes += by_bytes;
                    return self;
                }
                _ => by_bytes -= u64::from(left_bytes),
            }
            self = Cursor { number: self.number + 1, skip_bytes: 0 };
        }
        self
    }
}

/// Bytes from `at` to the end of its page.
#[inline]
pub(super) const fn left_in_page(at: u64) -> u64 {
    let page_bytes = bytes_u64(PAGE_BYTES);
    page_bytes - (at & (page_bytes - 1))
}
