//! A queue worker on a bench: its ring, its memory, a channel that ends every request at once.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ringmill_core::bdev::{
    Bdev, BdevError, BdevInfo, Channel, ChannelSeed, Geometry, ReadyQueue, Room,
};
use ringmill_core::io::{BatchView, Completion, Completions, IoOp, IoRequest};
use ringmill_core::limits::QUEUE_INFLIGHT_MAX;
use ringmill_core::reactor::{IoCx, Poller, ReactorCx, ReactorHandle};
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::stats::QueueStats;
use ringmill_core::status::IoStatus;
use ringmill_vmm_glue::blk::{
    BlkDevice, NoTracking, QueueState, QueueStatus, QueueWorker, WorkerEvent, WorkerParts,
};
use ringmill_vmm_glue::sim::{Buffer, Dice, DriverRing, GuestMemory, GuestRing, PackedDriverRing};
use ringmill_vmm_glue::virtq::{PackedQueue, QueueError, RingWindows, SplitQueue, Virtqueue};

pub const SECTORS_COUNT: u64 = 8192;
pub const RING_AT: u64 = 0x1_0000;
pub const MEMORY_BYTES: usize = 2 << 20;
pub const SERIAL: &str = "bench";

/// A geometry and nothing behind it.
pub struct BenchBdev(Arc<BdevInfo>);

impl Bdev for BenchBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.0
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        Err(BdevError::Refused { name: "bench".to_owned(), reason: "not needed".to_owned() })
    }
}

/// Ends every request at once: reads give 0x11 in every byte. Takes at most `takes_max` requests per call.
#[derive(Debug)]
pub struct BenchChannel {
    ready: ReadyQueue,
    pub takes_max: usize,
    seen: Arc<Mutex<Vec<IoRequest>>>,
    record: bool,
    pub status: IoStatus,
}

impl Channel for BenchChannel {
    fn room(&self, _io: &IoCx) -> Room {
        Room { requests: self.ready.room(), bytes: u64::MAX, not_before_ns: 0 }
    }

    fn submit(&mut self, _io: &mut IoCx, batch: BatchView<'_>) -> usize {
        let taken = batch.requests().len().min(self.ready.room()).min(self.takes_max);
        for request in &batch.requests()[..taken] {
            if request.op == IoOp::Read && self.status.is_ok() {
                for segment in batch.segments(request) {
                    let mut at = 0;
                    while at < segment.len_bytes() {
                        at += u32::try_from(segment.sub(at, 4096).write_from(&[0x11; 4096]))
                            .expect("at most 4096");
                    }
                }
            }
            if self.record {
                self.seen.lock().expect("not poisoned").push(*request);
            }
            self.ready.push(Completion { tag: request.tag, status: self.status });
        }
        taken
    }

    fn poll(&mut self, _io: &mut IoCx, done: &mut Completions) {
        self.ready.drain_into(done);
    }

    fn inflight(&self) -> usize {
        self.ready.len()
    }

    fn must_poll(&self) -> bool {
        !self.ready.is_empty()
    }

    fn close(&mut self, _io: &mut IoCx) {}
}

/// A ring format: both sides of a ring.
pub trait Format {
    type Ring: GuestRing;
    type Queue: Virtqueue;

    fn ring(memory: &GuestMemory, setup: &Setup) -> Self::Ring;
    fn queue(windows: RingWindows, ring: &Self::Ring, setup: &Setup) -> Self::Queue;
}

pub struct Split;

impl Format for Split {
    type Ring = DriverRing;
    type Queue = SplitQueue;

    fn ring(memory: &GuestMemory, setup: &Setup) -> DriverRing {
        DriverRing::new(memory, RING_AT, setup.size, setup.event_idx, 0)
    }

    fn queue(windows: RingWindows, _ring: &DriverRing, setup: &Setup) -> SplitQueue {
        SplitQueue::new(windows, setup.size, 0, setup.event_idx, true)
    }
}

pub struct Packed;

impl Format for Packed {
    type Ring = PackedDriverRing;
    type Queue = PackedQueue;

    fn ring(memory: &GuestMemory, setup: &Setup) -> PackedDriverRing {
        PackedDriverRing::new(memory, RING_AT, setup.size, setup.event_idx, 0)
    }

    fn queue(windows: RingWindows, ring: &PackedDriverRing, setup: &Setup) -> PackedQueue {
        let base = ring.base_at(0);
        let queue = PackedQueue::new(windows, setup.size, base, setup.event_idx, setup.indirect);
        queue.expect("a place of the ring")
    }
}

/// One queue on its bench.
pub struct BenchOf<F: Format> {
    pub cx: ReactorCx,
    pub memory: GuestMemory,
    pub ring: F::Ring,
    pub worker: QueueWorker<F::Queue, NoTracking>,
    pub device: Arc<BlkDevice>,
    pub status: Arc<QueueStatus>,
    pub events: Arc<Mutex<Vec<QueueError>>>,
    pub seen: Arc<Mutex<Vec<IoRequest>>>,
    pub dice: Dice,
    next_buffer: u64,
}

pub type Bench = BenchOf<Split>;

/// What varies between benches.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub size: u16,
    pub read_only: bool,
    pub takes_max: usize,
    pub record: bool,
    pub status: IoStatus,
    pub event_idx: bool,
    /// Of packed rings; split ones always have it.
    pub indirect: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            size: 64,
            read_only: false,
            takes_max: usize::MAX,
            record: true,
            status: IoStatus::Ok,
            event_idx: false,
            indirect: true,
        }
    }
}

pub fn device(read_only: bool) -> Arc<BlkDevice> {
    let geometry = Geometry {
        block_bytes: 512,
        physical_block_bytes: 4096,
        optimal_io_bytes: 65536,
        blocks_count: SECTORS_COUNT,
        read_only: false,
        write_cache: true,
        discard: true,
        discard_granularity_bytes: 4096,
        write_zeroes: true,
    };
    let info = BdevInfo::new("bench", None, "bench", geometry).expect("a good geometry");
    let bdev: Arc<dyn Bdev> = Arc::new(BenchBdev(Arc::new(info)));
    Arc::new(BlkDevice::new(&bdev, SERIAL, read_only))
}

pub fn null_fd() -> Arc<OwnedFd> {
    Arc::new(std::fs::File::open("/dev/null").expect("/dev/null").into())
}

pub fn channel(setup: &Setup, seen: &Arc<Mutex<Vec<IoRequest>>>) -> BenchChannel {
    BenchChannel {
        ready: ReadyQueue::new(QUEUE_INFLIGHT_MAX),
        takes_max: setup.takes_max,
        seen: Arc::clone(seen),
        record: setup.record,
        status: setup.status,
    }
}

impl<F: Format> BenchOf<F> {
    pub fn new(setup: Setup) -> Self {
        // A second region directly behind the first, and nothing behind that.
        let memory = GuestMemory::new(&[
            (RING_AT, MEMORY_BYTES),
            (RING_AT + MEMORY_BYTES as u64, MEMORY_BYTES),
        ]);
        Self::with(setup, memory, |channel| Box::new(channel))
    }

    pub fn with(
        setup: Setup,
        memory: GuestMemory,
        wrap: impl FnOnce(BenchChannel) -> Box<dyn Channel>,
    ) -> Self {
        let ring = F::ring(&memory, &setup);
        let rings = ring.device_rings(&memory).expect("the windows fit");
        let device = device(setup.read_only);
        let status = Arc::new(QueueStatus::new(QueueStats::new_shared().expect("memory")));
        let (events, seen) = (Arc::default(), Arc::default());
        let told: Arc<Mutex<Vec<QueueError>>> = Arc::clone(&events);
        let mut worker = QueueWorker::new(WorkerParts {
            queue: F::queue(rings, &ring, &setup),
            tracking: NoTracking,
            mem: memory.table(),
            device: Arc::clone(&device),
            channel: wrap(channel(&setup, &seen)),
            status: Arc::clone(&status),
            kick: Some(null_fd()),
            call: None,
            enabled: true,
            events: Box::new(move |event| {
                if let WorkerEvent::Broken(error) = event {
                    told.lock().expect("not poisoned").push(error);
                }
            }),
        });
        let mut cx = ReactorCx::simulated(1).expect("memory");
        worker.attach(&mut cx);
        BenchOf {
            cx,
            memory,
            ring,
            worker,
            device,
            status,
            events,
            seen,
            dice: Dice::new(1, 50),
            next_buffer: RING_AT + 0x1_0000,
        }
    }

    /// One pass of the reactor; every pass is a microsecond.
    pub fn pass(&mut self) -> bool {
        self.cx.io.clock.advance_ns(1000);
        self.cx.pass_ns = self.cx.io.clock.now_ns();
        self.worker.poll(&mut self.cx)
    }

    pub fn is_broken(&self) -> bool {
        self.status.state() == QueueState::Broken
    }

    /// Fresh memory of this length, at least a page away from any other.
    pub fn buffer(&mut self, len_bytes: u32, writable: bool) -> Buffer {
        let addr = self.next_buffer;
        self.next_buffer += u64::from(len_bytes).next_multiple_of(4096) + 4096;
        Buffer { addr, len_bytes, writable }
    }

    /// Hands out memory from the start again.
    pub fn reuse_buffers(&mut self) {
        self.next_buffer = RING_AT + 0x1_0000;
    }

    pub fn header(&mut self, kind: u32, sector: u64) -> Buffer {
        let buffer = self.buffer(16, false);
        self.memory.write(buffer.addr, &kind.to_le_bytes());
        self.memory.write(buffer.addr + 8, &sector.to_le_bytes());
        buffer
    }

    /// A range of DISCARD and WRITE_ZEROES.
    pub fn range(&mut self, sector: u64, count: u32, flags: u32) -> Buffer {
        let buffer = self.buffer(16, false);
        self.memory.write(buffer.addr, &sector.to_le_bytes());
        self.memory.write(buffer.addr + 8, &count.to_le_bytes());
        self.memory.write(buffer.addr + 12, &flags.to_le_bytes());
        buffer
    }

    /// A status byte, not yet set.
    pub fn status_byte(&mut self) -> Buffer {
        let buffer = self.buffer(1, true);
        self.memory.fill(buffer.addr, 1, 0xaa);
        buffer
    }

    /// Adds a direct chain and shows it to the device.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.ring.add(&self.memory, &mut self.dice, buffers, buffers.len(), 0);
        self.ring.publish(&self.memory);
        head.expect("descriptors are free")
    }

    /// Adds a chain in an indirect table.
    pub fn offer_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let table = self.buffer(u32::try_from(16 * buffers.len()).expect("small"), false).addr;
        let head = self.ring.add(&self.memory, &mut self.dice, buffers, 0, table);
        self.ring.publish(&self.memory);
        head.expect("descriptors are free")
    }

    /// Offers the chain, polls, and returns the status byte of its last buffer and the used length.
    pub fn ask(&mut self, buffers: &[Buffer]) -> Option<(u8, u32)> {
        let head = self.offer(buffers);
        self.answer(head, buffers)
    }

    pub fn answer(&mut self, head: u16, buffers: &[Buffer]) -> Option<(u8, u32)> {
        for _ in 0..4 {
            self.pass();
        }
        let (id, len) = self.ring.take_used(&self.memory)?;
        assert_eq!(id, u32::from(head));
        let last = buffers.last().expect("a status");
        let mut byte = [0];
        self.memory.read(last.addr + u64::from(last.len_bytes) - 1, &mut byte);
        Some((byte[0], len))
    }

    /// A read of one sector, which a healthy queue answers.
    pub fn still_serves(&mut self) -> bool {
        let header = self.header(spec::T_IN, 1);
        let (data, status) = (self.buffer(512, true), self.status_byte());
        self.ask(&[header, data, status]) == Some((spec::S_OK, 513))
    }
}

/// Counts for tests of what a closure was called with.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
