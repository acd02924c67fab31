//! An independent vhost-user client on the real daemon: what is written is read, on every kind of disk.
//!
//! The client is the `virtio-driver` crate. Every sector's contents are known from a stamp, so a read is checked
//! against the last write wherever it went. `RINGMILL_TEST_SEED` replays a failed random test.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;
#[path = "support/model.rs"]
mod model;

use std::path::Path;
use std::time::{Duration, Instant};

use daemon::Daemon;
use media::{LoopDevice, MIB, Zram, set_len, skip};
use model::{Exercise, Op, SECTOR_BYTES, connect, seed};
use serde_json::json;
use tempfile::TempDir;

const DISK_BYTES: u64 = 64 * MIB;
const SLOT_BYTES: usize = 1 << 20;

/// Sectors of a request: all powers of two from 512 B to 1 MiB, and odd multiples of 512 between them.
const SIZES: [u64; 22] =
    [1, 2, 3, 4, 5, 7, 8, 9, 16, 27, 32, 64, 65, 128, 255, 256, 333, 512, 1023, 1024, 2047, 2048];

/// Bytes written and read back per size, queue count and depth.
const VOLUME_BYTES: u64 = 2 * MIB;

/// Every size, depth and number of queues: written to random places, then read back through other queues.
fn all_sizes(name: &str, socket: &Path) {
    let started = Instant::now();
    let mut stamps = None;
    for queues in 1..=4 {
        for depth in [1, 8, 32, 128] {
            let client = connect(socket, queues, depth, SLOT_BYTES);
            assert_eq!(client.capacity_bytes(), DISK_BYTES, "{name}");
            let seed = seed(0x517e5) ^ (queues * 1000 + depth) as u64;
            let mut exercise = match stamps.take() {
                None => Exercise::new(client, depth, seed),
                Some(stamps) => Exercise::with_stamps(client, depth, seed, stamps),
            };
            for sectors in SIZES {
                let most = VOLUME_BYTES / (sectors * SECTOR_BYTES);
                let count = most.min((queues * depth) as u64 + 3).max(2);
                write_then_read(&mut exercise, sectors, count);
            }
            stamps = Some(exercise.into_stamps());
        }
    }
    let client = connect(socket, 2, 8, SLOT_BYTES);
    Exercise::with_stamps(client, 8, 0, stamps.expect("exercised")).verify();
    eprintln!("{name}: {:.1} s", started.elapsed().as_secs_f64());
}

fn write_then_read(exercise: &mut Exercise, sectors: u64, count: u64) {
    let queues = exercise.client.queues_count();
    let mut places = Vec::new();
    for op in [Op::Write, Op::Read] {
        let mut at = 0;
        while at < count {
            let index = usize::try_from(at).unwrap();
            if op == Op::Write && places.len() == index {
                places.push(exercise.entropy.below(exercise.sectors_count() - sectors + 1));
            }
            // The read takes another queue than the write did.
            let queue = (index + usize::from(op == Op::Read)) % queues;
            if exercise.begin(op, queue, places[index], sectors) {
                at += 1;
            } else {
                exercise.kick();
                exercise.poll();
                if op == Op::Write && exercise.inflight_count() > 0 {
                    // The place may be taken by a request in flight: choose another.
                    places[index] = exercise.entropy.below(exercise.sectors_count() - sectors + 1);
                }
            }
        }
        exercise.drain();
    }
}

/// Reads, writes, flushes, discards and zeroes at random against the twin, from several queues at once.
fn random_mix(socket: &Path, default_seed: u64) {
    for (queues, depth) in [(1, 128), (4, 32)] {
        let seed = seed(default_seed);
        let mut first = Exercise::new(connect(socket, queues, depth, SLOT_BYTES), depth, seed);
        // The disk is not fresh: start from known contents.
        zero_everything(&mut first);
        let span = first.sectors_count();
        first.random_rounds(3_000, span, 256);
        // A small span makes neighbours meet.
        first.random_rounds(3_000, 512, 16);
        first.verify();
    }
}

fn zero_everything(exercise: &mut Exercise) {
    let sectors = exercise.sectors_count();
    exercise.one(Op::WriteZeroes(false), 0, sectors);
}

/// Discard and write-zeroes of every alignment: zeroes inside, neighbours untouched.
fn ranges(socket: &Path) {
    let mut exercise = Exercise::new(connect(socket, 1, 8, SLOT_BYTES), 8, 1);
    zero_everything(&mut exercise);
    exercise.one(Op::Write, 0, 2048);
    for (lba, sectors) in [(8, 8), (24, 1), (33, 3), (47, 18), (79, 1), (96, 64), (1001, 511)] {
        for op in [Op::WriteZeroes(true), Op::WriteZeroes(false), Op::Discard] {
            exercise.one(Op::Write, lba - 8, sectors + 16);
            exercise.one(op, lba, sectors);
            // Zeroes inside (nothing is promised of a discard); the neighbours as they were.
            exercise.one(Op::Read, lba - 8, sectors + 16);
            exercise.one(Op::Write, lba, 1);
            exercise.one(Op::Read, lba - 8, sectors + 16);
        }
    }
    exercise.one(Op::Flush, 0, 0);
    exercise.verify();
    // Across the end and beyond it: refused, whatever the operation, and the last sector is still there.
    let end = exercise.sectors_count();
    exercise.one(Op::Write, end - 1, 1);
    for (lba, sectors) in [(end - 1, 2), (end, 1), (end + 7, 8), (1 << 40, 1)] {
        for op in [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes(true)] {
            assert!(
                !exercise.succeeds(op, lba, sectors),
                "{op:?} of {sectors} sectors at {lba} went through"
            );
        }
    }
    exercise.one(Op::Read, end - 1, 1);
}

/// Two queues on two reactors write neighbouring sectors of the same 4 KiB blocks.
fn neighbours(name: &str, socket: &Path) {
    let client = connect(socket, 2, 32, 4096);
    let mut exercise = Exercise::new(client, 32, seed(0x4e19));
    let span = 64;
    exercise.one(Op::WriteZeroes(false), 0, span);
    // A read-modify-write that is flushed takes milliseconds on some machines.
    let end = Instant::now() + Duration::from_secs(3);
    while exercise.completed_count < 2_000 && Instant::now() < end {
        for _ in 0..4 {
            for queue in 0..2_usize {
                // Queue 0 writes even sectors, queue 1 odd ones.
                let lba = 2 * exercise.entropy.below(span / 2) + queue as u64;
                exercise.begin(Op::Write, queue, lba, 1);
            }
        }
        exercise.kick();
        exercise.poll();
    }
    exercise.drain();
    for lba in 0..span {
        exercise.one(Op::Read, lba, 1);
    }
    exercise.one(Op::Read, 0, 8);
    eprintln!("{name}: neighbours kept apart over {} requests", exercise.completed_count);
}

/// All of the above on one disk.
fn whole_suite(name: &str, daemon: &Daemon, socket: &Path) {
    all_sizes(name, socket);
    random_mix(socket, 0x5eed);
    ranges(socket);
    let errors = daemon.stderr();
    assert!(!errors.contains("ERROR"), "{name}: {errors}");
}

#[test]
fn malloc_returns_what_was_written() {
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_malloc("ram", DISK_BYTES, 512);
    whole_suite("malloc", &daemon, &socket);
    daemon.stop();
}

#[test]
fn malloc_with_large_blocks_takes_small_requests() {
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_malloc("ram4k", DISK_BYTES, 4096);
    random_mix(&socket, 0x4096);
    ranges(&socket);
    neighbours("malloc with 4 KiB blocks", &socket);
    daemon.stop();
}

#[test]
fn a_file_on_disk_returns_what_was_written() {
    let images = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("the target directory");
    let image = images.path().join("disk.img");
    set_len(&image, DISK_BYTES);
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_uring("file", &image, &json!({}));
    whole_suite("a file on disk", &daemon, &socket);
    daemon.stop();
}

#[test]
fn a_file_in_memory_returns_what_was_written() {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        return skip("a file in /dev/shm", "there is none");
    }
    let images = TempDir::new_in(shm).expect("/dev/shm is writable");
    let image = images.path().join("disk.img");
    set_len(&image, DISK_BYTES);
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_uring("shm", &image, &json!({}));
    whole_suite("a file in memory", &daemon, &socket);
    daemon.stop();
}

#[test]
fn a_file_with_large_blocks_takes_small_requests_in_every_cache_mode() {
    let images = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("the target directory");
    let daemon = Daemon::with(["-m", "3"]);
    for cache in ["none", "writeback", "writethrough"] {
        let image = images.path().join(cache);
        set_len(&image, DISK_BYTES);
        let socket = daemon.add_uring(cache, &image, &json!({"block_size": 4096, "cache": cache}));
        random_mix(&socket, 0xcac4e);
        ranges(&socket);
        neighbours(&format!("a file with 4 KiB blocks, cache {cache}"), &socket);
    }
    daemon.stop();
}

#[test]
fn a_zram_device_returns_what_was_written() {
    let zram = match Zram::new(DISK_BYTES) {
        Ok(zram) => zram,
        Err(why) => return skip("disks on zram", &why),
    };
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_uring("zram", &zram.path, &json!({}));
    let client = connect(&socket, 1, 1, 4096);
    assert_eq!(client.block_bytes(), 4096, "zram's block is the disk's");
    drop(client);
    whole_suite("zram", &daemon, &socket);
    neighbours("zram", &socket);
    daemon.stop();
}

#[test]
fn a_loop_device_returns_what_was_written() {
    let images = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("the target directory");
    let image = images.path().join("loop.img");
    set_len(&image, DISK_BYTES);
    let device = match LoopDevice::on(&image) {
        Ok(device) => device,
        Err(why) => return skip("disks on a loop device", &why),
    };
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_uring("loop", &device.path, &json!({}));
    whole_suite("a loop device", &daemon, &socket);
    daemon.stop();
}
