//! The admin queue: one command at a time, and the event requests that stay out.
//!
//! In: a command and how long it may take. Out: its result, or why there is none; events on the side. Owner: the thread that
//! attaches, then the controller's thread. **Invariant:** after a command without an answer the queue is broken and takes no
//! other until the controller was reset: its data page may still be written to. Whatever the device puts into the
//! completion queue, a look at it ends after one lap.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringmill_core::mem::{DmaDomain, DmaMap, Mapping, SharedSlice};
use ringmill_core::spec::nvme::{
    CQE_BYTES, Cqe, IDENTIFY_BYTES, SQE_BYTES, Sqe, Status, admin, event,
};

use super::NvmeError;
use super::parts::PAGE_BYTES;
use super::registers::{Bar, Capabilities, doorbell_offset};
use crate::pci::Registers;

/// Entries of both queues: a command, the event requests, and room.
const ENTRIES: u16 = 32;

/// Event requests that are out at a time, at most; each kind of event comes once until its log page was read.
const EVENTS_OUT_MAX: usize = 4;

/// Events that came and were not looked at. More of a kind say nothing new.
pub(super) const EVENTS_KEPT_MAX: usize = 16;

/// CIDs of event requests; those of commands are below.
const EVENT_CID_FIRST: u16 = 0x8000;

/// How long a wait polls without a pause.
const SPIN: Duration = Duration::from_micros(50);

const _: () = assert!(EVENTS_OUT_MAX + 2 < ENTRIES as usize);
const _: () = assert!(ENTRIES as usize * SQE_BYTES <= PAGE_BYTES);

/// An event: type, information, log page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) kind: u8,
    pub(super) information: u8,
    pub(super) log_page: u8,
}

impl Event {
    fn of_result(result: u32) -> Event {
        let [kind, information, log_page, _] = result.to_le_bytes();
        Event { kind: kind & 0x7, information, log_page }
    }

    pub(super) fn is_namespace_notice(self) -> bool {
        (self.kind, self.information) == (event::NOTICE, event::NOTICE_NAMESPACE)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct AdminQueue {
    submission: SharedSlice,
    completion: SharedSlice,
    data: SharedSlice,
    tail: u16,
    head: u16,
    /// How far the device has fetched, as it said last.
    fetched: u16,
    phase: bool,
    next_cid: u16,
    events_out: Vec<u16>,
    /// Requests that the device takes.
    events_wanted: usize,
    events: VecDeque<Event>,
    stale_count: u64,
    broken: bool,
    sq_doorbell_bytes: usize,
    cq_doorbell_bytes: usize,
    /// The page of doorbells in memory, where the device is told about it.
    shadow: Option<SharedSlice>,
    iova: u64,
    /// Last: the device reaches the memory until here.
    _map: DmaMap,
}

impl AdminQueue {
    pub(super) fn new(
        domain: &Arc<dyn DmaDomain>,
        cap: Capabilities,
    ) -> Result<AdminQueue, NvmeError> {
        let mapping = Arc::new(Mapping::pool(3 * PAGE_BYTES)?);
        let map = DmaMap::new(domain, &mapping)?;
        let window = |page: usize, len_bytes: usize| {
            SharedSlice::new(&mapping, page * PAGE_BYTES, len_bytes, PAGE_BYTES)
                .unwrap_or_else(|| unreachable!("the mapping has three pages"))
        };
        let submission = window(0, usize::from(ENTRIES) * SQE_BYTES);
        Ok(AdminQueue {
            iova: submission.iova(domain.offset()).0,
            completion: window(1, usize::from(ENTRIES) * CQE_BYTES),
            data: window(2, IDENTIFY_BYTES),
            submission,
            tail: 0,
            head: 0,
            fetched: 0,
            phase: true,
            next_cid: 0,
            events_out: Vec::with_capacity(EVENTS_OUT_MAX),
            events_wanted: 0,
            events: VecDeque::with_capacity(EVENTS_KEPT_MAX),
            stale_count: 0,
            broken: true,
            sq_doorbell_bytes: doorbell_offset(0, false, cap.doorbell_stride()),
            cq_doorbell_bytes: doorbell_offset(0, true, cap.doorbell_stride()),
            shadow: None,
            _map: map,
        })
    }

    /// Empties both queues and tells a disabled controller where they are.
    pub(super) fn set_up<R: Registers>(&mut self, bar: &Bar<R>) {
        for window in [&self.submission, &self.completion, &self.data] {
            window.fill_zero();
        }
        (self.tail, self.head, self.fetched, self.phase) = (0, 0, 0, true);
        self.events_out.clear();
        self.events_wanted = 0;
        self.events.clear();
        self.shadow = None;
        self.broken = false;
        let page = PAGE_BYTES as u64;
        bar.set_admin_queues(self.iova, self.iova + page, ENTRIES);
    }

    /// Where data of commands goes.
    pub(super) fn data_iova(&self) -> u64 {
        self.iova + 2 * PAGE_BYTES as u64
    }

    /// Completions that belonged to nothing.
    pub(super) fn stale_count(&self) -> u64 {
        self.stale_count
    }

    /// Entries that the device may not have seen yet.
    pub(super) fn has_unfetched(&self) -> bool {
        self.fetched != self.tail
    }

    /// Nothing more can be asked before a reset.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Before the device is told of these pages, which it may read at any time from then on (Base 2.0 §B.5): their words are
    /// the doorbells, and follow them. Zeroes would be a tail from before the commands that were sent already. QEMU's
    /// controller sets them to its own, as other drivers leave the admin queue's alone; that is not to be counted on.
    pub(super) fn use_shadow(&mut self, values: SharedSlice, event_indices: &SharedSlice) {
        let first = doorbell_offset(0, false, 0);
        for (at, value) in
            [(self.sq_doorbell_bytes, self.tail), (self.cq_doorbell_bytes, self.head)]
        {
            for page in [&values, event_indices] {
                page.store_u32(at - first, u32::from(value), Ordering::Release);
            }
        }
        self.shadow = Some(values);
    }

    /// The device does not look there.
    pub(super) fn forget_shadow(&mut self) {
        self.shadow = None;
    }

    fn ring<R: Registers>(&self, bar: &Bar<R>, completion: bool) {
        let (offset, value) = if completion {
            (self.cq_doorbell_bytes, self.head)
        } else {
            (self.sq_doorbell_bytes, self.tail)
        };
        if let Some(shadow) = &self.shadow {
            let at = offset - doorbell_offset(0, false, 0);
            shadow.store_u32(at, u32::from(value), Ordering::Release);
        }
        // The register as well, always: nobody saves an exit on admin commands.
        bar.ring(offset, value);
    }

    fn submit<R: Registers>(&mut self, bar: &Bar<R>, entry: &Sqe) {
        self.submission.store_entry(usize::from(self.tail) * SQE_BYTES, &entry.0);
        self.tail = (self.tail + 1) % ENTRIES;
        self.ring(bar, false);
    }

    /// Takes what came; returns the completion of `wanted` if it is among it.
    fn reap<R: Registers>(&mut self, bar: &Bar<R>, wanted: Option<u16>) -> Option<Cqe> {
        let mut found = None;
        let mut any = false;
        for _ in 0..ENTRIES {
            let at = usize::from(self.head) * CQE_BYTES;
            let last = self.completion.load_u32(at + 12, Ordering::Acquire);
            let word = |number: usize| self.completion.load_u32(at + 4 * number, Ordering::Relaxed);
            let cqe = Cqe([word(0), word(1), word(2), last]);
            if cqe.phase() != self.phase {
                break;
            }
            any = true;
            self.fetched = cqe.sq_head();
            self.head = (self.head + 1) % ENTRIES;
            if self.head == 0 {
                self.phase = !self.phase;
            }
            if let Some(at) = self.events_out.iter().position(|&cid| cid == cqe.cid()) {
                self.events_out.swap_remove(at);
                self.keep_event(cqe);
            } else if wanted == Some(cqe.cid()) && found.is_none() {
                found = Some(cqe);
            } else {
                self.stale_count += 1;
            }
        }
        if any {
            self.ring(bar, true);
        }
        found
    }

    fn keep_event(&mut self, cqe: Cqe) {
        if !cqe.status().is_success() {
            // It takes fewer than it said, or none: not asked again.
            self.events_wanted = self.events_wanted.min(self.events_out.len());
            return;
        }
        let event = Event::of_result(cqe.0[0]);
        if !self.events.contains(&event) && self.events.len() < EVENTS_KEPT_MAX {
            self.events.push_back(event);
        }
    }

    /// Does a command. Its CID is filled in here.
    pub(super) fn command<R: Registers>(
        &mut self,
        bar: &Bar<R>,
        mut entry: Sqe,
        what: &'static str,
        within: Duration,
    ) -> Result<[u32; 2], NvmeError> {
        if self.broken {
            return Err(
                bar.refused(format!("cannot be asked ({what}): an earlier command had no answer"))
            );
        }
        let cid = self.next_cid;
        self.next_cid = (cid + 1) % EVENT_CID_FIRST;
        entry.0[0] = entry.0[0] & 0xffff | u32::from(cid) << 16;
        self.submit(bar, &entry);
        let start = Instant::now();
        loop {
            let elapsed = start.elapsed();
            if let Some(cqe) = self.reap(bar, Some(cid)) {
                return match cqe.status() {
                    status if status.is_success() => Ok([cqe.0[0], cqe.0[1]]),
                    status => Err(bar.failed(what, status)),
                };
            }
            if let Err(error) = bar.healthy_status() {
                self.broken = true;
                return Err(error);
            }
            if elapsed > SPIN
                && let Err(error) = bar.check_wanted_by_command()
            {
                self.broken = true;
                return Err(error);
            }
            if elapsed >= within {
                self.broken = true;
                return Err(NvmeError::TooSlow {
                    device: bar.device().to_owned(),
                    what,
                    within,
                    advice: "it is reset if it is attached; otherwise try again, or power it off and on",
                });
            }
            if elapsed > SPIN {
                std::thread::sleep((elapsed / 8).min(Duration::from_millis(1)));
            }
        }
    }

    /// Does a command that fills the data page, and returns a copy of it.
    pub(super) fn read<R: Registers>(
        &mut self,
        bar: &Bar<R>,
        mut entry: Sqe,
        len_bytes: usize,
        what: &'static str,
        within: Duration,
    ) -> Result<Vec<u8>, NvmeError> {
        if !self.broken {
            // What the device does not write is zero, not the answer to an earlier question.
            self.data.fill_zero();
        }
        entry.set_prps(self.data_iova(), 0);
        self.command(bar, entry, what, within)?;
        let mut bytes = vec![0; len_bytes.min(IDENTIFY_BYTES)];
        if let Some(segment) = self.data.segment(0, bytes.len()) {
            segment.read_into(&mut bytes);
        }
        Ok(bytes)
    }

    /// Asks to be told of events, by as many requests as the device takes (AERL + 1).
    pub(super) fn want_events<R: Registers>(&mut self, bar: &Bar<R>, limit: usize) {
        self.events_wanted = limit.min(EVENTS_OUT_MAX);
        self.arm_events(bar);
    }

    fn arm_events<R: Registers>(&mut self, bar: &Bar<R>) {
        while !self.broken && self.events_out.len() < self.events_wanted {
            let number = (0..u16::MAX).find(|n| !self.events_out.contains(&(EVENT_CID_FIRST + n)));
            let Some(number) = number else { return };
            let cid = EVENT_CID_FIRST + number;
            self.events_out.push(cid);
            self.submit(bar, &Sqe::new(admin::ASYNC_EVENT, cid, 0));
        }
    }

    /// The events that came since. Whoever has read their log pages calls [`AdminQueue::rearm`].
    pub(super) fn take_events<R: Registers>(&mut self, bar: &Bar<R>) -> Vec<Event> {
        if !self.broken {
            self.reap(bar, None);
        }
        self.events.drain(..).collect()
    }

    /// Asks for the next ones.
    pub(super) fn rearm<R: Registers>(&mut self, bar: &Bar<R>) {
        self.arm_events(bar);
    }
}

/// The status of a refused command, if that is what the error is.
pub(super) fn refused_with(error: &NvmeError) -> Option<Status> {
    match error {
        NvmeError::Command { status, .. } => Some(*status),
        _ => None,
    }
}
