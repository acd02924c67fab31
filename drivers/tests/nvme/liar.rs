//! The life of the real driver with a device that lies: attached if it lets us, loaded while things happen to it, let go.
//!
//! In: a seed. Out: what was seen. It panics when a request is lost or answered twice, when something hangs, and when memory
//! was taken away from a device that had not said that it was done with it. A device that told no lie must have nothing to
//! complain about.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ringmill_core::bdev::{Bdev, BdevError};
use ringmill_core::io::{Completions, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::mem::{Mapping, MemTable, RegionSpec};
use ringmill_core::reactor::{Entropy, ReactorCx, Ring};
use ringmill_core::units::{GuestAddr, len_u32, usize_of};
use ringmill_drivers::model::{
    Aborts, Count, Lie, LyingBacking, MapFailure, ModelControl, ModelOptions, Sgls, Vectors,
};
use ringmill_drivers::nvme::{ActionOnTimeout, NvmeControl, NvmeOptions, attach};
use ringmill_drivers::pci::DeviceNews;

use super::nvme::{Heard, SIZE_BYTES, namespace, options};

const REQUESTS: u16 = 300;
const DEPTH: u16 = 32;
const PIECE_BYTES: u64 = 8192;

/// Longer than all time-outs and resets of the driver together.
const HANG: Duration = Duration::from_secs(60);

/// Things that happen to a device while it is used.
const EVENTS: u64 = 6;

const LIES: [Lie; 10] = [
    Lie::Status,
    Lie::Register,
    Lie::Data,
    Lie::AdminAnswer,
    Lie::IoAnswer,
    Lie::Dropped,
    Lie::Doubled,
    Lie::Invented,
    Lie::EventIndex,
    Lie::Config,
];

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Life {
    pub(crate) attached: u64,
    pub(crate) sent: u64,
    pub(crate) good: u64,
    resets: u64,
    aborts: u64,
    stale: u64,
    events: u64,
    faults: u64,
    lies: u64,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "attached={} requests={} good={} resets={} aborts={} stale={} events={} faults={} lies={}",
            self.attached,
            self.sent,
            self.good,
            self.resets,
            self.aborts,
            self.stale,
            self.events,
            self.faults,
            self.lies
        )
    }
}

/// Sends requests until all are answered; how many were sent, how many went well.
fn load(bdev: &dyn Bdev, seed: u64) -> Result<(u64, u64), BdevError> {
    let mut ring = Ring::new(&[]).expect("io_uring");
    ring.enable().expect("an enabled ring");
    let mut cx = ReactorCx::new(Some(ring)).expect("memory for a context");
    let len_bytes = PIECE_BYTES * u64::from(DEPTH);
    let mapping = Arc::new(Mapping::pool(usize_of(len_bytes)).expect("memory"));
    let mut memory = MemTable::new();
    let spec = RegionSpec { guest_addr: GuestAddr(0), len_bytes, user_addr: 0 };
    memory.add(spec, mapping).expect("a region");
    let mut channel = bdev.open_channel(None)?(&mut cx.io)?;
    if let Some(domain) = bdev.dma()
        && memory.map_into(&domain, || true).is_err()
    {
        // It was lost meanwhile, or its IOMMU refuses.
        channel.close(&mut cx.io);
        return Ok((0, 0));
    }
    let block = u64::from(bdev.info().geometry().block_bytes);
    // What the device calls a block may be anything; those are tried that fit.
    let size_bytes = if block <= PIECE_BYTES { bdev.info().size_bytes() } else { 0 };
    let pieces = size_bytes.min(SIZE_BYTES) / PIECE_BYTES;
    let requests = if pieces > 0 { REQUESTS } else { 0 };
    let mut chance = Entropy::seeded(seed);
    let (mut sent, mut good) = (0, 0);
    let mut out = HashSet::new();
    let mut done = Completions::new();
    let start = Instant::now();
    while sent < requests || !out.is_empty() {
        cx.turn_ring();
        channel.poll(&mut cx.io, &mut done);
        for completion in done.drain(..) {
            assert!(out.remove(&completion.tag), "answered twice, or never asked");
            good += u64::from(completion.status.is_ok());
        }
        let slot = (0..DEPTH).find(|at| !out.iter().any(|tag: &Tag| tag.slot() == *at));
        if let Some(slot) = slot.filter(|_| sent < requests) {
            let op = match chance.below(5) {
                0 => IoOp::Read,
                1 => IoOp::Write,
                2 => IoOp::Flush,
                3 => IoOp::Discard,
                _ => IoOp::WriteZeroes,
            };
            let is_flush = op == IoOp::Flush;
            let request = IoRequest {
                offset_bytes: if is_flush { 0 } else { chance.below(pieces) * PIECE_BYTES },
                len_bytes: if is_flush { 0 } else { PIECE_BYTES },
                tag: Tag::new(slot, sent),
                segments_at: 0,
                segments_count: 0,
                op,
                flags: IoFlags::NONE,
            };
            let at = GuestAddr(u64::from(slot) * PIECE_BYTES);
            let segment =
                memory.translate(at, len_u32(usize_of(PIECE_BYTES)), &mut 0).expect("inside");
            let segments = if op.has_data() { vec![segment] } else { Vec::new() };
            cx.batch.single(request, &segments);
            if channel.submit(&mut cx.io, cx.batch.view()) == 1 {
                out.insert(request.tag);
                sent += 1;
            }
        }
        assert!(start.elapsed() < HANG, "{} of {sent} requests hang", out.len());
    }
    channel.close(&mut cx.io);
    Ok((u64::from(sent), good))
}

/// Lets things happen until `is_over`: most are harmless, the last ones are not.
fn disturb(seed: u64, control: &ModelControl, driver: &dyn NvmeControl, is_over: &AtomicBool) {
    let mut chance = Entropy::seeded(seed ^ 0x5eed);
    for _ in 0..chance.below(EVENTS) {
        std::thread::sleep(Duration::from_micros(chance.below(20_000)));
        if is_over.load(Ordering::Acquire) {
            return;
        }
        match chance.below(20) {
            0..3 => control.set_health(chance.next_u64().to_le_bytes()[0], 300),
            // Whether it answers, and what, is its business; that the answer comes is ours.
            3..6 => drop(driver.health()),
            6 | 7 => control.resize_namespace(1, chance.below(SIZE_BYTES >> 9)),
            8 => control.detach_namespace(2),
            9 => control.attach_namespace(namespace(2, 12)),
            10 => control.attach_namespace(namespace(3, 9)),
            11 => drop(driver.reset()),
            12 => control.protect_namespace(1, true),
            13 => control.set_aborts(Aborts::Refuse),
            14 => control.set_latency(Duration::from_micros(chance.below(300))),
            15 => control.fail(),
            16 => control.tell(DeviceNews::Error),
            17 => control.set_ready_stuck(true),
            18 => control.fail_dma_maps(Some((2, MapFailure::NoMemory))),
            _ => match chance.below(4) {
                0 => control.tell(DeviceNews::Requested),
                1 => control.vanish(true),
                2 => control.vanish(false),
                _ => control.set_reset_fails(true),
            },
        }
    }
}

fn kind_of(seed: u64) -> (ModelOptions, NvmeOptions) {
    let mut chance = Entropy::seeded(seed.wrapping_mul(3));
    let vectors = match chance.below(4) {
        0 => Vectors::Intx,
        1 => Vectors::None,
        _ => Vectors::MsiX(65),
    };
    let model = ModelOptions {
        sgls: if chance.below(2) == 0 { Sgls::None } else { Sgls::Bytes },
        doorbell_buffer: chance.below(2) == 0,
        vectors,
        mdts: [1, 3, 7][usize_of(chance.below(3))],
        ..ModelOptions::default()
    };
    let action = [ActionOnTimeout::Abort, ActionOnTimeout::Reset][usize_of(chance.below(2))];
    let options = NvmeOptions {
        ready_timeout_max: Duration::from_millis(500),
        io_queue_size: [2, 8, 64, 256][usize_of(chance.below(4))],
        action_on_timeout: action,
        ..options()
    };
    (model, options)
}

/// One liar's life.
pub(crate) fn meet(seed: u64) -> Life {
    let (model, options) = kind_of(seed);
    let namespaces = vec![namespace(1, 9), namespace(2, 12)];
    let (backing, control) =
        LyingBacking::start(&seed.to_le_bytes(), model, namespaces).expect("a model");
    let mut life = Life::default();
    match attach(backing, options, &[], Heard::default().listener()) {
        Err(reason) => eprintln!("seed {seed}: {reason}"),
        Ok(driver) => {
            life.attached = 1;
            let is_over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| disturb(seed, &control, &*driver, &is_over));
                for bdev in driver.namespaces().into_iter().filter_map(|ns| ns.bdev).take(4) {
                    let (sent, good) = load(&*bdev, seed).unwrap_or((0, 0));
                    life.sent += sent;
                    life.good += good;
                }
                is_over.store(true, Ordering::Release);
            });
            driver.detach();
            let seen = driver.info().counters;
            (life.resets, life.aborts) = (seen.resets, seen.aborts);
            (life.stale, life.events) = (seen.stale, seen.events);
        }
    }
    judge(seed, &control, &mut life);
    life
}

/// What must hold at the end.
fn judge(seed: u64, control: &ModelControl, life: &mut Life) {
    let told: Vec<(Lie, u64)> =
        LIES.iter().map(|kind| (*kind, control.lies(*kind))).filter(|it| it.1 > 0).collect();
    life.lies = told.iter().map(|(_, count)| count).sum();
    life.faults = control.count(Count::DmaFaults);
    assert_eq!(control.mapped_count(), 0, "something is still mapped");
    if life.lies == 0 {
        assert_eq!(control.complaint(), None, "an honest device");
    }
    let theft = control.counters().first_theft();
    assert_eq!(theft, None, "memory was taken away from a device that used it; lies: {told:?}");
    if let Some(fault) = control.counters().first_fault() {
        // A liar that said that it had stopped, or what its blocks are, may reach for memory that it has not got; its IOMMU
        // is there for that.
        eprintln!("seed {seed}: {} faults, the first: {fault}; lies: {told:?}", life.faults);
    }
}
