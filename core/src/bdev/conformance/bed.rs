//! The test bed: plays worker and reactor for one channel.
//!
//! Its neighbour on the reactor is light two passes out of three, so a channel has to go piece by piece there.
//!
//! Owner: one thread of a test. **Invariant:** every tag is completed exactly once, and what is in flight agrees with
//! what the channel says; a bed that ends has all its pool memory back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bdev::{Bdev, BdevError, Channel, InstantChannel};
use crate::io::{Completions, IoFlags, IoOp, IoRequest, Slots, Tag};
use crate::limits::{FAIR_HOLD_NS, QUEUE_INFLIGHT_MAX};
use crate::mem::{DmaError, Mapping, MemTable, RegionSpec, Segment, register_pins};
use crate::reactor::{HeldPins, ReactorCx, Ring, Share};
use crate::status::IoStatus;
use crate::units::{GuestAddr, bytes_u64, index, len_u32};

/// Memory of a bed: one arena for each request in flight.
pub(super) const ARENAS: usize = 64;
pub(super) const ARENA_BYTES: usize = 4 << 20;

/// Without progress for so long, a request counts as lost.
pub(super) const HANG: Duration = Duration::from_secs(60);

/// A worker without a guest: one channel, a context with a ring, memory, and a ledger of tags.
pub struct TestBed {
    /// The context that the channel uses.
    pub cx: ReactorCx,
    channel: Box<dyn Channel>,
    memory: MemTable,
    pins: HeldPins,
    ledger: Slots<()>,
    done: Completions,
    share: Share,
    turns_count: u64,
}

impl std::fmt::Debug for TestBed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestBed").field("out", &self.ledger.live_count()).finish_non_exhaustive()
    }
}

impl TestBed {
    /// Opens a channel into `bdev` on this thread.
    ///
    /// # Panics
    /// Without io_uring or memory, or when the channel cannot be opened.
    #[must_use]
    pub fn new(bdev: &dyn Bdev) -> TestBed {
        TestBed::open(bdev).expect("a channel, and memory that the device reaches")
    }

    /// The same with a device that may refuse.
    ///
    /// # Errors
    /// When it gives no channel, or does not take the memory.
    ///
    /// # Panics
    /// Without io_uring or memory.
    pub fn open(bdev: &dyn Bdev) -> Result<TestBed, BdevError> {
        let mut ring = Ring::new(&[]).expect("io_uring");
        ring.enable().expect("an enabled ring");
        let mut cx = ReactorCx::new(Some(ring)).expect("memory for a context");
        let memory = memory_for(bdev, false)?;
        let channel = bdev.open_channel(None)?(&mut cx.io)?;
        let ledger = Slots::new(QUEUE_INFLIGHT_MAX);
        let (share, light) = (cx.io.fair.join(), cx.io.fair.join());
        cx.io.fair.served_all(&light, 0);
        let (done, pins) = (Completions::new(), HeldPins::default());
        Ok(TestBed { cx, channel, memory, pins, ledger, done, share, turns_count: 0 })
    }

    /// As [`TestBed::new`], with memory that is pinned and known to the ring.
    ///
    /// # Panics
    /// As there, or when the kernel refuses to pin.
    #[must_use]
    pub fn pinned(bdev: &dyn Bdev) -> TestBed {
        let mut bed = TestBed::new(bdev);
        bed.memory = memory_for(bdev, true).expect("memory that the device reaches");
        let pins: Vec<_> = bed.memory.pins().map(Arc::downgrade).collect();
        register_pins(&pins).expect("pinned memory");
        bed.pins = HeldPins::new(bed.memory.pinned());
        bed.pins.hold(&mut bed.cx.io).expect("cloned buffers");
        bed
    }

    /// Entries that named pinned memory so far.
    #[must_use]
    pub fn fixed_uses_count(&self) -> u64 {
        self.cx.io.ring.as_ref().map_or(0, Ring::fixed_uses_count)
    }

    /// Memory from `at_bytes` of arena `arena` on.
    ///
    /// # Panics
    /// Outside the arena.
    #[must_use]
    pub fn segment(&self, arena: usize, at_bytes: usize, len_bytes: usize) -> Segment {
        assert!(arena < ARENAS && at_bytes + len_bytes <= ARENA_BYTES, "outside the arena");
        let addr = GuestAddr(bytes_u64(arena * ARENA_BYTES + at_bytes));
        let segment = self.memory.translate(addr, len_u32(len_bytes), &mut 0);
        segment.expect("inside the memory")
    }

    /// Whether the channel lets a reactor sleep now.
    #[must_use]
    pub fn must_poll(&self) -> bool {
        self.channel.must_poll()
    }

    /// Requests that the bed has out.
    #[must_use]
    pub fn out_count(&self) -> usize {
        self.ledger.live_count()
    }

    /// Offers one request once; its tag when it was taken.
    pub fn offer(
        &mut self,
        op: IoOp,
        flags: IoFlags,
        offset_bytes: u64,
        len_bytes: u64,
        segments: &[Segment],
    ) -> Option<Tag> {
        let tag = self.ledger.insert(()).ok()?;
        let (segments_at, segments_count) = (0, 0);
        let request =
            IoRequest { offset_bytes, len_bytes, tag, segments_at, segments_count, op, flags };
        self.cx.batch.single(request, segments);
        self.begin_poll();
        let taken = self.channel.submit(&mut self.cx.io, self.cx.batch.view());
        self.cx.io.fair.end(&mut self.share);
        if taken == 0 {
            self.ledger.remove(tag);
            return None;
        }
        Some(tag)
    }

    fn begin_poll(&mut self) {
        let now_ns = if self.turns_count.is_multiple_of(3) { FAIR_HOLD_NS } else { 0 };
        self.cx.io.fair.begin(&mut self.share, now_ns);
    }

    /// One pass of a reactor; calls `each` with every completion.
    ///
    /// # Panics
    /// On a completion of a tag that is not out.
    pub fn turn(&mut self, mut each: impl FnMut(Tag, IoStatus)) -> usize {
        self.cx.turn_ring();
        self.turns_count += 1;
        self.begin_poll();
        self.channel.poll(&mut self.cx.io, &mut self.done);
        self.cx.io.fair.end(&mut self.share);
        let count = self.done.len();
        for completion in self.done.drain(..) {
            let known = self.ledger.remove(completion.tag).is_some();
            assert!(known, "{:?} was completed twice or never submitted", completion.tag);
            each(completion.tag, completion.status);
        }
        assert_eq!(self.channel.inflight(), self.ledger.live_count(), "requests in flight");
        count
    }

    /// Submits one request and waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn run(
        &mut self,
        op: IoOp,
        flags: IoFlags,
        offset_bytes: u64,
        len_bytes: u64,
        segments: &[Segment],
    ) -> IoStatus {
        let start = Instant::now();
        let mut wanted = None;
        let mut end = None;
        while end.is_none() {
            if wanted.is_none() {
                wanted = self.offer(op, flags, offset_bytes, len_bytes, segments);
            }
            self.turn(|tag, status| {
                if Some(tag) == wanted {
                    end = Some(status);
                }
            });
            assert!(start.elapsed() < HANG, "{op:?} at {offset_bytes}+{len_bytes} hangs");
        }
        end.unwrap_or_default()
    }

    /// Reads into a vector.
    ///
    /// # Errors
    /// The status of a read that failed.
    pub fn read(&mut self, offset_bytes: u64, len_bytes: usize) -> Result<Vec<u8>, IoStatus> {
        let segment = self.segment(0, 0, len_bytes);
        let len = bytes_u64(len_bytes);
        match self.run(IoOp::Read, IoFlags::NONE, offset_bytes, len, &[segment]) {
            IoStatus::Ok => Ok(gather(&[segment])),
            status => Err(status),
        }
    }

    /// Writes a slice.
    pub fn write(&mut self, offset_bytes: u64, data: &[u8]) -> IoStatus {
        let segment = self.segment(0, 0, data.len());
        segment.write_from(data);
        self.run(IoOp::Write, IoFlags::NONE, offset_bytes, bytes_u64(data.len()), &[segment])
    }

    /// Waits until nothing is out.
    ///
    /// # Panics
    /// When that does not happen.
    pub fn drain(&mut self) {
        let start = Instant::now();
        while self.out_count() > 0 {
            self.turn(|_, _| {});
            assert!(start.elapsed() < HANG, "{} requests are lost", self.out_count());
        }
    }

    /// Replaces the channel, drained and closed, by one of a removed device: hot removal as a worker sees it.
    pub fn remove(&mut self) {
        self.drain();
        self.channel.close(&mut self.cx.io);
        self.channel = Box::new(InstantChannel::new(IoStatus::Gone));
    }

    /// Ends the bed: drains, and looks some more for completions that nobody asked for.
    ///
    /// # Panics
    /// When requests are lost or invented, or pool memory did not come back.
    pub fn finish(mut self) {
        self.drain();
        for _ in 0..16 {
            assert_eq!(self.turn(|_, _| {}), 0, "completions out of nothing");
        }
        assert!(!self.channel.must_poll(), "an idle channel wants to be polled");
        self.channel.close(&mut self.cx.io);
        assert_eq!(self.cx.io.bounces_out_count(), 0, "bounce buffers");
        self.pins.let_go(&mut self.cx.io);
        let rings = [&self.cx.io.ring, &self.cx.io.polled];
        let left: usize = rings.into_iter().flatten().map(Ring::fixed_count).sum();
        assert_eq!(left, 0, "slots in use");
    }
}

/// All arenas, where the device reaches them: in memory that another process can be given, too.
fn memory_for(bdev: &dyn Bdev, to_pin: bool) -> Result<MemTable, BdevError> {
    let len_bytes = bytes_u64(ARENAS * ARENA_BYTES);
    let mapping = Arc::new(Mapping::pool(ARENAS * ARENA_BYTES).expect("memory"));
    let spec = RegionSpec { guest_addr: GuestAddr(0), len_bytes, user_addr: 0 };
    let mut memory = MemTable::new();
    let added = if to_pin { memory.add_to_pin(spec, mapping) } else { memory.add(spec, mapping) };
    added.expect("a region");
    if let Some(domain) = bdev.dma() {
        let refused = |error: DmaError| BdevError::Refused {
            name: bdev.info().name().to_owned(),
            reason: error.to_string(),
        };
        assert!(memory.map_into(&domain, || true).map_err(refused)?);
    }
    Ok(memory)
}

/// The segments' contents in one piece.
pub(super) fn gather(segments: &[Segment]) -> Vec<u8> {
    let mut all = Vec::new();
    for segment in segments {
        let at = all.len();
        all.resize(at + index(segment.len_bytes()), 0);
        segment.read_into(&mut all[at..]);
    }
    all
}
