//! Disks with fewer device queues than reactors: the suite, and reactors that meet at one owner.

mod media;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use media::{disk_dir, image, open, options, shm_dir};
use ringmill_core::IoStatus;
use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::{Suite, TestBed};
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::reactor::{Entropy, IdlePolicy, Message, ReactorConfig, ReactorHandle, spawn};
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::uring::CacheMode;

const SIZE_BYTES: u64 = 16 << 20;

/// A reactor that sleeps as soon as it can: every request of a slow tester has to wake it.
fn reactor() -> ReactorHandle {
    let idle = IdlePolicy::Adaptive { spin_ns: 20_000 };
    spawn(&ReactorConfig { core: None, idle, io_wq_cpus: Vec::new() }).expect("a reactor")
}

fn crossed(inner: Arc<dyn Bdev>, owner: &ReactorHandle) -> Arc<CrossBdev> {
    Arc::new(CrossBdev::new(inner, vec![owner.clone()]).expect("one owner"))
}

fn malloc(block_bytes: u32) -> Arc<MallocBdev> {
    let blocks_count = SIZE_BYTES / u64::from(block_bytes);
    let options = MallocOptions { blocks_count, block_bytes, uuid: None };
    Arc::new(MallocBdev::new("malloc", &options).expect("memory"))
}

fn fact(bdev: &dyn Bdev, name: &str) -> u64 {
    let facts = bdev.driver_facts();
    let (_, value) = facts.iter().find(|(n, _)| *n == name).expect("the fact");
    value.parse().expect("a number")
}

#[test]
fn a_crossed_null_disk_passes() {
    let owner = reactor();
    let options = NullOptions { blocks_count: 1 << 20, block_bytes: 512, uuid: None };
    let null = Arc::new(NullBdev::new("null", &options).unwrap());
    let bdev = crossed(Arc::<NullBdev>::clone(&null), &owner);
    let suite = Suite::new(Arc::<CrossBdev>::clone(&bdev));
    suite.run_without_data();
    suite.resize(4096, || null.set_size(4096).unwrap());
    assert!(fact(&*bdev, "crossed_requests") > 2000);
    drop((suite, bdev));
    assert!(owner.pollers().is_empty(), "the port goes with the disk");
    owner.stop();
}

#[test]
fn a_crossed_ram_disk_passes() {
    let owner = reactor();
    for block_bytes in [512, 4096] {
        Suite::new(crossed(malloc(block_bytes), &owner)).run();
    }
    owner.stop();
}

fn file_passes(path: &Path, cache: CacheMode) {
    let owner = reactor();
    for block_bytes in [None, Some(4096)] {
        let options = ringmill_drivers::uring::UringOptions { block_bytes, ..options(path, cache) };
        let bdev = crossed(open(&options), &owner);
        Suite::new(Arc::<CrossBdev>::clone(&bdev)).run();
    }
    // Bounce buffers and block locks are the owner's, and its ring does the work.
    assert!(owner.stats().bounces_count > 0 || cache != CacheMode::None, "O_DIRECT bounces");
    assert!(owner.stats().ring_enters_count > 0);
    owner.stop();
}

#[test]
fn a_crossed_file_on_disk_passes() {
    let dir = disk_dir();
    file_passes(&image(&dir, SIZE_BYTES), CacheMode::None);
}

#[test]
fn a_crossed_file_on_tmpfs_passes_through_the_cache() {
    let dir = shm_dir();
    file_passes(&image(&dir, SIZE_BYTES), CacheMode::WriteBack);
}

#[test]
fn two_device_queues_pass_as_well() {
    let owners = vec![reactor(), reactor()];
    let inner = malloc(512);
    let bdev = CrossBdev::new(inner, owners.clone()).unwrap();
    Suite::new(Arc::new(bdev)).run();
    owners.iter().for_each(ReactorHandle::stop);
}

/// Stamped blocks of one side: which block, which side, which round.
fn stamp(block: u64, side: u64, round: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    let words = [block, side, round, block ^ side << 32 ^ round << 48];
    for (at, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&words[at % 4].wrapping_add(at as u64 / 4).to_le_bytes());
    }
    bytes
}

/// Writes and reads its own blocks, some tens at a time, and knows what each must contain. The bed sees to it that every
/// request is answered once.
fn hammer(bdev: &dyn Bdev, side: u64, sides: u64, stop: &AtomicBool) -> u64 {
    let mut bed = TestBed::new(bdev);
    let mut dice = Entropy::seeded(side);
    let blocks: Vec<u64> = (0..SIZE_BYTES / 4096).filter(|b| b % sides == side).collect();
    let mut rounds = vec![0u64; blocks.len()];
    let (mut ended, mut checked) = (0, 0);
    let started = Instant::now();
    let mut out: Vec<(ringmill_core::io::Tag, usize, usize, bool)> = Vec::new();
    loop {
        // However slow the disk is today, enough was read back.
        let is_over = stop.load(Ordering::Relaxed) && checked > 30 && ended > 100;
        if is_over && out.is_empty() {
            break;
        }
        let arena = (0..48).find(|a| out.iter().all(|(_, used, ..)| used != a));
        let at = usize::try_from(dice.below(blocks.len() as u64)).unwrap();
        let busy = out.iter().any(|&(_, _, other, _)| other == at);
        if let (Some(arena), false, false) = (arena, busy, is_over) {
            let write = rounds[at] == 0 || dice.below(2) == 0;
            let segment = bed.segment(arena, 0, 4096);
            // In one, two or seven pieces, so that some lists travel by themselves.
            let pieces = [1u32, 2, 7][usize::try_from(dice.below(3)).unwrap()];
            let mut segments = Vec::new();
            for piece in 0..pieces {
                let (from, to) =
                    (4096 / 512 * piece / pieces * 512, 4096 / 512 * (piece + 1) / pieces * 512);
                segments.push(segment.sub(from, to - from));
            }
            let next = rounds[at] + u64::from(write);
            if write {
                segment.write_from(&stamp(blocks[at], side, next));
            } else {
                segment.fill_zero();
            }
            let op = if write { IoOp::Write } else { IoOp::Read };
            if let Some(tag) = bed.offer(op, IoFlags::NONE, blocks[at] * 4096, 4096, &segments) {
                rounds[at] = next;
                out.push((tag, arena, at, write));
            }
        }
        let mut landed = Vec::new();
        bed.turn(|tag, status| landed.push((tag, status)));
        for (tag, status) in landed {
            assert_eq!(status, IoStatus::Ok);
            let (_, arena, at, write) =
                out.swap_remove(out.iter().position(|(t, ..)| *t == tag).expect("a known tag"));
            ended += 1;
            if !write {
                let mut bytes = [0; 4096];
                bed.segment(arena, 0, 4096).read_into(&mut bytes);
                assert!(bytes == stamp(blocks[at], side, rounds[at]), "block {}", blocks[at]);
                checked += 1;
            }
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{} requests are lost", out.len());
    }
    bed.finish();
    ended
}

fn hammer_from_two_sides(inner: Arc<dyn Bdev>) {
    let owner = reactor();
    let bdev = crossed(inner, &owner);
    let stop = Arc::new(AtomicBool::new(false));
    let sides = [0, 1].map(|side| {
        let (bdev, stop) = (Arc::clone(&bdev), Arc::clone(&stop));
        thread::spawn(move || hammer(&*bdev, side, 2, &stop))
    });
    thread::sleep(Duration::from_millis(1500));
    stop.store(true, Ordering::Relaxed);
    let ended = sides.map(|side| side.join().expect("a side without failures"));
    assert_eq!(fact(&*bdev, "crossed_requests"), ended.iter().sum::<u64>());
    eprintln!("{ended:?} requests in {} batches", fact(&*bdev, "crossed_batches"));
    drop(bdev);
    owner.stop();
}

#[test]
fn two_sides_hammer_a_ram_disk_through_one_owner() {
    hammer_from_two_sides(malloc(512));
}

#[test]
fn two_sides_hammer_a_file_through_one_owner() {
    let dir = disk_dir();
    hammer_from_two_sides(open(&options(&image(&dir, SIZE_BYTES), CacheMode::None)));
}

#[test]
fn a_disk_that_goes_is_closed_before_its_name_is_free() {
    let (owner, dir) = (reactor(), disk_dir());
    let path = image(&dir, SIZE_BYTES);
    for _ in 0..5 {
        let bdev = crossed(open(&options(&path, CacheMode::None)), &owner);
        let mut bed = TestBed::new(&*bdev);
        assert_eq!(bed.write(0, &[7; 4096]), IoStatus::Ok);
        bed.finish();
        drop(bdev);
        // The image's lock sits on the file description that the owner's channel used: it must be gone.
        let again =
            ringmill_drivers::uring::UringBdev::open("disk", &options(&path, CacheMode::None));
        assert!(again.is_ok(), "{}", again.unwrap_err());
    }
    // A busy owner is waited for.
    let bdev = crossed(malloc(512), &owner);
    TestBed::new(&*bdev).finish();
    let busy: Message = Box::new(|_| thread::sleep(Duration::from_millis(300)));
    assert!(owner.send(busy).is_ok());
    drop(bdev);
    assert!(owner.pollers().is_empty());
    owner.stop();
}
