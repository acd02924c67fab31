//! HOT PATH
//! One virtqueue of one disk on one reactor.
//!
//! Flow: virtqueue → requests → channel → completions → used ring → interrupt. Owner: the queue's reactor; built and
//! dropped by control threads. **Invariant:** a head is in flight at most once and is answered exactly once; what the
//! channel does not take goes back to the ring untouched; a broken queue never writes to the guest's rings again.
//!
//! poll:
//!   available → while room, bytes and entries: pop, parse, slot → submit a prefix, put the rest back
//!   channel.poll → status byte, used element
//!   publish used.idx once → at most one interrupt

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use ringmill_core::bdev::{Channel, ChannelSeed};
use ringmill_core::io::{Completion, IoOp, Slots};
use ringmill_core::limits::{BATCH_REQUESTS_MAX, PASS_BYTES_MAX, QUEUE_INFLIGHT_MAX};
use ringmill_core::mem::{MemTable, Segment};
use ringmill_core::reactor::{ClientId, Done, Poller, ReactorCx};
use ringmill_core::stats::Stage;
use ringmill_core::status::IoStatus;
use ringmill_core::units::{len_u32, usize_of};

use crate::virtq::{Chain, QueueError, Virtqueue};

use super::coalesce::Coalescer;
use super::request::{Parsed, Refusal, parse};
use super::{BlkDevice, QueueState, QueueStatus, WorkerEvent};

const KICK_TOKEN: u64 = 1;
const CALL_TOKEN: u64 = 2;
/// Arrival times remembered for entries that wait on the ring; older ones share a time.
const ARRIVALS_MAX: usize = 8;

/// What must be noted about requests for a successor or a migration. Nothing, an in-flight log or a dirty log:
/// monomorphized, so nothing costs nothing.
pub trait Tracking: Send + 'static {
    /// A head was taken from the ring.
    fn taken(&mut self, head: u16);
    /// A head that was taken last goes back to the ring: it was not handed to the device.
    fn put_back(&mut self, _head: u16) {}
    /// A head is about to be visible in the used ring.
    fn answered(&mut self, head: u16);
}

/// Notes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTracking;

impl Tracking for NoTracking {
    #[inline]
    fn taken(&mut self, _head: u16) {}
    #[inline]
    fn answered(&mut self, _head: u16) {}
}

/// A request in flight, as the guest knows it.
#[derive(Debug)]
struct InFlight {
    head: u16,
    op: IoOp,
    written_bytes: u32,
    status: Segment,
    bytes: u64,
    seen_ns: u64,
    submitted_ns: u64,
}

/// A request that was answered in this pass, for the figures.
#[derive(Debug)]
struct Finished {
    op: IoOp,
    ok: bool,
    bytes: u64,
    seen_ns: u64,
    submitted_ns: u64,
}

/// Entries that became visible together.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    count: u16,
    seen_ns: u64,
}

/// What a worker is made of.
pub struct WorkerParts<V, T> {
    /// The ring.
    pub queue: V,
    /// What to note about requests.
    pub tracking: T,
    /// The guest's memory.
    pub mem: Arc<MemTable>,
    /// The disk.
    pub device: Arc<BlkDevice>,
    /// The way to the medium; planted by the reactor that takes the worker in.
    pub channel: Box<dyn Channel>,
    /// Where the worker shows itself.
    pub status: Arc<QueueStatus>,
    /// Guest → us. `None`: the guest never kicks, the queue is always polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// Us → guest. `None`: the guest polls.
    pub call: Option<Arc<OwnedFd>>,
    /// False: takes no requests until enabled.
    pub enabled: bool,
    /// Tells the control thread.
    pub events: Box<dyn Fn(WorkerEvent) + Send>,
}

/// One queue's worker.
pub struct QueueWorker<V, T> {
    parts: WorkerParts<V, T>,
    state: QueueState,
    slots: Slots<InFlight>,
    /// One bit per head: taken and not answered.
    heads: Box<[u64]>,
    arrivals: ArrayVec<Arrival, ARRIVALS_MAX>,
    finished: ArrayVec<Finished, BATCH_REQUESTS_MAX>,
    mem_hint: usize,
    client: Option<ClientId>,
    call_pending: bool,
    call_owed: bool,
    /// The kick fd should be watched and is not: the ring had no room.
    kick_unwatched: bool,
    interrupt_wanted: bool,
    coalescer: Coalescer,
    seed: Option<ChannelSeed>,
    waiting: Vec<Done>,
}

impl<V, T> std::fmt::Debug for QueueWorker<V, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueWorker").field("state", &self.state).finish_non_exhaustive()
    }
}

impl<V: Virtqueue, T: Tracking> QueueWorker<V, T> {
    /// A worker for `parts`, to be moved to a reactor. All memory is allocated here.
    #[must_use]
    #[cold]
    pub fn new(parts: WorkerParts<V, T>) -> QueueWorker<V, T> {
        let size = usize::from(parts.queue.size());
        QueueWorker {
            slots: Slots::new(size.min(QUEUE_INFLIGHT_MAX)),
            heads: std::iter::repeat_n(0, size.div_ceil(64)).collect(),
            arrivals: ArrayVec::new(),
            finished: ArrayVec::new(),
            mem_hint: 0,
            client: None,
            call_pending: false,
            call_owed: false,
            kick_unwatched: false,
            interrupt_wanted: false,
            coalescer: Coalescer::default(),
            seed: None,
            waiting: Vec::with_capacity(4),
            state: QueueState::Running,
            parts,
        }
    }

    /// Plants `seed` on the reactor that takes the worker in; until then, and if that fails, `parts.channel` serves.
    #[must_use]
    #[cold]
    pub fn with_seed(mut self, seed: ChannelSeed) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Takes requests, or takes none until told again (SET_VRING_ENABLE). `done` is called when a disabled queue has
    /// nothing in flight.
    #[cold]
    pub fn set_enabled(&mut self, enabled: bool, done: Done) {
        self.parts.enabled = enabled;
        if enabled || self.slots.live_count() == 0 { done() } else { self.waiting.push(done) }
    }

    /// Replaces the guest's memory and the windows onto the rings in it. When regions go, the caller quiesces first.
    /// Returns the old ones, to be dropped by the control thread.
    #[cold]
    pub fn set_memory(
        &mut self,
        mem: Arc<MemTable>,
        windows: V::Windows,
    ) -> (Arc<MemTable>, V::Windows) {
        self.mem_hint = 0;
        (std::mem::replace(&mut self.parts.mem, mem), self.parts.queue.relocate(windows))
    }

    /// Replaces the call fd and signals it once, in case the old one missed something.
    #[cold]
    pub fn set_call(
        &mut self,
        cx: &mut ReactorCx,
        call: Option<Arc<OwnedFd>>,
    ) -> Option<Arc<OwnedFd>> {
        if let Some(ring) = &mut cx.io.ring {
            // A signal that is still in the submission queue names the old descriptor.
            ring.commit();
        }
        let old = std::mem::replace(&mut self.parts.call, call);
        self.signal_guest(cx);
        old
    }

    /// Replaces the kick fd.
    #[cold]
    pub fn set_kick(
        &mut self,
        cx: &mut ReactorCx,
        kick: Option<Arc<OwnedFd>>,
    ) -> Option<Arc<OwnedFd>> {
        self.watch_kick(cx, false);
        let old = std::mem::replace(&mut self.parts.kick, kick);
        self.watch_kick(cx, true);
        old
    }

    /// Where the queue would go on (GET_VRING_BASE); final once nothing is in flight.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.parts.queue.base()
    }

    /// Requests in flight.
    #[must_use]
    pub fn inflight_count(&self) -> usize {
        self.slots.live_count()
    }

    /// True once (and resets): the guest is to be interrupted. For contexts without a ring, such as the simulator.
    pub fn take_interrupt(&mut self) -> bool {
        std::mem::take(&mut self.interrupt_wanted)
    }

    #[cold]
    fn watch_kick(&mut self, cx: &mut ReactorCx, on: bool) {
        self.kick_unwatched = on && cx.io.ring.is_some() && self.parts.kick.is_some();
        if let (Some(ring), Some(client), Some(kick)) =
            (&mut cx.io.ring, self.client, &self.parts.kick)
        {
            if on {
                self.kick_unwatched = !ring.watch(client, KICK_TOKEN, kick.as_raw_fd());
            } else {
                ring.unwatch(client, KICK_TOKEN);
            }
            ring.commit();
        }
    }

    #[inline(never)]
    fn signal_guest(&mut self, cx: &mut ReactorCx) {
        self.interrupt_wanted = true;
        if self.call_pending {
            // The signal under way may have been delivered before our elements were visible.
            self.call_owed = true;
            return;
        }
        if let (Some(ring), Some(client), Some(call)) =
            (&mut cx.io.ring, self.client, &self.parts.call)
        {
            self.call_pending = ring.signal(client, CALL_TOKEN, call.as_raw_fd());
            self.call_owed = !self.call_pending;
            if self.call_pending {
                self.parts.status.note_interrupt();
            }
        } else {
            self.call_owed = false;
        }
    }

    #[cold]
    #[inline(never)]
    fn read_events(&mut self, cx: &mut ReactorCx) {
        let Some(client) = self.client else { return };
        let mut kicks = 0;
        let mut rearm = false;
        let mut call_done = false;
        if let Some(ring) = &mut cx.io.ring {
            while let Some(event) = ring.next_event(client) {
                match event.token {
                    KICK_TOKEN => {
                        kicks += 1;
                        // A watch that the kernel ended on its own (a full completion queue) is set again.
                        rearm |= !event.more && event.result != -libc::ECANCELED;
                    }
                    _ => call_done = true,
                }
            }
        }
        self.parts.status.note_kicks(kicks);
        if rearm {
            self.watch_kick(cx, true);
        }
        if call_done {
            self.call_pending = false;
            if std::mem::take(&mut self.call_owed) {
                self.signal_guest(cx);
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn break_queue(&mut self, error: QueueError) {
        self.state = QueueState::Broken;
        self.parts.status.set_state(QueueState::Broken);
        (self.parts.events)(WorkerEvent::Broken(error));
    }

    /// Ends the queue in the middle of an intake: what was popped and not yet handed over is forgotten.
    #[cold]
    #[inline(never)]
    fn abandon(&mut self, cx: &mut ReactorCx, error: QueueError) {
        for tag in cx.batch.view().tags() {
            self.slots.remove(tag);
        }
        cx.batch.clear();
        self.arrivals.clear();
        self.break_queue(error);
    }

    /// When the next entry was first seen; counts it as taken.
    #[inline]
    fn take_arrival(&mut self, now_ns: u64) -> u64 {
        let Some(first) = self.arrivals.first_mut() else { return now_ns };
        first.count -= 1;
        let seen_ns = first.seen_ns;
        if first.count == 0 {
            self.arrivals.remove(0);
        }
        seen_ns
    }

    /// Notes how many entries are on the ring.
    #[inline]
    fn note_arrivals(&mut self, available: u16, now_ns: u64) {
        let known: u16 = self.arrivals.iter().map(|a| a.count).sum();
        let count = available.saturating_sub(known);
        if count == 0 {
            return;
        }
        if self.arrivals.is_full() {
            if let Some(last) = self.arrivals.last_mut() {
                last.count += count;
            }
        } else {
            self.arrivals.push(Arrival { count, seen_ns: now_ns });
        }
    }

    /// Puts the entry that was taken last back to the ring; it keeps the time at which it was seen.
    #[cold]
    #[inline(never)]
    fn put_back(&mut self, head: u16, seen_ns: u64) {
        self.unmark(head);
        self.parts.tracking.put_back(head);
        self.parts.queue.unpop(1);
        let full = self.arrivals.is_full();
        match self.arrivals.first_mut() {
            Some(first) if full || first.seen_ns == seen_ns => first.count += 1,
            _ => self.arrivals.insert(0, Arrival { count: 1, seen_ns }),
        }
    }

    /// Takes what there is room for; true when there was anything to take.
    fn intake(&mut self, cx: &mut ReactorCx) -> Result<bool, QueueError> {
        let available = self.parts.queue.available()?;
        if available == 0 {
            return Ok(false);
        }
        self.parts.queue.suppress_kicks();
        self.note_arrivals(available, cx.pass_ns);
        let room =
            self.parts.channel.room(&cx.io).requests.min(self.slots.room()).min(BATCH_REQUESTS_MAX);
        let size_bytes = self.parts.device.info().size_bytes();
        let mut bytes = 0;
        cx.batch.clear();
        for _ in 0..room.min(usize::from(available)) {
            let popped =
                self.parts.queue.pop(&self.parts.mem, &mut self.mem_hint, &mut cx.batch)?;
            let Some(chain) = popped else { break };
            let seen_ns = self.take_arrival(cx.pass_ns);
            self.mark_taken(chain.head)?;
            match parse(&chain, &mut cx.batch, &self.parts.device, size_bytes)? {
                Parsed::Io(mut request) => {
                    let slot = InFlight {
                        head: chain.head,
                        op: request.op,
                        written_bytes: written(&chain),
                        status: chain.status,
                        bytes: request.len_bytes,
                        seen_ns,
                        submitted_ns: cx.pass_ns,
                    };
                    let Ok(tag) = self.slots.insert(slot) else {
                        self.put_back(chain.head, seen_ns);
                        break;
                    };
                    request.tag = tag;
                    bytes += request.len_bytes;
                    cx.batch.push(request);
                    if bytes >= PASS_BYTES_MAX {
                        break;
                    }
                }
                answer => {
                    self.copy_serial(cx, &answer);
                    // Entries are answered in any order but put back only from the end: hand over what came before.
                    if !self.submit(cx, Some((chain.head, seen_ns))) {
                        return Ok(true);
                    }
                    self.answer(cx, &chain, seen_ns, &answer);
                }
            }
        }
        self.submit(cx, None);
        Ok(true)
    }

    #[inline]
    fn mark_taken(&mut self, head: u16) -> Result<(), QueueError> {
        let (word, bit) = (usize::from(head) / 64, 1u64 << (head % 64));
        if self.heads[word] & bit != 0 {
            return Err(QueueError::HeadInFlight { head });
        }
        self.heads[word] |= bit;
        self.parts.tracking.taken(head);
        Ok(())
    }

    #[inline]
    fn unmark(&mut self, head: u16) {
        self.heads[usize::from(head) / 64] &= !(1u64 << (head % 64));
    }

    /// Hands the batch to the channel; true when all of it was taken. The rest goes back to the ring, and with it
    /// `last`: the head and time of an entry that was popped after those of the batch.
    #[inline]
    fn submit(&mut self, cx: &mut ReactorCx, last: Option<(u16, u64)>) -> bool {
        if cx.batch.is_empty() {
            return true;
        }
        let taken = self.parts.channel.submit(&mut cx.io, cx.batch.view());
        let all = taken == cx.batch.len();
        // One clock read for the whole batch: it was handed over in one call.
        let now_ns = cx.io.clock.now_ns();
        let view = cx.batch.view();
        for request in &view.requests()[..taken] {
            if let Some(slot) = self.slots.get_mut(request.tag) {
                slot.submitted_ns = now_ns;
            }
        }
        if !all && let Some((head, seen_ns)) = last {
            self.put_back(head, seen_ns);
        }
        for request in view.requests()[taken..].iter().rev() {
            if let Some(slot) = self.slots.remove(request.tag) {
                self.put_back(slot.head, slot.seen_ns);
            }
        }
        cx.batch.clear();
        all
    }

    /// Gives a GET_ID its data: before `submit`, which empties the batch and with it the list of segments. A request
    /// that goes back to the ring gets it again.
    #[cold]
    #[inline(never)]
    fn copy_serial(&self, cx: &mut ReactorCx, answer: &Parsed) {
        let Parsed::GetId { segments_at, segments_count } = *answer else { return };
        let mut rest: &[u8] = self.parts.device.serial();
        for segment in cx.batch.segments_from(segments_at).iter().take(segments_count) {
            rest = &rest[segment.write_from(rest)..];
        }
    }

    /// Answers a request that needs no device.
    #[cold]
    #[inline(never)]
    fn answer(&mut self, cx: &mut ReactorCx, chain: &Chain, seen_ns: u64, answer: &Parsed) {
        let (op, status, bytes) = match answer {
            Parsed::GetId { .. } => (None, IoStatus::Ok, 0),
            Parsed::Answer(Refusal { op, status }) => (Some(*op), *status, 0),
            Parsed::Io(_) => return,
        };
        chain.status.write_u8(status.to_virtio());
        self.unmark(chain.head);
        self.parts.tracking.answered(chain.head);
        self.parts.queue.put_used(chain.head, written(chain));
        if let Some(op) = op {
            let stats = self.parts.status.stats.op(op);
            stats.count(bytes, status.is_ok());
            stats.stage(Stage::Total).record(cx.io.clock.now_ns().saturating_sub(seen_ns));
        }
    }

    /// Answers what the channel has finished, one batch per pass; true when there was anything.
    #[inline]
    fn complete(&mut self, cx: &mut ReactorCx) -> bool {
        if self.slots.live_count() == 0 {
            return false;
        }
        cx.completions.clear();
        self.parts.channel.poll(&mut cx.io, &mut cx.completions);
        for at in 0..cx.completions.len() {
            let Completion { tag, status } = cx.completions[at];
            let Some(slot) = self.slots.remove(tag) else { continue };
            self.unmark(slot.head);
            if self.state == QueueState::Broken {
                continue;
            }
            slot.status.write_u8(status.to_virtio());
            self.parts.tracking.answered(slot.head);
            self.parts.queue.put_used(slot.head, slot.written_bytes);
            let InFlight { op, bytes, seen_ns, submitted_ns, .. } = slot;
            self.finished.push(Finished { op, ok: status.is_ok(), bytes, seen_ns, submitted_ns });
        }
        !cx.completions.is_empty()
    }

    /// Makes answers visible and interrupts the guest if it wants that; then does the book-keeping.
    #[inline]
    fn publish(&mut self, cx: &mut ReactorCx) {
        if self.state == QueueState::Broken {
            return;
        }
        let completed_ns = if self.finished.is_empty() { 0 } else { cx.io.clock.now_ns() };
        let ask = self.parts.call.is_some() || cx.io.ring.is_none();
        if self.parts.queue.publish(ask) && self.coalescer.want(cx.pass_ns) {
            self.signal_guest(cx);
        }
        if self.finished.is_empty() {
            return;
        }
        let published_ns = cx.io.clock.now_ns();
        let complete_ns = published_ns.saturating_sub(completed_ns);
        self.coalescer.count(
            len_u32(self.finished.len()),
            published_ns,
            self.parts.device.coalesce(),
        );
        for done in self.finished.drain(..) {
            let stats = self.parts.status.stats.op(done.op);
            stats.count(done.bytes, done.ok);
            stats.stage(Stage::Queue).record(done.submitted_ns.saturating_sub(done.seen_ns));
            stats.stage(Stage::Device).record(completed_ns.saturating_sub(done.submitted_ns));
            stats.stage(Stage::Complete).record(complete_ns);
            stats.stage(Stage::Total).record(published_ns.saturating_sub(done.seen_ns));
        }
    }

    #[inline]
    fn show(&self) {
        let (avail, used) = (self.parts.queue.base(), u32::from(self.parts.queue.used_index()));
        self.parts.status.show(len_u32(self.slots.live_count()), avail, used);
    }

    /// How long the oldest request has been with the device, nanoseconds; `None` without any.
    #[must_use]
    #[cold]
    pub fn oldest_age_ns(&self, now_ns: u64) -> Option<u64> {
        self.slots.iter().map(|(_, slot)| now_ns.saturating_sub(slot.submitted_ns)).max()
    }

    #[cold]
    #[inline(never)]
    fn drained(&mut self) {
        if self.state == QueueState::Draining {
            self.set_state(QueueState::Quiesced);
        }
        for done in self.waiting.drain(..) {
            done();
        }
    }

    fn set_state(&mut self, state: QueueState) {
        self.state = state;
        self.parts.status.set_state(state);
    }
}

/// Bytes that the used element claims: the whole writable part, as its last byte (the status) is always written.
#[inline]
fn written(chain: &Chain) -> u32 {
    len_u32(usize_of(chain.writable_bytes))
}

impl<V: Virtqueue, T: Tracking> Poller for QueueWorker<V, T> {
    fn poll(&mut self, cx: &mut ReactorCx) -> bool {
        if let (Some(ring), Some(client)) = (&cx.io.ring, self.client)
            && ring.has_events(client)
        {
            self.read_events(cx);
        }
        // Due: delayed on purpose. Owed: the ring had no room for the signal.
        if self.coalescer.take_due(cx.pass_ns) || (self.call_owed && !self.call_pending) {
            self.signal_guest(cx);
        }
        let mut work = false;
        if self.state == QueueState::Running && self.parts.enabled {
            match self.intake(cx) {
                Ok(found) => work = found,
                Err(error) => self.abandon(cx, error),
            }
        }
        work |= self.complete(cx);
        if work {
            self.publish(cx);
            self.show();
        }
        if !self.waiting.is_empty() && self.slots.live_count() == 0 {
            self.drained();
        }
        work
    }

    fn prepare_sleep(&mut self, cx: &mut ReactorCx) -> bool {
        if self.parts.queue.memory_gone() && self.state != QueueState::Broken {
            self.break_queue(QueueError::MemoryGone);
        }
        if self.slots.live_count() > 0 && self.parts.channel.must_poll() {
            return true;
        }
        if self.coalescer.is_due() || (self.call_owed && !self.call_pending) {
            return true;
        }
        if self.kick_unwatched {
            self.watch_kick(cx, true);
        }
        if self.state != QueueState::Running || !self.parts.enabled {
            return false;
        }
        self.parts.kick.is_none() || self.kick_unwatched || self.parts.queue.request_kick()
    }

    fn attach(&mut self, cx: &mut ReactorCx) {
        if let Some(ring) = &mut cx.io.ring {
            self.client = ring.add_client(16).ok();
        }
        if let Some(seed) = self.seed.take() {
            match seed(&mut cx.io) {
                Ok(channel) => self.parts.channel = channel,
                Err(error) => (self.parts.events)(WorkerEvent::NoChannel(error)),
            }
        }
        self.watch_kick(cx, true);
        self.set_state(QueueState::Running);
        // A predecessor that died may have left kicks suppressed or an interrupt unsent: say what holds now, and send
        // one interrupt to be sure. Entries that are there already are found by the first poll.
        self.parts.queue.request_kick();
        self.signal_guest(cx);
        self.show();
    }

    fn detach(&mut self, cx: &mut ReactorCx) {
        if self.coalescer.is_due() {
            self.signal_guest(cx);
        }
        self.watch_kick(cx, false);
        if self.parts.channel.inflight() == 0 {
            self.parts.channel.close(&mut cx.io);
        }
        if let (Some(ring), Some(client)) = (&mut cx.io.ring, self.client.take()) {
            ring.commit();
            ring.remove_client(client);
        }
        self.show();
        self.parts.status.set_state(QueueState::Stopped);
    }

    fn quiesce(&mut self, _cx: &mut ReactorCx, done: Done) {
        if self.state == QueueState::Running {
            self.set_state(QueueState::Draining);
        }
        if self.slots.live_count() == 0 {
            self.drained();
            done();
        } else {
            self.waiting.push(done);
        }
    }

    fn resume(
        &mut self,
        cx: &mut ReactorCx,
        channel: Option<Box<dyn Channel>>,
    ) -> Option<Box<dyn Channel>> {
        let old = channel.map(|new| {
            let mut old = std::mem::replace(&mut self.parts.channel, new);
            old.close(&mut cx.io);
            old
        });
        if self.state != QueueState::Broken {
            self.set_state(QueueState::Running);
        }
        old
    }
}
