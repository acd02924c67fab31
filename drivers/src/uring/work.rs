//! HOT PATH
//! One request on its way through the kernel: what it has done, and what a result means for it.
//!
//! Flow: channel → `next_transfer` → kernel → `outcome` → channel. Owner: one slot of one channel. Plain data.
//! **Invariant:** `done_bytes` only grows, so a request ends after finitely many pieces; `tries` bounds the rest.

use ringmill_core::IoStatus;
use ringmill_core::io::{IoFlags, IoOp, IoRequest, Tag};

use super::ability::Way;

/// Tries of one piece before its error stands: with the back-off below, some two seconds.
const TRIES_MAX: u8 = 200;

/// First and longest pause before a piece that met EAGAIN is tried again, nanoseconds.
const PAUSE_FIRST_NS: u64 = 10_000;
const PAUSE_LONGEST_NS: u64 = 10_000_000;

/// What is, or would be, in the kernel for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The guest's data.
    Transfer,
    /// fdatasync.
    Sync,
    /// A range, in this way.
    Range(Way),
    /// Zeroes written piece by piece.
    ZeroWrite,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) tag: Tag,
    pub(super) op: IoOp,
    pub(super) flags: IoFlags,
    pub(super) stage: Stage,
    pub(super) tries: u8,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
    pub(super) done_bytes: u64,
    pub(super) piece_bytes: u64,
    pub(super) started_ns: u64,
}

/// What a result asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The request ends.
    Done(IoStatus),
    /// The next piece or stage goes to the kernel; the segments move on by this much before.
    Onward(u64),
    /// The same again, after a pause of this many nanoseconds.
    Again(u64),
    /// The kernel does not know this way: try another.
    OtherWay(Way),
}

impl Work {
    #[inline]
    pub(super) fn new(request: &IoRequest, started_ns: u64) -> Work {
        let stage = if request.op == IoOp::Flush { Stage::Sync } else { Stage::Transfer };
        Work {
            tag: request.tag,
            op: request.op,
            flags: request.flags,
            stage,
            tries: 0,
            offset_bytes: request.offset_bytes,
            len_bytes: request.len_bytes,
            done_bytes: 0,
            piece_bytes: 0,
            started_ns,
        }
    }

    /// Where the next piece starts on the medium.
    #[inline]
    pub(super) fn at_bytes(&self) -> u64 {
        self.offset_bytes + self.done_bytes
    }

    /// Bytes to go.
    #[inline]
    pub(super) fn left_bytes(&self) -> u64 {
        self.len_bytes - self.done_bytes
    }

    /// What `result` means. `sync_after`: write-zeroes are followed by a sync.
    #[inline]
    pub(super) fn outcome(&mut self, result: i32, unit_bytes: u32, sync_after: bool) -> Outcome {
        if let Ok(moved) = u64::try_from(result) {
            if self.stage == Stage::Transfer && moved == self.left_bytes() && moved > 0 {
                return Outcome::Done(IoStatus::Ok);
            }
            return self.partly(moved, unit_bytes, sync_after);
        }
        self.refused(result.wrapping_neg())
    }

    #[cold]
    #[inline(never)]
    fn partly(&mut self, moved_bytes: u64, unit_bytes: u32, sync_after: bool) -> Outcome {
        let moved_bytes = match self.stage {
            Stage::Sync => return Outcome::Done(IoStatus::Ok),
            // These say 0 for success.
            Stage::Range(_) => self.left_bytes(),
            Stage::Transfer | Stage::ZeroWrite => moved_bytes.min(self.left_bytes()),
        };
        let reads = self.op == IoOp::Read;
        if moved_bytes == 0 || (reads && moved_bytes % u64::from(unit_bytes) != 0) {
            // The end of a file that shrank under us. Nothing may be made up for what is missing.
            return Outcome::Done(if reads { IoStatus::Range } else { IoStatus::Medium });
        }
        self.tries = 0;
        self.done_bytes += moved_bytes;
        if self.left_bytes() > 0 {
            return Outcome::Onward(moved_bytes);
        }
        if self.op == IoOp::WriteZeroes && sync_after {
            self.stage = Stage::Sync;
            return Outcome::Onward(moved_bytes);
        }
        Outcome::Done(IoStatus::Ok)
    }

    #[cold]
    #[inline(never)]
    fn refused(&mut self, errno: i32) -> Outcome {
        match (errno, self.stage) {
            (libc::EINTR | libc::EAGAIN, _) if self.tries < TRIES_MAX => {
                self.tries += 1;
                let pause_ns = match errno {
                    libc::EINTR => 0,
                    _ => PAUSE_LONGEST_NS.min(PAUSE_FIRST_NS << self.tries.min(10)),
                };
                Outcome::Again(pause_ns)
            }
            (libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY, Stage::Range(way)) => {
                Outcome::OtherWay(way)
            }
            _ => Outcome::Done(IoStatus::from_errno(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(op: IoOp, len_bytes: u64, flags: IoFlags) -> Work {
        let (tag, offset_bytes, segments_at, segments_count) = (Tag(1), 4096, 0, 0);
        Work::new(
            &IoRequest { offset_bytes, len_bytes, tag, segments_at, segments_count, op, flags },
            5,
        )
    }

    #[test]
    fn short_transfers_go_on_and_the_end_of_the_file_is_an_error() {
        let mut read = work(IoOp::Read, 8192, IoFlags::NONE);
        assert_eq!(read.outcome(4096, 512, false), Outcome::Onward(4096));
        assert_eq!((read.at_bytes(), read.left_bytes()), (8192, 4096));
        assert_eq!(read.outcome(0, 512, false), Outcome::Done(IoStatus::Range));
        let mut read = work(IoOp::Read, 8192, IoFlags::NONE);
        assert_eq!(read.outcome(100, 512, false), Outcome::Done(IoStatus::Range));
        let mut write = work(IoOp::Write, 8192, IoFlags::NONE);
        assert_eq!(write.outcome(100, 512, false), Outcome::Onward(100));
        assert_eq!(write.outcome(8092, 512, false), Outcome::Done(IoStatus::Ok));
        let mut write = work(IoOp::Write, 8192, IoFlags::NONE);
        assert_eq!(write.outcome(0, 512, false), Outcome::Done(IoStatus::Medium));
        assert_eq!(write.outcome(-libc::ENOSPC, 512, false), Outcome::Done(IoStatus::NoSpace));
    }

    #[test]
    fn interruptions_are_repeated_but_not_for_ever() {
        let mut read = work(IoOp::Read, 512, IoFlags::NONE);
        assert_eq!(read.outcome(-libc::EINTR, 512, false), Outcome::Again(0));
        let mut waited_ns = 0;
        let end = loop {
            match read.outcome(-libc::EAGAIN, 512, false) {
                Outcome::Again(pause_ns) => waited_ns += pause_ns,
                other => break other,
            }
        };
        assert_eq!(end, Outcome::Done(IoStatus::Medium));
        assert!((1_000_000_000..5_000_000_000).contains(&waited_ns), "{waited_ns}");
    }

    #[test]
    fn stable_zeroes_are_synced_and_unknown_ways_are_left() {
        let mut zero = work(IoOp::WriteZeroes, 1 << 30, IoFlags::FUA);
        zero.stage = Stage::Range(Way::ZeroRange);
        assert_eq!(zero.outcome(-libc::EOPNOTSUPP, 512, true), Outcome::OtherWay(Way::ZeroRange));
        zero.stage = Stage::ZeroWrite;
        assert_eq!(zero.outcome(1 << 20, 512, true), Outcome::Onward(1 << 20));
        zero.stage = Stage::Range(Way::Punch);
        assert!(matches!(zero.outcome(0, 512, true), Outcome::Onward(_)));
        assert_eq!(zero.stage, Stage::Sync);
        assert_eq!(zero.outcome(0, 512, true), Outcome::Done(IoStatus::Ok));
    }
}
