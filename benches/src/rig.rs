//! One queue worker on a bench: a guest that fills its ring, a medium behind it, no threads.
//!
//! [`Format`] is the seam between ring formats: a new one is one `impl`, and then one line per case. Owner: the benchmark. Each round offers requests, runs the worker, takes all answers.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context, bail};
use ringmill_core::bdev::Bdev;
use ringmill_core::reactor::{Poller, ReactorCx, Ring};
use ringmill_core::spec::virtio_blk::{S_OK, T_IN};
use ringmill_core::stats::QueueStats;
use ringmill_vmm_glue::blk::{
    BlkDevice, NoTracking, QueueStatus, WorkerParts, packed_worker, split_worker,
};
use ringmill_vmm_glue::sim::{Buffer, Dice, DriverRing, GuestMemory, GuestRing, PackedDriverRing};
use ringmill_vmm_glue::virtq::{PackedQueue, RingWindows, SplitQueue, Virtqueue};

const MEMORY_AT: u64 = 1 << 30;
const MEMORY_BYTES: usize = 8 << 20;
/// Each request's header, status and indirect table.
const LINES_AT: u64 = MEMORY_AT + (1 << 20);
const LINE_BYTES: u64 = 256;
const STATUS_AT: u64 = 16;
const TABLE_AT: u64 = 64;
const DATA_AT: u64 = MEMORY_AT + (2 << 20);

/// Bytes of a request's data.
pub const IO_BYTES: u32 = 4096;
/// Entries of the rings.
pub const RING_SIZE: u16 = 512;
/// Size of every medium.
pub const MEDIUM_BYTES: u64 = 16 << 20;
/// Rounds of waiting for a medium before a bench gives up.
const WAITS_MAX: usize = 1000;

/// A ring format: both sides of an empty ring.
pub trait Format {
    /// The driver's side.
    type Ring: GuestRing;
    /// The device's side.
    type Queue: Virtqueue;

    /// The driver's side, in memory from `addr` on.
    fn ring(memory: &GuestMemory, addr: u64, size: u16) -> Self::Ring;

    /// The device's side of a ring.
    fn queue(windows: RingWindows, ring: &Self::Ring, size: u16) -> Option<Self::Queue>;

    /// What serves it.
    fn worker(queue: Self::Queue, parts: WorkerParts<(), NoTracking>) -> Box<dyn Poller>;
}

/// virtio 1.2 §2.7.
pub struct Split;

impl Format for Split {
    type Ring = DriverRing;
    type Queue = SplitQueue;

    fn ring(memory: &GuestMemory, addr: u64, size: u16) -> DriverRing {
        DriverRing::new(memory, addr, size, false, 0)
    }

    fn queue(windows: RingWindows, _ring: &DriverRing, size: u16) -> Option<SplitQueue> {
        Some(SplitQueue::new(windows, size, 0, false, true))
    }

    fn worker(queue: SplitQueue, parts: WorkerParts<(), NoTracking>) -> Box<dyn Poller> {
        split_worker(queue, parts)
    }
}

/// virtio 1.2 §2.8.
pub struct Packed;

impl Format for Packed {
    type Ring = PackedDriverRing;
    type Queue = PackedQueue;

    fn ring(memory: &GuestMemory, addr: u64, size: u16) -> PackedDriverRing {
        PackedDriverRing::new(memory, addr, size, false, 0)
    }

    fn queue(windows: RingWindows, ring: &PackedDriverRing, size: u16) -> Option<PackedQueue> {
        PackedQueue::new(windows, size, ring.base_at(0), false, true)
    }

    fn worker(queue: PackedQueue, parts: WorkerParts<(), NoTracking>) -> Box<dyn Poller> {
        packed_worker(queue, parts)
    }
}

/// A guest with one ring.
pub struct Guest<F: Format> {
    /// Its memory.
    pub memory: GuestMemory,
    ring: F::Ring,
    dice: Dice,
    indirect: bool,
}

impl<F: Format> Guest<F> {
    /// A guest whose requests are direct chains of three descriptors, or tables of three.
    #[must_use]
    pub fn new(indirect: bool) -> Guest<F> {
        let memory = GuestMemory::new(&[(MEMORY_AT, MEMORY_BYTES)]);
        let ring = F::ring(&memory, MEMORY_AT, RING_SIZE);
        Guest { memory, ring, dice: Dice::new(1, 0), indirect }
    }

    /// The device's view of the ring.
    ///
    /// # Errors
    /// Never for the memory of this guest.
    pub fn queue(&self) -> anyhow::Result<F::Queue> {
        let windows = self.ring.device_rings(&self.memory);
        let queue = windows.and_then(|windows| F::queue(windows, &self.ring, RING_SIZE));
        queue.context("the ring does not lie in the memory")
    }

    /// Offers `count` reads of places all over the medium.
    ///
    /// # Errors
    /// When the ring is full.
    pub fn offer(&mut self, count: u64) -> anyhow::Result<()> {
        for slot in 0..count {
            let line = LINES_AT + LINE_BYTES * slot;
            let block = self.dice.below(MEDIUM_BYTES / u64::from(IO_BYTES));
            self.memory.write(line, &T_IN.to_le_bytes());
            self.memory.write(line + 8, &(block * u64::from(IO_BYTES) / 512).to_le_bytes());
            self.memory.fill(line + STATUS_AT, 1, 0xff);
            let data = DATA_AT + slot * u64::from(IO_BYTES);
            let chain = [
                Buffer { addr: line, len_bytes: 16, writable: false },
                Buffer { addr: data, len_bytes: IO_BYTES, writable: true },
                Buffer { addr: line + STATUS_AT, len_bytes: 1, writable: true },
            ];
            let direct_count = if self.indirect { 0 } else { chain.len() };
            let table = line + TABLE_AT;
            let head = self.ring.add(&self.memory, &mut self.dice, &chain, direct_count, table);
            if head.is_none() {
                bail!("the ring is full after {slot} requests");
            }
        }
        self.ring.publish(&self.memory);
        Ok(())
    }

    /// Takes all answers there are.
    pub fn take_all(&mut self) -> u64 {
        let mut count = 0;
        while self.ring.take_used(&self.memory).is_some() {
            count += 1;
        }
        count
    }

    /// True when the first `count` requests have succeeded.
    #[must_use]
    pub fn all_ok(&self, count: u64) -> bool {
        (0..count).all(|slot| {
            let mut status = [0xff];
            self.memory.read(LINES_AT + LINE_BYTES * slot + STATUS_AT, &mut status);
            status == [S_OK]
        })
    }
}

/// A guest, and the worker that serves it.
pub struct WorkerRig<F: Format> {
    guest: Guest<F>,
    /// Behind a pointer, as a reactor has it: the code that is measured is the code that ships, not a copy that was
    /// inlined into a benchmark.
    worker: Box<dyn Poller>,
    cx: ReactorCx,
    /// The disk that the worker serves.
    pub device: Arc<BlkDevice>,
    _bdev: Arc<dyn Bdev>,
}

impl<F: Format> WorkerRig<F> {
    /// A worker over a medium. With `ring`: a real io_uring, for media that need one.
    ///
    /// # Errors
    /// When the kernel has no io_uring, or the medium cannot be opened.
    pub fn new(
        bdev: Arc<dyn Bdev>,
        indirect: bool,
        ring: Option<Ring>,
    ) -> anyhow::Result<WorkerRig<F>> {
        let mut guest = Guest::new(indirect);
        if let Some(domain) = bdev.dma() {
            guest.memory.map_into(&domain);
        }
        let mut cx = ReactorCx::new(ring)?;
        let channel = bdev.open_channel(None)?(&mut cx.io)?;
        let device = Arc::new(BlkDevice::new(&bdev, "bench", false));
        let parts = WorkerParts {
            queue: (),
            tracking: NoTracking,
            mem: guest.memory.table(),
            device: Arc::clone(&device),
            channel,
            status: Arc::new(QueueStatus::new(QueueStats::new_shared()?)),
            kick: None,
            call: None,
            enabled: true,
            events: Box::new(|_| ()),
        };
        let mut worker = black_box(F::worker(guest.queue()?, parts));
        worker.attach(&mut cx);
        Ok(WorkerRig { guest, worker, cx, device, _bdev: bdev })
    }

    /// The worker's part of a reactor's pass.
    #[inline]
    pub fn pass(&mut self) -> bool {
        self.cx.pass_ns = self.cx.io.clock.now_ns();
        self.worker.poll(&mut self.cx)
    }

    /// The ring's part.
    #[inline]
    pub fn turn_ring(&mut self) -> usize {
        self.cx.turn_ring()
    }

    /// Offers `count` requests, lets `serve` run the worker until all are answered, and looks at every status.
    ///
    /// # Errors
    /// When a request fails or is never answered.
    pub fn round(
        &mut self,
        count: u64,
        mut serve: impl FnMut(&mut WorkerRig<F>),
    ) -> anyhow::Result<()> {
        self.guest.offer(count)?;
        let mut answered = 0;
        for _ in 0..WAITS_MAX {
            serve(self);
            answered += self.guest.take_all();
            if answered >= count {
                break;
            }
        }
        if answered != count || !self.guest.all_ok(count) {
            bail!("{answered} of {count} requests were answered, or one of them badly");
        }
        Ok(())
    }
}

/// `count` times the same thing as bytes, for media that must have data.
#[must_use]
pub fn pattern(count_bytes: u64) -> Vec<u8> {
    (0..count_bytes).map(|at| u8::try_from((at / 512 + at) % 251).unwrap_or(0)).collect()
}

const _: () = assert!(DATA_AT + 128 * IO_BYTES as u64 <= MEMORY_AT + MEMORY_BYTES as u64);
