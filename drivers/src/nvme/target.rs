//! HOT PATH
//! Requests as commands to one namespace.
//!
//! Flow: a request and how much of it was sent → the next command for the rest. Owner: one channel. **Invariant:** a command
//! is legal for its namespace, whatever the request is.
//!
//! step: read, write → bytes that one can move → data pointer | discard → ranges | zeroes | flush

use ringmill_core::IoStatus;
use ringmill_core::io::{IoFlags, IoOp, IoRequest};
use ringmill_core::mem::Segment;
use ringmill_core::spec::nvme::nvm;

use super::list::{Cursor, DataPointer};
use super::parts::{DiscardLimits, NamespaceShape, WriteZeroesLimits};
use super::qpair::QueuePair;
use super::slots::Command;
use super::split::Bounds;
use crate::pci::Registers;

/// What a channel knows of its namespace, worked out once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) nsid: u32,
    pub(super) bounds: Bounds,
    write_cache: bool,
    discard: Option<DiscardLimits>,
    write_zeroes: Option<WriteZeroesLimits>,
}

/// The next command of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) command: Command,
    /// What it does of the request.
    pub(super) len_bytes: u64,
}

impl Target {
    #[cold]
    pub(super) fn new(shape: &NamespaceShape) -> Target {
        Target {
            nsid: shape.nsid,
            bounds: Bounds::new(shape),
            write_cache: shape.write_cache,
            discard: shape.discard,
            write_zeroes: shape.write_zeroes,
        }
    }

    /// Opcode and flags of a request with data.
    #[inline]
    pub(super) fn transfer(&self, request: &IoRequest) -> Option<(u8, u32)> {
        match request.op {
            IoOp::Read => Some((nvm::READ, 0)),
            IoOp::Write => Some((nvm::WRITE, self.fua(request))),
            _ => None,
        }
    }

    /// The command that does as much of `request` from `done_bytes` on as one can; `None`: not even one block of it.
    pub(super) fn step<R: Registers>(
        &self,
        request: &IoRequest,
        done_bytes: u64,
        (segments, cursor): (&[Segment], Cursor),
        (pair, slot): (&QueuePair<R>, u16),
    ) -> Option<Step> {
        let at_bytes = request.offset_bytes + done_bytes;
        let left_bytes = request.len_bytes - done_bytes;
        let Some((opcode, fua)) = self.transfer(request) else {
            return self.step_without_data(request, (at_bytes, left_bytes), (pair, slot));
        };
        let bounds = &self.bounds;
        let len_bytes = bounds.transfer_bytes(at_bytes, left_bytes);
        let (pointer, len_bytes) =
            bounds.point(segments, cursor, len_bytes, pair.offset(), pair.page(slot));
        let lba = at_bytes >> bounds.block_shift;
        let dw12 = bounds.blocks_z(len_bytes) | fua;
        let command = Command::new((opcode, self.nsid), pointer, lba, dw12);
        (len_bytes > 0).then_some(Step { command, len_bytes })
    }

    #[inline]
    fn fua(&self, request: &IoRequest) -> u32 {
        let asked = request.flags.contains(IoFlags::FUA);
        if asked && self.write_cache { nvm::DW12_FUA } else { 0 }
    }

    #[cold]
    #[inline(never)]
    fn step_without_data<R: Registers>(
        &self,
        request: &IoRequest,
        (at_bytes, left_bytes): (u64, u64),
        (pair, slot): (&QueuePair<R>, u16),
    ) -> Option<Step> {
        let shift = self.bounds.block_shift;
        let none = DataPointer::default();
        match request.op {
            IoOp::Discard => {
                let page = pair.page(slot);
                let limits = self.discard?;
                let (ranges_z, len_bytes) = self.bounds.ranges(at_bytes, left_bytes, &limits, page);
                let pointer = DataPointer { first: page.iova.0, ..none };
                let dw10_11 = u64::from(ranges_z) | u64::from(nvm::DSM_DEALLOCATE) << 32;
                let command = Command::new((nvm::DSM, self.nsid), pointer, dw10_11, 0);
                (len_bytes > 0).then_some(Step { command, len_bytes })
            }
            IoOp::WriteZeroes => {
                let limits = self.write_zeroes?;
                let len_bytes = self.bounds.zeroes_bytes(left_bytes, limits.blocks_max);
                let blocks_z = self.bounds.blocks_z(len_bytes);
                let unmap = limits.deallocate && request.flags.contains(IoFlags::MAY_UNMAP);
                let deac = if unmap { nvm::DW12_DEAC } else { 0 };
                let dw12 = blocks_z | self.fua(request) | deac;
                let head = (nvm::WRITE_ZEROES, self.nsid);
                let command = Command::new(head, none, at_bytes >> shift, dw12);
                Some(Step { command, len_bytes })
            }
            _ => {
                let command = Command::new((nvm::FLUSH, self.nsid), none, 0, 0);
                Some(Step { command, len_bytes: left_bytes })
            }
        }
    }

    /// How a request ends that needs no command; `None` when it needs one.
    pub(super) fn verdict(&self, request: &IoRequest) -> Option<IoStatus> {
        let supported = match request.op {
            IoOp::Read | IoOp::Write => return None,
            // Without a volatile write cache everything completed is stable.
            IoOp::Flush => return (!self.write_cache).then_some(IoStatus::Ok),
            IoOp::Discard => self.discard.is_some(),
            IoOp::WriteZeroes => self.write_zeroes.is_some(),
        };
        (!supported).then_some(IoStatus::Unsupported)
    }
}
