//! HOT PATH
//! One channel's way into a namespace.
//!
//! Flow: request → one command, or a job of several (`job`) → the pair's rings → the pair's completions or this channel's inbox
//! → done. Owner: one reactor. **Invariant:** a taken request ends once, after its last command; what is behind the doors
//! above (`GateChannel`, `AlignChannel`) fits the namespace and whole blocks.
//!
//! submit: room → slot → data pointer → all of it? send : job — poll: inbox, reap, jobs go on

use std::collections::VecDeque;
use std::marker::PhantomData;

use ringmill_core::IoStatus;
use ringmill_core::bdev::{BdevError, Channel, ReadyQueue, Room};
use ringmill_core::io::{BatchView, Completion, Completions, IoFlags, IoOp, IoRequest, Slots, Tag};
use ringmill_core::limits::{BATCH_REQUESTS_MAX, QUEUE_INFLIGHT_MAX};
use ringmill_core::mem::{ListsHeld, Segment, SegmentLists};
use ringmill_core::reactor::{DeviceSlot, IoCx};
use ringmill_core::spec::nvme::nvm;

use super::job::Job;
use super::list::{Cursor, DataPointer};
use super::parts::{DiscardLimits, NamespaceShape, WriteZeroesLimits};
use super::prp;
use super::qpair::{QueuePair, State};
use super::slots::{Command, Ended, MemberId, Owner};
use super::split::Bounds;
use crate::pci::Registers;

/// What a channel knows of its namespace, worked out once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) nsid: u32,
    pub(super) bounds: Bounds,
    pub(super) write_cache: bool,
    pub(super) discard: Option<DiscardLimits>,
    pub(super) write_zeroes: Option<WriteZeroesLimits>,
}

/// See the module.
#[derive(Debug)]
pub struct NvmeChannel<R> {
    pub(super) target: Target,
    slot: Option<DeviceSlot>,
    pub(super) member: Option<MemberId>,
    inflight: usize,
    pub(super) jobs: Slots<Job>,
    /// Jobs with commands that were not sent.
    pub(super) waiting: VecDeque<Tag>,
    /// Jobs whose last part has ended.
    pub(super) over: Vec<Tag>,
    /// Requests that ended here.
    pub(super) ready: ReadyQueue,
    pub(super) lists_held: ListsHeld,
    /// Its inbox before it joins and after it has left.
    inbox: VecDeque<Ended>,
    registers: PhantomData<fn() -> R>,
}

/// The next command of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) command: Command,
    /// What it does of the request.
    pub(super) len_bytes: u64,
}

/// What became of an offered request.
enum Taken {
    Yes,
    No,
}

impl Target {
    /// Opcode and flags of a request with data.
    #[inline]
    fn transfer(&self, request: &IoRequest) -> Option<(u8, u32)> {
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
    fn verdict(&self, request: &IoRequest) -> Option<IoStatus> {
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

impl<R: Registers> NvmeChannel<R> {
    /// A channel with all its memory, on a control thread; `commands_max`: those of its pair.
    #[must_use]
    #[cold]
    pub fn new(shape: &NamespaceShape, commands_max: u16) -> NvmeChannel<R> {
        let target = Target {
            nsid: shape.nsid,
            bounds: Bounds::new(shape),
            write_cache: shape.write_cache,
            discard: shape.discard,
            write_zeroes: shape.write_zeroes,
        };
        let jobs_max = usize::from(commands_max);
        NvmeChannel {
            target,
            slot: None,
            member: None,
            inflight: 0,
            jobs: Slots::new(jobs_max),
            waiting: VecDeque::with_capacity(jobs_max),
            over: Vec::with_capacity(jobs_max),
            ready: ReadyQueue::new(jobs_max + BATCH_REQUESTS_MAX.min(QUEUE_INFLIGHT_MAX)),
            lists_held: ListsHeld::default(),
            inbox: VecDeque::with_capacity(jobs_max),
            registers: PhantomData,
        }
    }

    /// Joins the pair at `slot`, on its reactor.
    ///
    /// # Errors
    /// There is no such pair.
    #[cold]
    pub fn join(&mut self, io: &mut IoCx, slot: DeviceSlot) -> Result<(), BdevError> {
        let pair = io.devices.get_mut::<QueuePair<R>>(slot);
        let inbox = std::mem::take(&mut self.inbox);
        self.member = pair.and_then(|pair| pair.slots.join(inbox));
        self.slot = Some(slot);
        let refused = || BdevError::Refused {
            name: "nvme".to_owned(),
            reason: "its controller has no queue pair on this reactor; it was detached meanwhile"
                .to_owned(),
        };
        self.member.map(|_| ()).ok_or_else(refused)
    }

    #[inline]
    fn pair<'a>(&self, io: &'a IoCx) -> Option<&'a QueuePair<R>> {
        io.devices.get(self.slot?)
    }

    /// Requests that may come: jobs that wait for slots get half of them.
    #[inline]
    fn room_on(&self, pair: &QueuePair<R>, member: MemberId) -> usize {
        let room = pair.room(member);
        if self.waiting.is_empty() { room } else { room / 2 }
    }

    /// Takes one request, if there is a slot for it.
    #[inline(always)]
    fn take(
        &mut self,
        (pair, lists): (&mut QueuePair<R>, &mut SegmentLists),
        member: MemberId,
        request: &IoRequest,
        segments: &[Segment],
    ) -> Taken {
        if let [only] = segments
            && let Some((opcode, fua)) = self.target.transfer(request)
        {
            // Nearly all: one piece of at most two pages, in one command.
            let at = pair.offset().iova(only.host()).0;
            let (at_bytes, len_bytes) = (request.offset_bytes, request.len_bytes);
            let bounds = &self.target.bounds;
            if let Some(data) = prp::of_two_pages(at, len_bytes)
                && bounds.transfer_bytes(at_bytes, len_bytes) == len_bytes
            {
                let Some(slot) = pair.slots.take(member) else { return Taken::No };
                let blocks_z = bounds.blocks_z(len_bytes);
                let head = (opcode, self.target.nsid);
                let lba = at_bytes >> bounds.block_shift;
                let owner = Owner { member, tag: request.tag, part: false };
                pair.send(slot, owner, Command::new(head, data, lba, blocks_z | fua));
                return Taken::Yes;
            }
        }
        self.take_other((pair, lists), member, request, segments)
    }

    /// The others.
    #[inline(never)]
    fn take_other(
        &mut self,
        (pair, lists): (&mut QueuePair<R>, &mut SegmentLists),
        member: MemberId,
        request: &IoRequest,
        segments: &[Segment],
    ) -> Taken {
        if let Some(status) = self.target.verdict(request) {
            return self.end_here(request.tag, status);
        }
        let Some(slot) = pair.slots.take(member) else { return Taken::No };
        let data = (segments, Cursor::default());
        match self.target.step(request, 0, data, (pair, slot)) {
            Some(step) if step.len_bytes == request.len_bytes => {
                let owner = Owner { member, tag: request.tag, part: false };
                pair.send(slot, owner, step.command);
                Taken::Yes
            }
            Some(step) => self.start_job((pair, lists), (member, slot), request, segments, step),
            None => {
                pair.slots.give_back(member, slot);
                self.end_here(request.tag, IoStatus::Invalid)
            }
        }
    }

    /// Ends a request without the device.
    #[cold]
    #[inline(never)]
    fn end_here(&mut self, tag: Tag, status: IoStatus) -> Taken {
        // Every job needs a place there, too.
        if self.ready.room() <= self.jobs.live_count() {
            return Taken::No;
        }
        self.ready.push(Completion { tag, status });
        Taken::Yes
    }

    #[cold]
    #[inline(never)]
    fn start_job(
        &mut self,
        (pair, lists): (&mut QueuePair<R>, &mut SegmentLists),
        (member, slot): (MemberId, u16),
        request: &IoRequest,
        segments: &[Segment],
        step: Step,
    ) -> Taken {
        let has_place = self.ready.room() > self.jobs.live_count() && self.jobs.room() > 0;
        let kept = if has_place { lists.keep(segments, &mut self.lists_held) } else { None };
        let Some(kept) = kept else {
            pair.slots.give_back(member, slot);
            return Taken::No;
        };
        match self.jobs.insert(Job::new(*request, kept)) {
            Ok(job) => {
                self.send_part((pair, member, slot), job, step);
                pair.tally.splits += 1;
                self.waiting.push_back(job);
                Taken::Yes
            }
            Err(job) => {
                lists.give_back(job.segments, &mut self.lists_held);
                pair.slots.give_back(member, slot);
                Taken::No
            }
        }
    }

    /// The device is not there, or given up: everything ends like this.
    #[cold]
    #[inline(never)]
    fn refuse(&mut self, batch: BatchView<'_>, status: IoStatus) -> usize {
        let takes = |request: &&IoRequest| matches!(self.end_here(request.tag, status), Taken::Yes);
        batch.requests().iter().take_while(takes).count()
    }
}

impl<R: Registers> Channel for NvmeChannel<R> {
    #[inline]
    fn room(&self, io: &IoCx) -> Room {
        let requests = match (self.pair(io), self.member) {
            (Some(pair), Some(member)) if !matches!(pair.state, State::Failed(_)) => {
                self.room_on(pair, member)
            }
            _ => self.ready.room().saturating_sub(self.jobs.live_count()),
        };
        // It moves no data on this core.
        Room { requests, bytes: u64::MAX, not_before_ns: 0 }
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let IoCx { devices, lists, .. } = io;
        let pair = self.slot.and_then(|slot| devices.get_mut::<QueuePair<R>>(slot));
        let (Some(pair), Some(member)) = (pair, self.member) else {
            let taken = self.refuse(batch, IoStatus::Gone);
            self.inflight += taken;
            return taken;
        };
        if let State::Failed(status) = pair.state {
            let taken = self.refuse(batch, status);
            self.inflight += taken;
            return taken;
        }
        let room = self.room_on(pair, member);
        let mut taken = 0;
        for request in batch.requests().iter().take(room) {
            let segments = batch.segments(request);
            if matches!(self.take((pair, lists), member, request, segments), Taken::No) {
                break;
            }
            taken += 1;
        }
        self.inflight += taken;
        if !self.waiting.is_empty() {
            self.go_on(pair, lists);
        }
        taken
    }

    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        let before = done.len();
        let IoCx { devices, lists, .. } = io;
        let pair = self.slot.and_then(|slot| devices.get_mut::<QueuePair<R>>(slot));
        if let (Some(pair), Some(member)) = (pair, self.member) {
            while !done.is_full()
                && let Some(ended) = pair.slots.fetch(member)
            {
                Self::note((&mut self.jobs, &mut self.over), ended, done);
            }
            let (jobs, over) = (&mut self.jobs, &mut self.over);
            pair.reap(member, |ended| {
                (ended.part || !done.is_full()) && Self::note((jobs, over), ended, done)
            });
            if !self.over.is_empty() || !self.waiting.is_empty() {
                self.go_on(pair, lists);
            }
        }
        if !self.ready.is_empty() {
            self.ready.drain_into(done);
        }
        self.inflight -= done.len() - before;
    }

    fn inflight(&self) -> usize {
        self.inflight
    }

    /// What else is under way ends by an interrupt, or keeps the pair awake.
    fn must_poll(&self) -> bool {
        !self.ready.is_empty()
    }

    #[cold]
    fn close(&mut self, io: &mut IoCx) {
        let pair = self.slot.and_then(|slot| io.devices.get_mut::<QueuePair<R>>(slot));
        if let (Some(pair), Some(member)) = (pair, self.member.take()) {
            self.inbox = pair.slots.leave(member);
        }
    }
}
