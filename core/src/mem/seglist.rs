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
    /// Keeps a copy of `segments`; `None` while the pool has no list that is long enough.
    #[inline]
    pub fn keep(&mut self, segments: &[Segment]) -> Option<SegmentList> {
        if segments.len() <= SEGMENTS_INLINE {
            return ArrayVec::try_from(segments).ok().map(SegmentList::Inline);
        }
        let pool =
            if segments.len() <= SEGMENTS_MEDIUM { &mut self.medium } else { &mut self.large };
        let mut list = pool.pop()?;
        debug_assert!(segments.len() <= list.capacity());
        list.extend_from_slice(segments);
        Some(SegmentList::Pooled(list))
    }

    /// Gives a list back.
    #[inline]
    pub fn give_back(&mut self, list: SegmentList) {
        if let SegmentList::Pooled(mut list) = list {
            list.clear();
            let pool = if list.capacity() < CHAIN_DESCRIPTORS_MAX {
                &mut self.medium
            } else {
                &mut self.large
            };
            pool.push(list);
        }
    }
}
