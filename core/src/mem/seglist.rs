//! Segment lists that outlive the batch they came in: what a channel keeps of a request that it has taken.
//!
//! Owner: one reactor's pool. **Invariant:** never allocates after construction; a list that does not fit is refused
//! before the request is taken, so nothing fails half-way.

use arrayvec::ArrayVec;

use super::Segment;
use crate::limits::{
    CHAIN_DESCRIPTORS_MAX, SEGMENT_LISTS_LARGE, SEGMENT_LISTS_MEDIUM, SEGMENTS_INLINE,
    SEGMENTS_MEDIUM,
};

/// A kept list.
#[derive(Debug)]
pub enum SegmentList {
    /// A few segments, stored in place.
    Inline(ArrayVec<Segment, SEGMENTS_INLINE>),
    /// Many, in memory of the pool.
    Pooled(Vec<Segment>),
}

impl Default for SegmentList {
    fn default() -> Self {
        SegmentList::Inline(ArrayVec::new())
    }
}

impl SegmentList {
    /// The segments.
    #[inline]
    #[must_use]
    pub fn as_slice(&self) -> &[Segment] {
        match self {
            SegmentList::Inline(list) => list,
            SegmentList::Pooled(list) => list,
        }
    }

    /// The segments, for a driver that moves their start on as pieces complete.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [Segment] {
        match self {
            SegmentList::Inline(list) => list,
            SegmentList::Pooled(list) => list,
        }
    }
}

/// What one user of the pool holds of it. A user may take a list only while it holds fewer than are left: a device that
/// never answers keeps half of the pool at most, two of them three quarters, and somebody who holds none always gets one.
#[derive(Debug, Default)]
pub struct ListsHeld {
    medium: usize,
    large: usize,
}

/// A reactor's memory for long lists; untouched until used.
#[derive(Debug)]
pub struct SegmentLists {
    medium: Vec<Vec<Segment>>,
    large: Vec<Vec<Segment>>,
}

impl Default for SegmentLists {
    fn default() -> Self {
        let lists =
            |count: usize, size: usize| (0..count).map(|_| Vec::with_capacity(size)).collect();
        SegmentLists {
            medium: lists(SEGMENT_LISTS_MEDIUM, SEGMENTS_MEDIUM),
            large: lists(SEGMENT_LISTS_LARGE, CHAIN_DESCRIPTORS_MAX),
        }
    }
}

impl SegmentLists {
    /// Keeps a copy of `segments`; `None` while the pool has no list for this user that is long enough.
    #[inline]
    pub fn keep(&mut self, segments: &[Segment], held: &mut ListsHeld) -> Option<SegmentList> {
        if segments.len() <= SEGMENTS_INLINE {
            return ArrayVec::try_from(segments).ok().map(SegmentList::Inline);
        }
        let (pool, held) = if segments.len() <= SEGMENTS_MEDIUM {
            (&mut self.medium, &mut held.medium)
        } else {
            (&mut self.large, &mut held.large)
        };
        if *held >= pool.len() {
            return None;
        }
        let mut list = pool.pop()?;
        *held += 1;
        debug_assert!(segments.len() <= list.capacity());
        list.extend_from_slice(segments);
        Some(SegmentList::Pooled(list))
    }

    /// Gives a list back.
    #[inline]
    pub fn give_back(&mut self, list: SegmentList, held: &mut ListsHeld) {
        if let SegmentList::Pooled(mut list) = list {
            list.clear();
            let (pool, held) = if list.capacity() < CHAIN_DESCRIPTORS_MAX {
                (&mut self.medium, &mut held.medium)
            } else {
                (&mut self.large, &mut held.large)
            };
            *held = held.saturating_sub(1);
            pool.push(list);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::MemTable;
    use crate::units::GuestAddr;

    #[test]
    fn a_greedy_user_leaves_something_for_the_others() {
        let table = MemTable::anonymous(GuestAddr(0), 4096).unwrap();
        let segment = table.translate(GuestAddr(0), 16, &mut 0).unwrap();
        let many = [segment; SEGMENTS_INLINE + 1];
        let mut lists = SegmentLists::default();
        let (mut greedy, mut modest) = (ListsHeld::default(), ListsHeld::default());
        let mut taken = Vec::new();
        while let Some(list) = lists.keep(&many, &mut greedy) {
            taken.push(list);
        }
        assert_eq!(taken.len(), SEGMENT_LISTS_MEDIUM / 2);
        let list = lists.keep(&many, &mut modest).expect("a list for somebody else");
        lists.give_back(list, &mut modest);
        for list in taken {
            lists.give_back(list, &mut greedy);
        }
        assert_eq!(
            (greedy.medium, modest.medium, lists.medium.len()),
            (0, 0, SEGMENT_LISTS_MEDIUM)
        );
    }
}
