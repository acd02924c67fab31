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
use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::bdev::{BdevError, BdevInfo, Channel, ReadyQueue, Room};
use ringmill_core::io::{BatchView, Completion, Completions, IoRequest, Slots, Tag};
use ringmill_core::limits::{BATCH_REQUESTS_MAX, QUEUE_INFLIGHT_MAX};
use ringmill_core::mem::{ListsHeld, Segment, SegmentLists};
use ringmill_core::reactor::{DeviceKey, DeviceQueue, DeviceSlot, IoCx};

use super::job::Job;
use super::list::Cursor;
use super::parts::NamespaceShape;
use super::prp;
use super::qpair::{QueuePair, State};
use super::slots::{Command, Ended, MemberId, Owner};
use super::target::{Step, Target};
use crate::pci::Registers;

/// See the module.
#[derive(Debug)]
pub struct NvmeChannel<R> {
    pub(super) target: Target,
    slot: Option<DeviceSlot>,
    pub(super) info: Arc<BdevInfo>,
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
    /// Its pair, where this was the last channel of a controller that was detached: to be dropped with it, on a control thread.
    legacy: Option<Legacy>,
    registers: PhantomData<fn() -> R>,
}

/// A pair that was taken from its reactor.
struct Legacy(#[expect(dead_code, reason = "to be dropped")] Box<dyn DeviceQueue>);

impl std::fmt::Debug for Legacy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Legacy")
    }
}

/// What became of an offered request.
enum Taken {
    Yes,
    No,
}

impl<R: Registers> NvmeChannel<R> {
    /// A channel with all its memory, on a control thread; `commands_max`: those of its pair.
    #[must_use]
    #[cold]
    pub fn new(shape: &NamespaceShape, commands_max: u16) -> NvmeChannel<R> {
        let target = Target::new(shape);
        let jobs_max = usize::from(commands_max);
        NvmeChannel {
            target,
            slot: None,
            info: Arc::clone(&shape.info),
            member: None,
            inflight: 0,
            jobs: Slots::new(jobs_max),
            waiting: VecDeque::with_capacity(jobs_max),
            over: Vec::with_capacity(jobs_max),
            ready: ReadyQueue::new(jobs_max + BATCH_REQUESTS_MAX.min(QUEUE_INFLIGHT_MAX)),
            lists_held: ListsHeld::default(),
            inbox: VecDeque::with_capacity(jobs_max),
            legacy: None,
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
        self.member = pair.and_then(|pair| pair.slots.join(inbox, Arc::clone(&self.info)));
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
        let refusal = match pair.state {
            State::Failed(status) => Some(status),
            // Also for the steps that `AlignChannel` makes of requests that came before.
            _ => self.info.is_fenced().then_some(IoStatus::Gone),
        };
        if let Some(status) = refusal {
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
        } else if self.jobs.live_count() > 0 {
            self.end_jobs(lists, IoStatus::Gone);
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

    fn device(&self) -> Option<DeviceSlot> {
        self.slot
    }

    #[cold]
    fn close(&mut self, io: &mut IoCx) {
        let pair = self.slot.and_then(|slot| io.devices.get_mut::<QueuePair<R>>(slot));
        if let (Some(pair), Some(member)) = (pair, self.member.take()) {
            self.inbox = pair.slots.leave(member);
            if pair.shared.is_abandoned() && pair.is_unused() {
                let key = pair.key;
                self.legacy = take_out::<R>(io, key).map(Legacy);
            }
        }
    }
}

/// Takes an unused pair from its reactor.
#[cold]
pub(super) fn take_out<R: Registers>(
    io: &mut IoCx,
    key: DeviceKey,
) -> Option<Box<dyn DeviceQueue>> {
    let IoCx { devices, ring, .. } = io;
    let pair = devices.find(key).and_then(|slot| devices.get_mut::<QueuePair<R>>(slot));
    if let (Some(pair), Some(ring)) = (pair, ring) {
        pair.leave(ring);
    }
    devices.remove(key)
}
