//! One block request as a channel sees it, and its completion.
//!
//! Flow: worker → `Batch` → channel → `Completion` → worker. Plain `Copy` data, no virtio types.
//! **Invariant:** a tag that was taken is completed exactly once.

use arrayvec::ArrayVec;

use crate::limits::BATCH_REQUESTS_MAX;
use crate::status::IoStatus;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum IoOp {
    /// Medium to memory.
    Read = 0,
    /// Memory to medium.
    Write,
    /// Everything completed before is on stable storage when this completes.
    Flush,
    /// The range's contents no longer matter.
    Discard,
    /// The range reads as zeroes.
    WriteZeroes,
}

impl IoOp {
    /// All operations, in the order of their numbers.
    pub const ALL: [IoOp; 5] =
        [IoOp::Read, IoOp::Write, IoOp::Flush, IoOp::Discard, IoOp::WriteZeroes];

    /// The operation's name in statistics and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            IoOp::Read => "read",
            IoOp::Write => "write",
            IoOp::Flush => "flush",
            IoOp::Discard => "discard",
            IoOp::WriteZeroes => "write_zeroes",
        }
    }

    /// True when the operation changes the medium's contents (what a read-only device refuses).
    #[inline]
    #[must_use]
    pub const fn changes_data(self) -> bool {
        matches!(self, IoOp::Write | IoOp::Discard | IoOp::WriteZeroes)
    }

    /// True when the request carries data segments.
    #[inline]
    #[must_use]
    pub const fn has_data(self) -> bool {
        matches!(self, IoOp::Read | IoOp::Write)
    }

    /// The data of a request of this length.
    #[inline]
    #[must_use]
    pub const fn data_bytes(self, len_bytes: u64) -> u64 {
        if self.has_data() { len_bytes } else { 0 }
    }
}

/// Modifiers of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct IoFlags(u8);

impl IoFlags {
    /// None.
    pub const NONE: IoFlags = IoFlags(0);
    /// Stable before completion (force unit access).
    pub const FUA: IoFlags = IoFlags(1);
    /// Write-zeroes may deallocate.
    pub const MAY_UNMAP: IoFlags = IoFlags(2);

    /// True when all of `other` are set.
    #[inline]
    #[must_use]
    pub const fn contains(self, other: IoFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    #[inline]
    #[must_use]
    pub const fn with(self, other: IoFlags) -> IoFlags {
        IoFlags(self.0 | other.0)
    }
}

/// The submitter's name for a request: slot index and generation; the top bit belongs to layers between submitter and
/// device, which use it for requests of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Tag(pub u32);

impl Tag {
    /// Set on tags that a layer gives to its child requests.
    pub const LAYER_BIT: u32 = 1 << 31;

    /// From a slot index and its generation (15 bits are kept).
    #[inline]
    #[must_use]
    pub const fn new(slot: u16, generation: u16) -> Tag {
        Tag((slot as u32) | (((generation & 0x7fff) as u32) << 16))
    }

    /// The slot index.
    #[inline]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the low 16 bits are what is wanted")]
    pub const fn slot(self) -> u16 {
        self.0 as u16
    }

    /// The generation, 15 bits.
    #[inline]
    #[must_use]
    pub const fn generation(self) -> u16 {
        ((self.0 >> 16) & 0x7fff) as u16
    }

    /// True for a layer's child request.
    #[inline]
    #[must_use]
    pub const fn is_layer(self) -> bool {
        self.0 & Self::LAYER_BIT != 0
    }
}

/// One request. Its segments are a range of the batch's segment list.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IoRequest {
    /// First byte on the medium.
    pub offset_bytes: u64,
    /// Bytes of the range; the sum of the segments for reads and writes; 0 for a flush.
    pub len_bytes: u64,
    /// The submitter's name for it.
    pub tag: Tag,
    /// Index of the first segment in the batch.
    pub segments_at: u32,
    /// Number of segments.
    pub segments_count: u32,
    /// What to do.
    pub op: IoOp,
    /// Modifiers.
    pub flags: IoFlags,
}

const _: () = assert!(size_of::<IoRequest>() == 32, "two requests per cache line");

/// A finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The submitter's name for it.
    pub tag: Tag,
    /// How it ended.
    pub status: IoStatus,
}

/// A batch of completions; a channel stops when it is full and goes on at the next poll.
pub type Completions = ArrayVec<Completion, BATCH_REQUESTS_MAX>;
