//! HOT PATH
//! Physical region pages: a first address, then whole pages (Base 2.0 §4.1.1).
//!
//! Flow: pieces of memory → PRP1, PRP2 and, beyond two pages, a list in the slot's page. Owner: one reactor.
//! **Invariant:** every entry but the first starts a page, every one but the last reaches its page's end; where the memory
//! does not, or the list is full, the data stops there and says how far it got.
//!
//! each page of each piece: next to the last byte? same entry | both at a page's border? new entry | stop

use super::list::{DataPointer, ListPage, left_in_page};
use super::parts::PAGE_BYTES;

/// Entries of a page.
const ENTRIES_MAX: usize = PAGE_BYTES / size_of::<u64>();

/// For a piece of memory of at most two pages, or `None`.
#[inline]
pub(super) fn of_two_pages(at: u64, len_bytes: u64) -> Option<DataPointer> {
    let first_bytes = left_in_page(at);
    if len_bytes <= first_bytes {
        return Some(DataPointer { first: at, second: 0, is_sgl: false });
    }
    let second = at.wrapping_add(first_bytes);
    let fits = len_bytes - first_bytes <= left_in_page(second);
    fits.then_some(DataPointer { first: at, second, is_sgl: false })
}

/// Points to as much of the pieces, in order, as entries can; returns the bytes, too.
pub(super) fn fill(
    pieces: impl Iterator<Item = (u64, u64)>,
    page: ListPage<'_>,
) -> (DataPointer, u64) {
    let mut pointer = DataPointer::default();
    let (mut count, mut covered_bytes, mut end) = (0, 0, 0);
    for (mut at, mut left_bytes) in pieces {
        while left_bytes > 0 {
            let in_page_bytes = left_in_page(at);
            let at_border = left_in_page(end) == left_in_page(0);
            if count == 0 {
                pointer.first = at;
                count = 1;
            } else if at_border && in_page_bytes == left_in_page(0) {
                // Entries behind the first: one fits into the command, more need the list.
                match count {
                    1 => pointer.second = at,
                    number if number > ENTRIES_MAX => return (pointer, covered_bytes),
                    2 => {
                        page.store(0, pointer.second);
                        page.store(1, at);
                        pointer.second = page.iova.0;
                    }
                    number => page.store(number - 1, at),
                }
                count += 1;
            } else if at != end || at_border {
                return (pointer, covered_bytes);
            }
            let take_bytes = left_bytes.min(in_page_bytes);
            at = at.wrapping_add(take_bytes);
            left_bytes -= take_bytes;
            covered_bytes += take_bytes;
            end = at;
        }
    }
    (pointer, covered_bytes)
}
