//! The NVMe driver on devices that lie: no panic, no hang, no request lost or answered twice.
//!
//! `RINGMILL_LIES=first..end` has other seeds lie.

mod nvme;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme::{Heard, SIZE_BYTES, namespace, options};
use ringmill_core::bdev::{Bdev, BdevError};
use ringmill_core::io::{Completions, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::mem::{Mapping, MemTable, RegionSpec};
use ringmill_core::reactor::{Entropy, ReactorCx, Ring};
use ringmill_core::units::{GuestAddr, len_u32, usize_of};
use ringmill_drivers::model::{LyingBacking, ModelOptions, Sgls};
use ringmill_drivers::nvme::attach;

const REQUESTS: u16 = 300;
const DEPTH: u16 = 32;
const PIECE_BYTES: u64 = 8192;

/// Longer than all time-outs and resets of the driver together.
const HANG: Duration = Duration::from_secs(60);

/// Sends requests until all are answered; how many went well.
fn load(bdev: &dyn Bdev, seed: u64) -> Result<u32, BdevError> {
    let mut ring = Ring::new(&[]).expect("io_uring");
    ring.enable().expect("an enabled ring");
    let mut cx = ReactorCx::new(Some(ring)).expect("memory for a context");
    let mut channel = bdev.open_channel(None)?(&mut cx.io)?;
    let len_bytes = PIECE_BYTES * u64::from(DEPTH);
    let mapping = Arc::new(Mapping::pool(usize_of(len_bytes)).expect("memory"));
    let mut memory = MemTable::new();
    let spec = RegionSpec { guest_addr: GuestAddr(0), len_bytes, user_addr: 0 };
    memory.add(spec, mapping).expect("a region");
    if let Some(domain) = bdev.dma() {
        memory.map_into(&domain, || true).expect("memory that the device reaches");
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
            good += u32::from(completion.status.is_ok());
        }
        let slot = (0..DEPTH).find(|at| !out.iter().any(|tag: &Tag| tag.slot() == *at));
        if let Some(slot) = slot.filter(|_| sent < requests) {
            let op = match chance.below(4) {
                0 => IoOp::Read,
                1 => IoOp::Write,
                2 => IoOp::Flush,
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
        assert!(start.elapsed() < HANG, "seed {seed}: {} of {sent} requests hang", out.len());
    }
    channel.close(&mut cx.io);
    Ok(good)
}

/// One liar's life: attached if it lets us, loaded, let go.
fn meet(seed: u64) -> (bool, u32) {
    let sgls = if seed.is_multiple_of(2) { Sgls::None } else { Sgls::Bytes };
    let model = ModelOptions { sgls, ..ModelOptions::default() };
    let namespaces = vec![namespace(1, 9), namespace(2, 12)];
    let (backing, control) =
        LyingBacking::start(&seed.to_le_bytes(), model, namespaces).expect("a model");
    let mut good = 0;
    let attached = attach(backing, options(), &[], Heard::default().listener());
    let is_attached = attached.is_ok();
    if let Err(reason) = &attached {
        eprintln!("seed {seed}: {reason}");
    }
    if let Ok(driver) = attached {
        for bdev in driver.namespaces().into_iter().filter_map(|ns| ns.bdev).take(4) {
            good += load(&*bdev, seed).unwrap_or(0);
        }
        driver.detach();
    }
    // A liar that said that it had stopped may reach for memory that was taken away; its IOMMU is there for that.
    assert_eq!(control.mapped_count(), 0, "seed {seed}");
    (is_attached, good)
}

#[test]
fn liars_are_survived() {
    let range = std::env::var("RINGMILL_LIES").ok();
    let range = range.as_deref().and_then(|text| text.split_once(".."));
    let number = |text: &str| text.parse::<u64>().ok();
    let seeds = range.and_then(|(first, end)| Some(number(first)?..number(end)?)).unwrap_or(0..16);
    let (mut attached, mut good) = (0, 0);
    for seed in seeds.clone() {
        let start = Instant::now();
        let (is_attached, answered) = meet(seed);
        eprintln!("seed {seed}: attached {is_attached}, {answered} good, {:?}", start.elapsed());
        attached += u64::from(is_attached);
        good += u64::from(answered);
    }
    // Lies are meant to get past the door.
    assert!(attached * 4 >= seeds.end - seeds.start, "{attached} attached");
    assert!(good > 0);
}
