//! The model disk: the least helpful device that the channel contract allows.
//!
//! Flow: requests → a random moment at which the medium and the guest's memory are touched → a random later moment at
//! which the completion can be fetched, in any order. Owner: the simulator; the mutex is shared by the disk's channels.
//! **Invariant:** it never breaks the contract of `core::bdev::Channel`, and complains when its user does. Writes lie in
//! a volatile cache until a flush that was submitted after their completion, or have FUA; a power cut keeps any of a
//! sector's versions since then.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, Channel, ChannelSeed, Geometry, Room};
use ringmill_core::io::{BatchView, Completion, Completions, IoFlags, IoOp, IoRequest};
use ringmill_core::mem::{Segment, pieces, total_bytes};
use ringmill_core::reactor::{IoCx, ReactorHandle};
use ringmill_core::status::IoStatus;
use ringmill_core::units::{bytes_u64, index, usize_of};

use super::Dice;
use super::twin::SECTOR;

/// How the disk behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskRules {
    pub(super) sectors_count: u64,
    /// What requests must be aligned to, bytes: offsets and lengths, memory addresses, segment lengths.
    pub(super) block_bytes: u32,
    pub(super) address_bytes: u32,
    pub(super) segment_bytes: u32,
    /// The longest time that a request takes.
    pub(super) delay_max_ns: u64,
    /// Requests in a thousand that fail.
    pub(super) errors_per_mille: u64,
    /// Requests that a channel holds at most.
    pub(super) room_max: usize,
    /// Takes less than it said now and then.
    pub(super) partial: bool,
    /// Only polling moves it on.
    pub(super) polled: bool,
}

#[derive(Debug)]
struct Taken {
    request: IoRequest,
    segments: Vec<Segment>,
    touch_ns: u64,
    due_ns: u64,
    status: Option<IoStatus>,
    /// Versions of sectors below this number were there when the request was submitted.
    before: u64,
}

#[derive(Debug)]
struct State {
    rules: DiskRules,
    dice: Dice,
    content: Vec<u8>,
    stable: Vec<u8>,
    /// Versions in the volatile cache, by sector, in order.
    cached: BTreeMap<usize, Vec<(u64, [u8; SECTOR])>>,
    next_version: u64,
    channels: Vec<Vec<Taken>>,
    complaint: Option<String>,
    errors_count: u64,
}

/// The disk.
#[derive(Clone, Debug)]
pub(super) struct ModelDisk {
    state: Arc<Mutex<State>>,
}

/// One way into it.
#[derive(Debug)]
pub(super) struct ModelChannel {
    disk: ModelDisk,
    number: usize,
}

impl ModelDisk {
    pub(super) fn new(rules: DiskRules, seed: u64) -> ModelDisk {
        let bytes = usize_of(rules.sectors_count) * SECTOR;
        ModelDisk {
            state: Arc::new(Mutex::new(State {
                rules,
                dice: Dice::new(seed, 2),
                content: vec![0; bytes],
                stable: vec![0; bytes],
                cached: BTreeMap::new(),
                next_version: 0,
                channels: Vec::new(),
                complaint: None,
                errors_count: 0,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn channel(&self) -> ModelChannel {
        let mut state = self.lock();
        state.channels.push(Vec::new());
        ModelChannel { disk: self.clone(), number: state.channels.len() - 1 }
    }

    /// What a user of the disk did wrong.
    pub(super) fn complaint(&self) -> Option<String> {
        self.lock().complaint.clone()
    }

    /// Requests that failed on purpose.
    pub(super) fn errors_count(&self) -> u64 {
        self.lock().errors_count
    }

    /// The next moment at which something happens.
    pub(super) fn next_due_ns(&self) -> Option<u64> {
        self.lock().channels.iter().flatten().map(|t| t.due_ns).min()
    }

    /// What a reader would see.
    pub(super) fn content(&self) -> Vec<u8> {
        self.lock().content.clone()
    }

    /// What is left after a power cut now.
    pub(super) fn cut_power(&self) -> Vec<u8> {
        let mut state = self.lock();
        let State { dice, stable, cached, .. } = &mut *state;
        let mut left = stable.clone();
        for (sector, versions) in cached {
            if let Some(kept) = dice.index(versions.len() + 1).checked_sub(1) {
                left[sector * SECTOR..][..SECTOR].copy_from_slice(&versions[kept].1);
            }
        }
        left
    }
}

impl State {
    fn complain(&mut self, what: String) {
        self.complaint.get_or_insert(what);
    }

    fn check(&mut self, number: usize, request: &IoRequest, segments: &[Segment]) {
        let rules = self.rules;
        let IoRequest { offset_bytes, len_bytes, op, tag, .. } = *request;
        let block = u64::from(rules.block_bytes);
        if self.channels[number].iter().any(|t| t.request.tag == tag) {
            self.complain(format!("tag {tag:?} is in flight twice"));
        }
        if offset_bytes % block != 0 || len_bytes % block != 0 {
            self.complain(format!("{op:?} of {len_bytes} bytes at {offset_bytes} is not aligned"));
        }
        let end = offset_bytes.checked_add(len_bytes);
        if end.is_none_or(|end| end > rules.sectors_count * bytes_u64(SECTOR)) {
            self.complain(format!("{op:?} of {len_bytes} bytes at {offset_bytes} is out of range"));
        }
        if op == IoOp::Flush {
            return;
        }
        if len_bytes == 0 {
            self.complain(format!("{op:?} of nothing"));
        }
        if op.has_data() && total_bytes(segments) != len_bytes {
            self.complain(format!("{op:?} of {len_bytes} bytes with segments {segments:?}"));
        }
        let (address, length) = (rules.address_bytes as usize - 1, rules.segment_bytes - 1);
        if op.has_data()
            && segments.iter().any(|s| s.host().0 & address != 0 || s.len_bytes() & length != 0)
        {
            self.complain(format!("{op:?} with unaligned memory {segments:?}"));
        }
    }

    fn take(&mut self, now_ns: u64, number: usize, request: &IoRequest, segments: &[Segment]) {
        self.check(number, request, segments);
        let delay_ns = self.dice.below(self.rules.delay_max_ns + 1);
        let touch_ns = now_ns + self.dice.below(delay_ns + 1);
        let before = self.next_version;
        self.channels[number].push(Taken {
            request: *request,
            segments: if request.op.has_data() { segments.to_vec() } else { Vec::new() },
            touch_ns,
            due_ns: now_ns + delay_ns,
            status: None,
            before,
        });
    }

    /// Carries a request out, or fails it half-way.
    fn carry_out(&mut self, taken: &Taken) -> IoStatus {
        let fails = self.dice.chance(self.rules.errors_per_mille);
        let IoRequest { offset_bytes, len_bytes, op, flags, .. } = taken.request;
        let (start, len) = (usize_of(offset_bytes), usize_of(len_bytes));
        if self.complaint.is_some() {
            return IoStatus::Invalid;
        }
        match op {
            IoOp::Read => {
                let mut from = &self.content[start..start + len];
                for segment in &taken.segments {
                    if !fails || self.dice.chance(500) {
                        segment.write_from(from);
                    }
                    from = &from[index(segment.len_bytes())..];
                }
            }
            IoOp::Flush if !fails => self.settle(taken.before),
            IoOp::Flush => {}
            IoOp::Write | IoOp::Discard | IoOp::WriteZeroes => {
                let mut data = vec![0; len];
                let mut done = 0;
                pieces(&taken.segments, 0, len_bytes, |segment| {
                    done += segment.read_into(&mut data[done..]);
                });
                for (sector, bytes) in (start / SECTOR..).zip(data.chunks_exact(SECTOR)) {
                    let skip = (fails || op == IoOp::Discard) && self.dice.chance(500);
                    if !skip {
                        self.store(sector, bytes, !fails && flags.contains(IoFlags::FUA));
                    }
                }
            }
        }
        if fails {
            self.errors_count += 1;
            return self.dice.pick(&[IoStatus::Medium, IoStatus::NoSpace, IoStatus::Reset]);
        }
        IoStatus::Ok
    }

    fn store(&mut self, sector: usize, bytes: &[u8], stable: bool) {
        let at = sector * SECTOR;
        self.content[at..at + SECTOR].copy_from_slice(bytes);
        if stable {
            self.cached.remove(&sector);
            self.stable[at..at + SECTOR].copy_from_slice(bytes);
        } else {
            let mut copy = [0; SECTOR];
            copy.copy_from_slice(bytes);
            self.cached.entry(sector).or_default().push((self.next_version, copy));
            self.next_version += 1;
        }
    }

    /// Brings versions below `before` to the medium.
    fn settle(&mut self, before: u64) {
        let stable = &mut self.stable;
        self.cached.retain(|sector, versions| {
            let settled = versions.iter().take_while(|v| v.0 < before).count();
            if let Some(last) = settled.checked_sub(1) {
                stable[sector * SECTOR..][..SECTOR].copy_from_slice(&versions[last].1);
                versions.drain(..settled);
            }
            !versions.is_empty()
        });
    }
}

impl Channel for ModelChannel {
    fn room(&self, _io: &IoCx) -> Room {
        let mut state = self.disk.lock();
        let free = state.rules.room_max.saturating_sub(state.channels[self.number].len());
        // A hint may be too small and too large.
        let requests = if state.dice.chance(100) { free / 2 } else { free };
        Room { requests: requests.max(1), bytes: u64::MAX, not_before_ns: 0 }
    }

    fn submit(&mut self, io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let mut state = self.disk.lock();
        let inflight = state.channels[self.number].len();
        let mut takes = batch.requests().len().min(state.rules.room_max.saturating_sub(inflight));
        if state.rules.partial && state.dice.chance(300) {
            takes = state.dice.index(takes + 1);
        }
        if inflight == 0 {
            takes = takes.max(1).min(batch.requests().len());
        }
        for request in &batch.requests()[..takes] {
            state.take(io.clock.now_ns(), self.number, request, batch.segments(request));
        }
        takes
    }

    fn poll(&mut self, io: &mut IoCx, done: &mut Completions) {
        let now_ns = io.clock.now_ns();
        let mut state = self.disk.lock();
        let mut list = std::mem::take(&mut state.channels[self.number]);
        let mut order: Vec<usize> =
            (0..list.len()).filter(|&i| list[i].touch_ns <= now_ns).collect();
        for at in (1..order.len()).rev() {
            let with = state.dice.index(at + 1);
            order.swap(at, with);
        }
        for at in order {
            if list[at].status.is_none() {
                list[at].status = Some(state.carry_out(&list[at]));
            }
        }
        while !done.is_full() {
            let due: Vec<usize> = (0..list.len())
                .filter(|&i| list[i].due_ns <= now_ns && list[i].status.is_some())
                .collect();
            if due.is_empty() || state.dice.chance(50) {
                break;
            }
            let taken = list.swap_remove(due[state.dice.index(due.len())]);
            let status = taken.status.unwrap_or_default();
            done.push(Completion { tag: taken.request.tag, status });
        }
        state.channels[self.number] = list;
    }

    fn inflight(&self) -> usize {
        self.disk.lock().channels[self.number].len()
    }

    fn must_poll(&self) -> bool {
        self.disk.lock().rules.polled
    }

    fn close(&mut self, _io: &mut IoCx) {
        let mut state = self.disk.lock();
        if !state.channels[self.number].is_empty() {
            state.complain("a channel was closed with requests in flight".to_owned());
        }
    }
}

/// The disk as a bdev; its channels are handed out by the simulator itself.
#[derive(Debug)]
pub(super) struct ModelBdev {
    info: Arc<BdevInfo>,
}

impl ModelBdev {
    pub(super) fn new(rules: &DiskRules) -> Result<ModelBdev, BdevError> {
        let geometry = Geometry {
            block_bytes: rules.block_bytes,
            physical_block_bytes: rules.block_bytes,
            optimal_io_bytes: 0,
            blocks_count: rules.sectors_count * bytes_u64(SECTOR) / u64::from(rules.block_bytes),
            read_only: false,
            write_cache: true,
            discard: true,
            discard_granularity_bytes: 0,
            write_zeroes: true,
        };
        Ok(ModelBdev { info: Arc::new(BdevInfo::new("model", None, "model disk", geometry)?) })
    }
}

impl Bdev for ModelBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let name = self.info.name().to_owned();
        Err(BdevError::Refused { name, reason: "the simulator hands out channels".to_owned() })
    }
}
