//! What goes wrong below a running disk reaches the guest as the right error, and nothing hangs.

mod media;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use media::{Loop, Mount, disk_dir, image, open, options, peek, shm_dir, skipped};
use ringmill_core::IoStatus;
use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::TestBed;
use ringmill_core::io::{Completions, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::limits::{FAIR_PIECE_BYTES, FAIR_QUANTUM_BYTES};
use ringmill_core::mem::MemTable;
use ringmill_core::reactor::{ReactorCx, Ring};
use ringmill_core::units::GuestAddr;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::uring::{CacheMode, UringBdev};

const NONE: IoFlags = IoFlags::NONE;

fn fact(bdev: &UringBdev, name: &str) -> String {
    let found = bdev.driver_facts().into_iter().find(|(n, _)| *n == name);
    found.map(|(_, value)| value).unwrap_or_default()
}

fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn set_len(path: &Path, bytes: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn a_full_filesystem_is_no_space_and_reads_go_on() {
    let dir = disk_dir();
    let mount = match Mount::new(&dir, "tmpfs", "none", "size=4m") {
        Ok(mount) => mount,
        Err(reason) => return skipped("a_full_filesystem_is_no_space_and_reads_go_on", &reason),
    };
    let path = mount.path.join("disk.img");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let bdev = open(&options(&path, CacheMode::WriteBack));
    let mut bed = TestBed::new(&*bdev);
    let data = vec![7; 1 << 20];
    let ends: Vec<IoStatus> = (0..8).map(|i| bed.write(i << 20, &data)).collect();
    assert_eq!(ends[0], IoStatus::Ok);
    assert_eq!(ends[7], IoStatus::NoSpace, "{ends:?}");
    assert!(ends.iter().all(|s| [IoStatus::Ok, IoStatus::NoSpace].contains(s)), "{ends:?}");
    assert!(bed.read(0, 1 << 20).unwrap() == data);
    // Zeroes have to be written here, and cannot be.
    assert_eq!(bed.run(IoOp::WriteZeroes, NONE, 32 << 20, 8 << 20, &[]), IoStatus::NoSpace);
    // Freed space is usable again.
    assert_eq!(bed.run(IoOp::Discard, NONE, 0, 2 << 20, &[]), IoStatus::Ok);
    assert_eq!(bed.write(16 << 20, &data), IoStatus::Ok);
    bed.finish();
}

#[test]
fn a_file_that_shrinks_gives_errors_not_zeroes() {
    for cache in [CacheMode::None, CacheMode::WriteBack] {
        let dir = disk_dir();
        let path = image(&dir, 4 << 20);
        let bdev = open(&options(&path, cache));
        let mut bed = TestBed::new(&*bdev);
        assert_eq!(bed.write(0, &vec![1; 4 << 20]), IoStatus::Ok);
        set_len(&path, (1 << 20) + 100);
        assert_eq!(bed.read(2 << 20, 4096), Err(IoStatus::Range), "{cache:?} beyond the end");
        assert_eq!(bed.read(1 << 20, 4096), Err(IoStatus::Range), "{cache:?} at the odd end");
        assert_eq!(bed.read(512 << 10, 1 << 20), Err(IoStatus::Range), "{cache:?} across the end");
        assert_eq!(bed.read(0, 1 << 20), Ok(vec![1; 1 << 20]));
        // The size as it is now, rounded down.
        assert_eq!(bdev.rescan().unwrap(), (1 << 20) / 512);
        bed.finish();
    }
}

#[test]
fn a_broken_medium_is_an_error_of_the_medium() {
    let dir = disk_dir();
    let backing = image(&dir, 8 << 20);
    let device = match Loop::new(&backing, 512) {
        Ok(device) => device,
        Err(reason) => return skipped("a_broken_medium_is_an_error_of_the_medium", &reason),
    };
    let bdev = open(&options(&device.path, CacheMode::None));
    let mut bed = TestBed::new(&*bdev);
    assert_eq!(bed.write(4 << 20, &[1; 4096]), IoStatus::Ok);
    assert_eq!(bed.run(IoOp::Flush, NONE, 0, 0, &[]), IoStatus::Ok);
    set_len(&backing, 1 << 20);
    assert_eq!(bed.read(4 << 20, 4096), Err(IoStatus::Medium));
    assert!(bed.read(0, 4096).is_ok());
    bed.finish();
}

#[test]
fn requests_larger_than_the_kernel_takes_go_piece_by_piece() {
    const LEN: u64 = 1536 << 20;
    let dir = shm_dir();
    let path = image(&dir, 2 << 30);
    OpenOptions::new().write(true).open(&path).unwrap();
    let bdev = open(&options(&path, CacheMode::WriteBack));
    let mut bed = TestBed::new(&*bdev);
    assert_eq!(bed.write(0, &[1; 4096]), IoStatus::Ok);
    let tail = LEN - 4096;
    assert_eq!(bed.write(tail, &[2; 4096]), IoStatus::Ok);
    // The same memory again and again, but for the last segment.
    let mut segments = vec![bed.segment(1, 0, 4 << 20); usize::try_from(LEN >> 22).unwrap() - 1];
    segments.push(bed.segment(2, 0, 4 << 20));
    assert_eq!(bed.run(IoOp::Read, NONE, 0, LEN, &segments), IoStatus::Ok);
    let mut end = [0; 4096];
    bed.segment(2, (4 << 20) - 4096, 4096).read_into(&mut end);
    assert_eq!(end, [2; 4096]);
    assert_ne!(fact(&bdev, "continued"), "0");
    bed.finish();
}

#[test]
fn zeroes_stay_allocated_unless_the_guest_lets_go_of_them() {
    for (name, dir) in [("disk", disk_dir()), ("tmpfs", shm_dir())] {
        let path = image(&dir, 16 << 20);
        let bdev = open(&options(&path, CacheMode::WriteBack));
        let mut bed = TestBed::new(&*bdev);
        assert_eq!(bed.write(0, &vec![1; 4 << 20]), IoStatus::Ok);
        assert_eq!(bed.run(IoOp::Flush, NONE, 0, 0, &[]), IoStatus::Ok);
        assert_eq!(bed.run(IoOp::WriteZeroes, IoFlags::FUA, 0, 4 << 20, &[]), IoStatus::Ok);
        assert!(peek(&path, 0, 4 << 20).iter().all(|&b| b == 0));
        assert!(allocated_bytes(&path) >= 4 << 20, "{name}: {}", allocated_bytes(&path));
        let unmap = IoFlags::MAY_UNMAP;
        assert_eq!(bed.run(IoOp::WriteZeroes, unmap, 0, 2 << 20, &[]), IoStatus::Ok);
        assert!(allocated_bytes(&path) < 3 << 20, "{name}: {}", allocated_bytes(&path));
        assert_eq!(bed.run(IoOp::Discard, NONE, 2 << 20, 2 << 20, &[]), IoStatus::Ok);
        assert!(allocated_bytes(&path) < 1 << 20, "{name}: {}", allocated_bytes(&path));
        let missing = if name == "tmpfs" { "zero-range" } else { "" };
        assert_eq!(fact(&bdev, "missing"), missing);
        bed.finish();
    }
}

#[test]
fn a_filesystem_that_knows_no_holes_still_zeroes() {
    let dir = disk_dir();
    let mount = match Mount::new(&dir, "ramfs", "none", "mode=755") {
        Ok(mount) => mount,
        Err(reason) => return skipped("a_filesystem_that_knows_no_holes_still_zeroes", &reason),
    };
    let path = mount.path.join("disk.img");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let bdev = open(&options(&path, CacheMode::WriteBack));
    assert!(!bdev.info().geometry().discard);
    let mut bed = TestBed::new(&*bdev);
    assert_eq!(bed.write(0, &vec![1; 4 << 20]), IoStatus::Ok);
    let flags = IoFlags::MAY_UNMAP.with(IoFlags::FUA);
    assert_eq!(bed.run(IoOp::WriteZeroes, flags, 512, 3 << 20, &[]), IoStatus::Ok);
    let disk = peek(&path, 0, 4 << 20);
    let end = 512 + (3 << 20);
    assert!(disk[..512].iter().chain(&disk[end..]).all(|&b| b == 1));
    assert!(disk[512..end].iter().all(|&b| b == 0));
    assert_eq!(bed.run(IoOp::Discard, NONE, 0, 4096, &[]), IoStatus::Unsupported);
    bed.finish();
}

/// Flushes that a loop device has done (`Documentation/block/stat.rst`, field 16).
fn flushes_count(device: &Loop) -> u64 {
    let stat = fs::read_to_string(format!("/sys/block/{}/stat", device.name())).unwrap();
    stat.split_whitespace().nth(15).unwrap().parse().unwrap()
}

#[test]
fn flushes_and_stable_writes_reach_the_device() {
    let dir = disk_dir();
    let device = match Loop::new(&image(&dir, 8 << 20), 512) {
        Ok(device) => device,
        Err(reason) => return skipped("flushes_and_stable_writes_reach_the_device", &reason),
    };
    for cache in [CacheMode::None, CacheMode::WriteBack, CacheMode::WriteThrough] {
        let bdev = open(&options(&device.path, cache));
        let mut bed = TestBed::new(&*bdev);
        let segment = bed.segment(0, 0, 4096);
        let mut before = flushes_count(&device);
        let mut raised = |op: IoOp, flags: IoFlags, what: &str, wanted: bool| {
            let (len, segments) = match op {
                IoOp::Flush => (0, [].as_slice()),
                IoOp::WriteZeroes => (4096, [].as_slice()),
                _ => (4096, std::slice::from_ref(&segment)),
            };
            for _ in 0..4 {
                assert_eq!(bed.run(op, flags, 4096, len, segments), IoStatus::Ok);
            }
            let now = flushes_count(&device);
            assert_eq!(now >= before + 4, wanted, "{cache:?} {what}: {before} to {now} flushes");
            before = now;
        };
        let stable = cache == CacheMode::WriteThrough;
        raised(IoOp::Write, NONE, "write", stable);
        raised(IoOp::WriteZeroes, NONE, "write-zeroes", stable);
        raised(IoOp::Flush, NONE, "flush", true);
        raised(IoOp::Write, IoFlags::FUA, "write with FUA", true);
        raised(IoOp::WriteZeroes, IoFlags::FUA, "write-zeroes with FUA", true);
        bed.finish();
    }
}

#[test]
fn a_channel_under_load_tells_how_long_its_oldest_request_waits() {
    let dir = disk_dir();
    let bdev = open(&options(&image(&dir, 1 << 20), CacheMode::None));
    let mut bed = TestBed::new(&*bdev);
    assert_eq!(bdev.oldest_inflight_ns(), 0);
    let segment = bed.segment(0, 0, 4096);
    assert!(bed.offer(IoOp::Read, NONE, 0, 4096, &[segment]).is_some());
    std::thread::sleep(std::time::Duration::from_millis(20));
    let age_ns = bdev.oldest_inflight_ns();
    assert!((15_000_000..10_000_000_000).contains(&age_ns), "{age_ns}");
    bed.drain();
    assert_eq!(bdev.oldest_inflight_ns(), 0);
    bed.finish();
}

#[test]
fn a_ram_disk_starts_empty_grows_as_used_and_gives_memory_back() {
    let options = MallocOptions { blocks_count: 1 << 30, block_bytes: 512, uuid: None };
    let bdev = MallocBdev::new("ram", &options).unwrap();
    let mut bed = TestBed::new(&bdev);
    assert_eq!(bdev.allocated_bytes().unwrap(), 0);
    assert_eq!(bed.read(1 << 38, 4096), Ok(vec![0; 4096]));
    let start = 300 << 30;
    assert_eq!(bed.write(start, &vec![1; 4 << 20]), IoStatus::Ok);
    let used = bdev.allocated_bytes().unwrap();
    assert!(used >= 4 << 20, "{used}");
    assert_eq!(bed.run(IoOp::Discard, NONE, start + 512, (4 << 20) - 1024, &[]), IoStatus::Ok);
    let left = bdev.allocated_bytes().unwrap();
    assert!(left <= 64 << 10, "{left} of {used} bytes are still there");
    let disk = bed.read(start, 4 << 20).unwrap();
    assert!(disk[..512].iter().chain(&disk[(4 << 20) - 512..]).all(|&b| b == 1));
    assert!(disk[512..(4 << 20) - 512].iter().all(|&b| b == 0));
    bed.finish();
}

/// Beside a queue that waits for little, no pass queues more than a quantum and a piece of a long transfer, the bytes of
/// each pass add up to a quantum in the mean, and the data is right.
#[test]
fn long_transfers_go_in_pieces_beside_a_light_queue() {
    let dir = shm_dir();
    let path = image(&dir, 16 << 20);
    let bdev = open(&options(&path, CacheMode::WriteBack));
    let data: Vec<u8> =
        (0..4u32 << 20).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let mut bed = TestBed::new(&*bdev);
    assert_eq!(bed.write(0, &data), IoStatus::Ok);
    bed.finish();
    let mut ring = Ring::new(&[]).unwrap();
    ring.enable().unwrap();
    let mut cx = ReactorCx::new(Some(ring)).unwrap();
    let mut channel = bdev.open_channel(None).unwrap()(&mut cx.io).unwrap();
    let memory = MemTable::anonymous(GuestAddr(0), 4 << 20).unwrap();
    let (mut hog, light) = (cx.io.fair.join(), cx.io.fair.join());
    cx.io.fair.served_all(&light, 0);
    // What its worker would have counted by then.
    cx.io.fair.started(&mut hog, 4 << 20);
    let (mut passes, mut taken, mut done) = (0u64, 0u64, Completions::new());
    let began = std::time::Instant::now();
    while done.len() < 4 {
        assert!(began.elapsed().as_secs() < 60, "no end");
        cx.io.fair.begin(&mut hog, 1);
        if taken < 4 && channel.room(&cx.io).bytes > 0 {
            let segment = memory.translate(GuestAddr(taken << 20), 1 << 20, &mut 0).unwrap();
            let (offset_bytes, len_bytes) = (taken << 20, 1 << 20);
            let tag = Tag::new(u16::try_from(taken).unwrap(), 0);
            let (op, flags) = (IoOp::Read, NONE);
            let request = IoRequest {
                offset_bytes,
                len_bytes,
                tag,
                segments_at: 0,
                segments_count: 0,
                op,
                flags,
            };
            cx.batch.single(request, &[segment]);
            taken += channel.submit(&mut cx.io, cx.batch.view()) as u64;
        }
        channel.poll(&mut cx.io, &mut done);
        cx.io.fair.end(&mut hog);
        cx.turn_ring();
        passes += 1;
    }
    // 4 MiB by a quantum and pass; the kernel may need longer, but never less.
    assert!(passes >= (4 << 20) / FAIR_QUANTUM_BYTES, "{passes} passes");
    let pieces: u64 = fact(&bdev, "continued").parse::<u64>().unwrap() + 4;
    assert!(pieces >= (4 << 20) / FAIR_PIECE_BYTES, "{pieces} pieces");
    let mut got = vec![0; data.len()];
    memory.translate(GuestAddr(0), 4 << 20, &mut 0).unwrap().read_into(&mut got);
    assert!(got == data, "the pieces do not add up");
    channel.close(&mut cx.io);
}
