//! HOT PATH
//! The requests that a worker hands to its channel in one call, with their segments.
//!
//! Owner: the reactor's scratch space; filled and emptied within one poll of one worker.
//! **Invariant:** a request's segment range lies inside the segment list.
//!
//! fill: segments… then push(request) — submit(view) takes a prefix — clear

use arrayvec::ArrayVec;

use super::{IoRequest, Tag};
use crate::limits::{BATCH_REQUESTS_MAX, BATCH_SEGMENTS_MAX};
use crate::mem::Segment;
use crate::units::{index, len_u32};

/// A batch under construction. Allocated once per reactor; its pages are touched as far as they are used.
#[derive(Debug)]
pub struct Batch {
    requests: ArrayVec<IoRequest, BATCH_REQUESTS_MAX>,
    segments: Vec<Segment>,
}

/// A batch, or the rest of one, as a channel gets it.
#[derive(Clone, Copy, Debug)]
pub struct BatchView<'a> {
    requests: &'a [IoRequest],
    segments: &'a [Segment],
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl Batch {
    /// An empty batch with room for every legal chain.
    #[must_use]
    #[cold]
    pub fn new() -> Batch {
        Batch { requests: ArrayVec::new(), segments: Vec::with_capacity(BATCH_SEGMENTS_MAX) }
    }

    /// Forgets everything.
    #[inline]
    pub fn clear(&mut self) {
        self.requests.clear();
        self.segments.clear();
    }

    /// Room for further segments.
    #[inline]
    #[must_use]
    pub fn segments_room(&self) -> usize {
        BATCH_SEGMENTS_MAX - self.segments.len()
    }

    /// True when no further request fits.
    #[inline]
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.requests.is_full()
    }

    /// Number of requests.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// True without requests.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Where the next segment will lie.
    #[inline]
    #[must_use]
    pub fn segments_mark(&self) -> usize {
        self.segments.len()
    }

    /// Appends a segment; false when there is no room (never grows).
    #[inline]
    pub fn push_segment(&mut self, segment: Segment) -> bool {
        if self.segments.len() == BATCH_SEGMENTS_MAX {
            return false;
        }
        self.segments.push(segment);
        true
    }

    /// The segment at `at`.
    #[inline]
    #[must_use]
    pub fn segment(&self, at: usize) -> Option<&Segment> {
        self.segments.get(at)
    }

    /// The `count` segments from `at` on.
    #[inline]
    #[must_use]
    pub fn segments_mut(&mut self, at: usize, count: usize) -> &mut [Segment] {
        &mut self.segments[at..at + count]
    }

    /// Drops the segments from `mark` on.
    #[inline]
    pub fn truncate_segments(&mut self, mark: usize) {
        self.segments.truncate(mark);
    }

    /// Appends a request whose segments are the `segments_count` ones from `segments_at` on.
    ///
    /// # Panics
    /// When the batch is full or the range is not inside the list: both are bugs of the caller.
    #[inline]
    pub fn push(&mut self, request: IoRequest) {
        debug_assert!(
            index(request.segments_at) + index(request.segments_count) <= self.segments.len()
        );
        self.requests.push(request);
    }

    /// Everything, for a channel.
    #[inline]
    #[must_use]
    pub fn view(&self) -> BatchView<'_> {
        BatchView { requests: &self.requests, segments: &self.segments }
    }

    /// Builds a one-request batch: for layers, tests and demos.
    pub fn single(&mut self, mut request: IoRequest, segments: &[Segment]) {
        self.clear();
        let count = segments.len().min(BATCH_SEGMENTS_MAX);
        self.segments.extend_from_slice(&segments[..count]);
        request.segments_at = 0;
        request.segments_count = len_u32(count);
        self.requests.push(request);
    }
}

impl<'a> BatchView<'a> {
    /// A view over requests that share one segment list.
    #[inline]
    #[must_use]
    pub fn new(requests: &'a [IoRequest], segments: &'a [Segment]) -> BatchView<'a> {
        BatchView { requests, segments }
    }

    /// The requests.
    #[inline]
    #[must_use]
    pub fn requests(&self) -> &'a [IoRequest] {
        self.requests
    }

    /// The segments of one of the requests.
    #[inline]
    #[must_use]
    pub fn segments(&self, request: &IoRequest) -> &'a [Segment] {
        let at = index(request.segments_at);
        &self.segments[at..at + index(request.segments_count)]
    }

    /// The requests from `at` up to (not including) `to`.
    #[inline]
    #[must_use]
    pub fn slice(&self, at: usize, to: usize) -> BatchView<'a> {
        BatchView { requests: &self.requests[at..to], segments: self.segments }
    }

    /// The tags, for error paths.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + 'a {
        self.requests.iter().map(|r| r.tag)
    }
}
