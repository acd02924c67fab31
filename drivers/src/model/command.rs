//! I/O commands: read, write, flush, write zeroes, dataset management (NVM Command Set 1.0 §3).
//!
//! Flow: a fetched command → a rule or the medium's latency may hold it → checked, data moved → its status. Owner: the
//! model's thread. **Invariant:** nothing is moved before everything about the command was checked.

use ringmill_core::mem::Segment;
use ringmill_core::spec::nvme::{NSID_ALL, Sqe, nvm, status};
use ringmill_core::units::{index, usize_of};

use super::counters::Count;
use super::data::{Piece, Refusal, Way};
use super::held::{HeldCommand, Plan};
use super::machine::{Answer, Machine};

/// Due commands that one pass executes, so that doorbells are looked at in between.
const DUE_PER_PASS: usize = 64;

/// Fused operations.
const FUSED_MASK: u32 = 3 << 8;

/// Protection information in dword 12.
const PROTECTION_MASK: u32 = 15 << 26;

/// What is written where nothing should be written any more.
const SCRIBBLE: u8 = 0xdb;

impl Machine {
    /// What becomes of a command that was just fetched.
    #[inline]
    pub(super) fn take(&mut self, queue: u16, sqe: &Sqe) -> Answer {
        let opcode = sqe.0[0].to_le_bytes()[0];
        self.link.counters.command(queue == 0, opcode);
        let has_others = self.sqs[usize::from(queue)].as_ref().is_some_and(|sq| sq.held > 0);
        if (has_others || queue == 0) && self.has_cid(queue, sqe.0[0] >> 16) {
            let refusal = Refusal::blame(status::CID_CONFLICT, "a command id that is in use");
            return Answer::Now(self.refuse(queue, sqe, refusal), 0);
        }
        if self.is_shut_down {
            self.link.counters.protocol_error(|| "a command after the shutdown".to_owned());
        }
        if self.faults.has_rules()
            && let Some(answer) = self.misbehave(queue, sqe)
        {
            return answer;
        }
        if queue > 0 && !self.options.latency.is_zero() {
            return self.hold_for_latency(queue, sqe);
        }
        self.execute(queue, sqe)
    }

    fn hold_for_latency(&mut self, queue: u16, sqe: &Sqe) -> Answer {
        let latency_ns = u64::try_from(self.options.latency.as_nanos()).unwrap_or(u64::MAX);
        let due_ns = self.now_ns().saturating_add(latency_ns);
        if let Some(sq) = self.sqs[usize::from(queue)].as_mut() {
            sq.held += 1;
        }
        let plan = Plan::Execute;
        let command = HeldCommand { queue, sqe: *sqe, due_ns, plan, is_answered: false };
        self.held.steady.push_back(command);
        Answer::Later
    }

    /// Executes a command now.
    #[inline]
    pub(super) fn execute(&mut self, queue: u16, sqe: &Sqe) -> Answer {
        if queue == 0 {
            return self.execute_admin(sqe);
        }
        let result = match sqe.0[0].to_le_bytes()[0] {
            nvm::READ => self.read(sqe),
            nvm::WRITE => self.write(sqe),
            nvm::FLUSH => self.flush(sqe),
            nvm::WRITE_ZEROES if self.options.write_zeroes => self.write_zeroes(sqe),
            nvm::DSM if self.options.dsm => self.dataset_management(sqe),
            _ => Err(Refusal::plain(status::INVALID_OPCODE)),
        };
        match result {
            Ok(()) => Answer::OK,
            Err(refusal) => Answer::Now(self.refuse(queue, sqe, refusal), 0),
        }
    }

    /// Executes what is due; true when there was something.
    #[cold]
    pub(super) fn run_due(&mut self) -> bool {
        let now_ns = self.now_ns();
        for done in 0..DUE_PER_PASS {
            let Some(command) = self.held.take_due(now_ns) else { return done > 0 };
            if command.plan == Plan::Scribble {
                self.scribble(&command);
                // It stays out, for an abort.
                self.held.add_odd(HeldCommand { due_ns: u64::MAX, ..command });
                continue;
            }
            let answer = self.execute(command.queue, &command.sqe);
            if let Some(sq) = self.sqs[usize::from(command.queue)].as_mut() {
                sq.held = sq.held.saturating_sub(u32::from(!command.is_answered));
            }
            if let Answer::Now(status, result) = answer {
                self.answer(command.queue, &command.sqe, status, result);
                let cq = self.sqs[usize::from(command.queue)].as_ref().map_or(0, |sq| sq.cq);
                self.interrupt(cq);
            }
            if !self.is_running() {
                return true;
            }
        }
        true
    }

    fn scribble(&mut self, command: &HeldCommand) {
        let sqe = &command.sqe;
        let shift = self.namespace(sqe.0[1]).map_or(9, |at| self.namespaces[at].what.block_shift);
        let len_bytes = (u64::from(sqe.0[12] & 0xffff) + 1) << shift;
        if self.walker.walk(&mut self.reach, sqe, len_bytes, Way::ToHost, false).is_err() {
            return;
        }
        let garbage = [SCRIBBLE; 512];
        for piece in &self.walker.pieces {
            let Piece::Memory(segment) = piece else { continue };
            let mut rest: Segment = *segment;
            while rest.len_bytes() > 0 {
                rest.write_from(&garbage);
                rest = rest.sub(512, u32::MAX);
            }
        }
        self.link.counters.add(Count::Scribbles, 1);
    }

    #[inline]
    fn namespace(&self, nsid: u32) -> Option<usize> {
        self.namespaces.iter().position(|ns| ns.what.nsid == nsid && ns.is_attached)
    }

    /// The place of the namespace, and the byte range, of a command with blocks.
    #[inline]
    fn blocks(&self, sqe: &Sqe) -> Result<(usize, u64, u64), Refusal> {
        if sqe.0[0] & FUSED_MASK != 0 {
            return Err(Refusal::blame(status::INVALID_FIELD, "a fused command"));
        }
        let at = self.namespace(sqe.0[1]).ok_or(Refusal::plain(status::INVALID_NAMESPACE))?;
        let namespace = &self.namespaces[at];
        if namespace.what.metadata_bytes > 0 || namespace.what.protection > 0 {
            let text = "I/O to a namespace with metadata";
            return Err(Refusal::blame(status::INVALID_FIELD, text));
        }
        if sqe.0[12] & PROTECTION_MASK != 0 {
            let text = "protection information for a namespace without";
            return Err(Refusal::blame(status::INVALID_FIELD, text));
        }
        let (lba, blocks) = (sqe.u64_at(10), u64::from(sqe.0[12] & 0xffff) + 1);
        let Some((offset_bytes, len_bytes)) = namespace.range(lba, blocks) else {
            return Err(Refusal::plain(status::LBA_OUT_OF_RANGE));
        };
        // Reads and writes are what should not cross (NVM Command Set 1.0 §4.1.5.1, NOIOB).
        let is_zeroes = sqe.0[0].to_le_bytes()[0] == nvm::WRITE_ZEROES;
        if !is_zeroes && namespace.crosses(lba, blocks) {
            self.link.counters.add(Count::BoundaryCrossings, 1);
        }
        Ok((at, offset_bytes, len_bytes))
    }

    #[inline]
    fn data(&mut self, sqe: &Sqe, len_bytes: u64, way: Way) -> Result<(), Refusal> {
        if len_bytes > self.transfer_bytes_max() {
            return Err(Refusal::blame(status::INVALID_FIELD, "more data than MDTS allows"));
        }
        let by_sgl = self.walker.walk(&mut self.reach, sqe, len_bytes, way, false)?;
        self.link.counters.add(if by_sgl { Count::Sgl } else { Count::Prp }, 1);
        Ok(())
    }

    #[inline]
    fn read(&mut self, sqe: &Sqe) -> Result<(), Refusal> {
        let (at, offset_bytes, len_bytes) = self.blocks(sqe)?;
        self.data(sqe, len_bytes, Way::ToHost)?;
        if !self.namespaces[at].what.medium.read(offset_bytes, &self.walker.pieces) {
            return Err(Refusal::plain(status::UNRECOVERED_READ));
        }
        self.count_health(nvm::READ);
        Ok(())
    }

    fn write(&mut self, sqe: &Sqe) -> Result<(), Refusal> {
        let (at, offset_bytes, len_bytes) = self.blocks(sqe)?;
        if self.namespaces[at].what.read_only {
            return Err(Refusal::plain(status::WRITE_PROTECTED));
        }
        self.data(sqe, len_bytes, Way::FromHost)?;
        let is_stable = self.is_stable(sqe);
        if !self.namespaces[at].what.medium.write(offset_bytes, &self.walker.pieces, is_stable) {
            return Err(Refusal::plain(status::WRITE_FAULT));
        }
        self.count_health(nvm::WRITE);
        Ok(())
    }

    /// True when what is written must survive a power cut at once.
    fn is_stable(&self, sqe: &Sqe) -> bool {
        let is_forced = sqe.0[12] & nvm::DW12_FUA != 0;
        if is_forced {
            self.link.counters.add(Count::Fua, 1);
        }
        is_forced || !self.admin.write_cache_is_on()
    }

    fn flush(&mut self, sqe: &Sqe) -> Result<(), Refusal> {
        if sqe.0[1] == NSID_ALL {
            self.namespaces.iter().for_each(|ns| ns.what.medium.flush());
            return Ok(());
        }
        let at = self.namespace(sqe.0[1]).ok_or(Refusal::plain(status::INVALID_NAMESPACE))?;
        self.namespaces[at].what.medium.flush();
        Ok(())
    }

    fn write_zeroes(&mut self, sqe: &Sqe) -> Result<(), Refusal> {
        let (at, offset_bytes, len_bytes) = self.blocks(sqe)?;
        let shift = u32::from(self.options.write_zeroes_max);
        if shift > 0 && len_bytes > 1 << (12 + u32::from(self.options.page_min) + shift).min(62) {
            return Err(Refusal::blame(status::INVALID_FIELD, "more zeroes than WZSL allows"));
        }
        if self.namespaces[at].what.read_only {
            return Err(Refusal::plain(status::WRITE_PROTECTED));
        }
        if sqe.0[12] & nvm::DW12_DEAC != 0 {
            self.link.counters.add(Count::Deac, 1);
        }
        let is_stable = self.is_stable(sqe);
        if !self.namespaces[at].what.medium.zero(offset_bytes, len_bytes, is_stable) {
            return Err(Refusal::plain(status::WRITE_FAULT));
        }
        Ok(())
    }

    fn dataset_management(&mut self, sqe: &Sqe) -> Result<(), Refusal> {
        let at = self.namespace(sqe.0[1]).ok_or(Refusal::plain(status::INVALID_NAMESPACE))?;
        if self.namespaces[at].what.read_only {
            return Err(Refusal::plain(status::WRITE_PROTECTED));
        }
        let count = usize_of(u64::from(sqe.0[10] & 0xff)) + 1;
        let limit = usize::from(self.options.dsm_ranges_max);
        if limit > 0 && count > limit {
            return Err(Refusal::blame(status::INVALID_FIELD, "more ranges than DMRL allows"));
        }
        let mut data = [0; nvm::DSM_RANGES_MAX * nvm::DSM_RANGE_BYTES];
        let data = &mut data[..count * nvm::DSM_RANGE_BYTES];
        self.walker.walk(&mut self.reach, sqe, data.len() as u64, Way::FromHost, false)?;
        let mut done = 0;
        for piece in &self.walker.pieces {
            if let Piece::Memory(segment) = piece {
                segment.read_into(&mut data[done..]);
            }
            done += index(piece.len_bytes());
        }
        if sqe.0[11] & nvm::DSM_DEALLOCATE == 0 {
            return Ok(());
        }
        let namespace = &self.namespaces[at];
        let (ranges, _) = data.as_chunks::<{ nvm::DSM_RANGE_BYTES }>();
        let limit = self.options.dsm_range_blocks_max;
        let mut bytes = Vec::with_capacity(ranges.len());
        for range in ranges {
            let blocks = range[4..].first_chunk().map_or(0, |it| u32::from_le_bytes(*it));
            let lba = range[8..].first_chunk().map_or(0, |it| u64::from_le_bytes(*it));
            if limit > 0 && blocks > limit {
                return Err(Refusal::blame(status::INVALID_FIELD, "a range longer than DMRSL"));
            }
            let range = namespace.range(lba, u64::from(blocks));
            bytes.push(range.ok_or(Refusal::plain(status::LBA_OUT_OF_RANGE))?);
        }
        self.count_range(bytes.len());
        let is_stable = !self.admin.write_cache_is_on();
        for (offset_bytes, len_bytes) in bytes {
            namespace.what.medium.zero(offset_bytes, len_bytes, is_stable);
        }
        Ok(())
    }
}
