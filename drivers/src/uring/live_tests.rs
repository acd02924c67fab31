//! What needs a device that this machine does not have, or a kernel in a bad mood, made with the means at hand.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use ringmill_core::IoStatus;
use ringmill_core::bdev::Bdev as _;
use ringmill_core::bdev::conformance::{Suite, TestBed};
use ringmill_core::io::{IoFlags, IoOp};

use super::work::Stage;
use super::{CacheMode, UringBdev, UringOptions};

struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn loop_device(backing: &std::path::Path) -> Option<Loop> {
    let output = Command::new("losetup").args(["--find", "--show"]).arg(backing).output().ok()?;
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then(|| Loop(path.into()))
}

fn fact(bdev: &UringBdev, name: &str) -> u64 {
    let found = bdev.driver_facts().into_iter().find(|(n, _)| *n == name);
    found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

/// A loop device in the place of one that lost its queues for polling: the kernel refuses what it is asked to poll for. (The
/// guest lab has a device that polls.)
#[test]
fn plain_transfers_are_polled_for_and_go_the_ordinary_way_when_that_ends() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let Some(device) = loop_device(file.path()) else {
        eprintln!("SKIPPED plain_transfers_are_polled_for: no loop device");
        return;
    };
    let options = UringOptions { filename: device.0.clone(), ..UringOptions::default() };
    let refused = UringOptions { iopoll: true, ..options.clone() };
    let words = UringBdev::open("disk", &refused).unwrap_err().to_string();
    assert!(words.contains("io_poll") && words.contains("leave iopoll out"), "{words}");

    let mut bdev = UringBdev::open("disk", &options).unwrap();
    Arc::get_mut(&mut bdev.shared).unwrap().polled = true;
    let mut bed = TestBed::pinned(&bdev);
    let polled = |bed: &TestBed| bed.cx.io.polled.as_ref().map_or(0, |ring| ring.enters_count());
    let page = bed.segment(0, 0, 4096);
    for (op, flags, len) in [
        (IoOp::Flush, IoFlags::NONE, 0),
        (IoOp::Write, IoFlags::FUA, 4096),
        (IoOp::WriteZeroes, IoFlags::NONE, 4096),
        (IoOp::Discard, IoFlags::NONE, 4096),
    ] {
        let segments = if op.has_data() { &[page][..] } else { &[] };
        assert_eq!(bed.run(op, flags, 0, len, segments), IoStatus::Ok);
        assert_eq!(polled(&bed), 0, "{op:?} {flags:?} cannot be polled for");
    }
    // Several at once: each is refused, none of them by the guest's eyes.
    let tags: Vec<_> = (0..4)
        .map(|i| bed.offer(IoOp::Read, IoFlags::NONE, i * 4096, 4096, &[page]).unwrap())
        .collect();
    assert!(bed.must_poll(), "nobody but a poll finds the end of what is out there");
    let mut ended = 0;
    while bed.out_count() > 0 {
        ended += bed.turn(|tag, status| assert!(tags.contains(&tag) && status.is_ok()));
    }
    assert_eq!(ended, 4);
    let entered = polled(&bed);
    assert!(entered > 0 && !bed.must_poll());
    assert_eq!(bed.run(IoOp::Read, IoFlags::NONE, 0, 4096, &[page]), IoStatus::Ok);
    assert_eq!(polled(&bed), entered);
    bed.finish();
    Suite::new(Arc::new(bdev)).run();
}

#[test]
fn files_and_cached_devices_are_not_polled() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let options =
        UringOptions { filename: file.path().to_owned(), iopoll: true, ..UringOptions::default() };
    let words = UringBdev::open("disk", &options).unwrap_err().to_string();
    assert!(words.contains("only block devices can be polled"), "{words}");
    let Some(device) = loop_device(file.path()) else { return };
    let cached =
        UringOptions { filename: device.0.clone(), cache: CacheMode::WriteBack, ..options };
    let words = UringBdev::open("disk", &cached).unwrap_err().to_string();
    assert!(words.contains("cache = \"none\""), "{words}");
}

/// One end of a pipe in the file's place, and the other.
fn pipe_bdev(ours: impl FnOnce(OwnedFd, OwnedFd) -> (OwnedFd, OwnedFd)) -> (UringBdev, File) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let options = UringOptions {
        filename: file.path().to_owned(),
        cache: CacheMode::WriteBack,
        ..UringOptions::default()
    };
    let mut bdev = UringBdev::open("disk", &options).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (disk, other) = ours(reader, writer);
    Arc::get_mut(&mut bdev.shared).unwrap().file = File::from(disk);
    (bdev, File::from(other))
}

/// The pipe gives a part of what was asked for, again and again.
#[test]
fn short_transfers_of_a_live_channel_end_in_the_whole() {
    let (bdev, mut writer) = pipe_bdev(|reader, writer| (reader, writer));
    let whole: Vec<u8> = (0..512_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
    let data = std::thread::scope(|scope| {
        scope.spawn(|| {
            for part in whole.chunks(32) {
                writer.write_all(part).unwrap();
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let mut bed = TestBed::new(&bdev);
        let data = bed.read(0, 512).unwrap();
        bed.finish();
        data
    });
    assert!(data == whole);
    assert!(fact(&bdev, "continued") > 0, "all of it came at once");
}

/// A full pipe answers EAGAIN to writes that must not wait, until somebody reads.
#[test]
fn eagain_on_a_live_channel_is_tried_again() {
    let (mut bdev, mut reader) = pipe_bdev(|reader, writer| (writer, reader));
    Arc::get_mut(&mut bdev.shared).unwrap().write_flags = libc::RWF_NOWAIT;
    let capacity = rustix::pipe::fcntl_getpipe_size(&bdev.shared.file).unwrap();
    (&bdev.shared.file).write_all(&vec![1; capacity]).unwrap();
    let data: Vec<u8> = (0..4096_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
    let mut bed = TestBed::new(&bdev);
    let got = std::thread::scope(|scope| {
        let got = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            let mut got = vec![0; capacity + 4096];
            reader.read_exact(&mut got).unwrap();
            got
        });
        assert_eq!(bed.write(0, &data), IoStatus::Ok);
        got.join().unwrap()
    });
    assert!(got[capacity..] == data);
    assert!(fact(&bdev, "retried") > 1, "the pipe was never full");
    bed.finish();
}

/// The kernel reports a lost page once, and a stable write may be the one that hears of it.
#[test]
fn a_failed_stable_write_through_the_page_cache_fails_every_later_flush() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let filename = file.path().to_owned();
    let options = |cache| UringOptions { filename: filename.clone(), cache, ..Default::default() };
    let heard = |cache| {
        let bdev = UringBdev::open("disk", &options(cache)).unwrap();
        let result = |stage, stable, result| bdev.shared.sync_result(stage, stable, result);
        // A plain write that fails says nothing of other writes.
        assert_eq!(result(Stage::Transfer, false, -libc::EIO), -libc::EIO);
        assert_eq!(result(Stage::Sync, false, 0), 0);
        assert_eq!(result(Stage::Transfer, true, -libc::EIO), -libc::EIO);
        result(Stage::Sync, false, 0)
    };
    assert_eq!(heard(CacheMode::WriteBack), -libc::EIO);
    assert_eq!(heard(CacheMode::WriteThrough), -libc::EIO);
}
