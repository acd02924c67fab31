//! Requests whose memory is pinned and known to the ring: the whole suite on every kind of store, without copies, with one
//! entry to the kernel per pass. (Several guests on one ring: core's tests of the table, and the daemon's.)

mod media;

use std::path::Path;
use std::sync::Arc;

use media::{Loop, Zram, disk_dir, image, open, options, shm_dir, skipped};
use ringmill_core::IoStatus;
use ringmill_core::bdev::conformance::{Suite, TestBed};
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::mem::Segment;
use ringmill_drivers::uring::{CacheMode, UringBdev, UringOptions};

const SIZE_BYTES: u64 = 16 << 20;
const NONE: IoFlags = IoFlags::NONE;

/// Through the ring also where the medium is memory.
fn ring_only(path: &Path, cache: CacheMode) -> UringOptions {
    UringOptions { ring_only: true, ..options(path, cache) }
}

fn passes(bdev: Arc<UringBdev>) {
    let mut bed = TestBed::pinned(&*bdev);
    let page = bed.segment(0, 0, 4096);
    for (op, uses) in [(IoOp::Write, 1), (IoOp::Read, 2)] {
        assert_eq!(bed.run(op, NONE, 0, 4096, &[page]), IoStatus::Ok);
        assert_eq!(bed.fixed_uses_count(), uses, "{op:?} did not use its registered buffer");
    }
    bed.finish();
    Suite { pinned: true, ..Suite::new(bdev) }.run();
}

fn file_passes(path: &Path) {
    for cache in [CacheMode::None, CacheMode::WriteBack] {
        passes(open(&ring_only(path, cache)));
    }
}

#[test]
fn a_file_on_disk_passes() {
    let dir = disk_dir();
    file_passes(&image(&dir, SIZE_BYTES));
}

#[test]
fn a_file_on_tmpfs_passes() {
    let dir = shm_dir();
    file_passes(&image(&dir, SIZE_BYTES));
}

#[test]
fn a_loop_device_passes() {
    let dir = disk_dir();
    let backing = image(&dir, SIZE_BYTES);
    for sector_bytes in [512, 4096] {
        match Loop::new(&backing, sector_bytes) {
            Ok(device) => passes(open(&ring_only(&device.path, CacheMode::None))),
            Err(reason) => return skipped("pinned::a_loop_device_passes", &reason),
        }
    }
}

#[test]
fn a_zram_device_passes() {
    match Zram::new(SIZE_BYTES) {
        Ok(device) => passes(open(&ring_only(&device.path, CacheMode::None))),
        Err(reason) => skipped("pinned::a_zram_device_passes", &reason),
    }
}

/// 128 segments of a page each, none beside the next.
fn spread(bed: &TestBed, arena: usize) -> Vec<Segment> {
    (0..128).map(|i| bed.segment(arena, i * 8192, 4096)).collect()
}

#[test]
fn large_requests_of_many_segments_are_not_copied() {
    let dir = shm_dir();
    let bdev = open(&ring_only(&image(&dir, SIZE_BYTES), CacheMode::None));
    for pinned in [false, true] {
        let mut bed = if pinned { TestBed::pinned(&*bdev) } else { TestBed::new(&*bdev) };
        // 1 MiB in 128 segments of two pages, and half of it in pages.
        let wide: Vec<Segment> = (0..128).map(|i| bed.segment(1, i * 16384, 8192)).collect();
        let pages = spread(&bed, 2);
        for (segments, len) in [(&wide, 1 << 20), (&pages, 1 << 19)] {
            for (i, segment) in (0u8..).zip(segments) {
                segment.write_from(&vec![i ^ 0x5a; 8192]);
            }
            assert_eq!(bed.run(IoOp::Write, NONE, 1 << 20, len, segments), IoStatus::Ok);
            segments.iter().for_each(Segment::fill_zero);
            assert_eq!(bed.run(IoOp::Read, NONE, 1 << 20, len, segments), IoStatus::Ok);
            for (i, segment) in (0u8..).zip(segments) {
                let mut data = vec![0; segment.len_bytes() as usize];
                segment.read_into(&mut data);
                assert!(data.iter().all(|&byte| byte == i ^ 0x5a), "segment {i}");
            }
        }
        assert_eq!(bed.cx.io.bounces_count(), 0, "pinned: {pinned}");
        // Lists need Linux 6.15.
        let uses = bed.fixed_uses_count();
        assert!(uses == 0 || (pinned && uses >= 4), "pinned: {pinned}, {uses} uses");
        bed.finish();
    }
}

#[test]
fn a_pass_enters_the_kernel_once_or_not_at_all() {
    let dir = shm_dir();
    let bdev = open(&ring_only(&image(&dir, SIZE_BYTES), CacheMode::None));
    for pinned in [false, true] {
        let mut bed = if pinned { TestBed::pinned(&*bdev) } else { TestBed::new(&*bdev) };
        let enters = |bed: &TestBed| bed.cx.io.ring.as_ref().map_or(0, |ring| ring.enters_count());
        let segments: Vec<Segment> = (0..32).map(|i| bed.segment(i, 0, 4096)).collect();
        for round in 0..50 {
            let before = enters(&bed);
            for (i, segment) in (0..).zip(&segments) {
                let op = if (i + round) % 2 == 0 { IoOp::Read } else { IoOp::Write };
                let at = ((i * 37 + round) % 4000) * 4096;
                assert!(bed.offer(op, NONE, at, 4096, &[*segment]).is_some());
            }
            assert_eq!(enters(&bed), before, "requests wait for the end of the pass");
            let mut passes = 0;
            while bed.out_count() > 0 {
                bed.turn(|_, status| assert_eq!(status, IoStatus::Ok));
                passes += 1;
            }
            assert!((1..=passes).contains(&(enters(&bed) - before)), "{passes} passes");
        }
        // Nothing to send and nothing to hear: no system call, however often the reactor looks.
        let before = enters(&bed);
        for _ in 0..1000 {
            bed.turn(|_, _| {});
        }
        assert_eq!(enters(&bed), before);
        bed.finish();
    }
}
