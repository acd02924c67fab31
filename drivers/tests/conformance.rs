//! Every driver passes core's suite, on every kind of backing store that this machine has.

mod media;

use std::sync::Arc;

use media::{Loop, Zram, disk_dir, image, open, options, shm_dir, skipped};
use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::Suite;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::uring::{CacheMode, UringOptions};

const SIZE_BYTES: u64 = 16 << 20;

#[test]
fn null_has_bounds_and_completes_once() {
    for block_bytes in [512, 4096] {
        let options = NullOptions { blocks_count: 1 << 20, block_bytes, uuid: None };
        let bdev = Arc::new(NullBdev::new("null", &options).unwrap());
        let suite = Suite::new(Arc::clone(&bdev) as Arc<dyn Bdev>);
        suite.run_without_data();
        suite.resize(4096, || bdev.set_size(4096).unwrap());
        suite.resize(1 << 30, || bdev.set_size(1 << 30).unwrap());
    }
}

#[test]
fn malloc_passes() {
    for block_bytes in [512, 4096] {
        let blocks_count = SIZE_BYTES / u64::from(block_bytes);
        let options = MallocOptions { blocks_count, block_bytes, uuid: None };
        let bdev = MallocBdev::new("malloc", &options).unwrap();
        Suite::new(Arc::new(bdev)).run();
    }
}

fn file_passes(path: &std::path::Path, cache: CacheMode) {
    for block_bytes in [None, Some(4096)] {
        let options = UringOptions { block_bytes, ..options(path, cache) };
        let bdev = open(&options);
        let info = bdev.info();
        eprintln!("{}: {:?} {:?}", path.display(), info.geometry(), bdev.driver_facts());
        assert!(info.geometry().discard);
        assert_eq!(info.geometry().write_cache, cache != CacheMode::WriteThrough);
        Suite::new(bdev).run();
    }
}

#[test]
fn uring_file_on_disk_passes_without_cache() {
    let dir = disk_dir();
    file_passes(&image(&dir, SIZE_BYTES), CacheMode::None);
}

#[test]
fn uring_file_on_disk_passes_writeback() {
    let dir = disk_dir();
    file_passes(&image(&dir, SIZE_BYTES), CacheMode::WriteBack);
}

#[test]
fn uring_file_on_disk_passes_writethrough() {
    let dir = disk_dir();
    file_passes(&image(&dir, SIZE_BYTES), CacheMode::WriteThrough);
}

#[test]
fn uring_file_on_tmpfs_passes() {
    let dir = shm_dir();
    let path = image(&dir, SIZE_BYTES);
    match ringmill_drivers::uring::UringBdev::open("disk", &options(&path, CacheMode::None)) {
        Ok(bdev) => {
            drop(bdev);
            file_passes(&path, CacheMode::None);
        }
        Err(error) => skipped("uring_file_on_tmpfs_passes (cache none)", &error.to_string()),
    }
    file_passes(&path, CacheMode::WriteBack);
    let way = |options| {
        let facts = open(&options).driver_facts();
        facts.into_iter().find(|(name, _)| *name == "transfers").map(|(_, way)| way)
    };
    let ring_only = UringOptions { ring_only: true, ..options(&path, CacheMode::WriteBack) };
    assert_eq!(way(options(&path, CacheMode::WriteBack)).as_deref(), Some("in place"));
    assert_eq!(way(ring_only.clone()).as_deref(), Some("io_uring"));
    Suite::new(open(&ring_only)).run();
}

#[test]
fn uring_file_grows_and_shrinks() {
    let dir = disk_dir();
    let path = image(&dir, SIZE_BYTES);
    let bdev = open(&options(&path, CacheMode::None));
    let suite = Suite::new(bdev);
    let set_len = |bytes| {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes).unwrap();
    };
    let block = u64::from(suite.bdev.info().geometry().block_bytes);
    suite.resize(2 * SIZE_BYTES / block, || set_len(2 * SIZE_BYTES + 100));
    suite.resize(SIZE_BYTES / block, || set_len(SIZE_BYTES));
}

#[test]
fn uring_loop_device_passes() {
    let dir = disk_dir();
    let backing = image(&dir, SIZE_BYTES);
    for (sector_bytes, cache) in
        [(512, CacheMode::None), (4096, CacheMode::None), (4096, CacheMode::WriteBack)]
    {
        let device = match Loop::new(&backing, sector_bytes) {
            Ok(device) => device,
            Err(reason) => return skipped("uring_loop_device_passes", &reason),
        };
        let bdev = open(&options(&device.path, cache));
        assert_eq!(bdev.info().geometry().block_bytes, sector_bytes);
        eprintln!("{:?} {:?}", bdev.info().geometry(), bdev.driver_facts());
        Suite::new(bdev).run();
    }
}

#[test]
fn uring_zram_device_of_4096_byte_blocks_passes() {
    let device = match Zram::new(SIZE_BYTES) {
        Ok(device) => device,
        Err(reason) => return skipped("uring_zram_device_of_4096_byte_blocks_passes", &reason),
    };
    for cache in [CacheMode::None, CacheMode::WriteThrough] {
        let bdev = open(&options(&device.path, cache));
        assert_eq!(bdev.info().geometry().block_bytes, 4096);
        eprintln!("{:?} {:?}", bdev.info().geometry(), bdev.driver_facts());
        assert!(bdev.driver_facts().contains(&("transfers", "in place".to_owned())));
        Suite::new(bdev).run();
        let ring_only = UringOptions { ring_only: true, ..options(&device.path, cache) };
        Suite::new(open(&ring_only)).run();
    }
}

#[test]
fn a_read_only_image_refuses_changes() {
    let dir = disk_dir();
    let path = image(&dir, SIZE_BYTES);
    for cache in [CacheMode::None, CacheMode::WriteBack] {
        let options = UringOptions { read_only: true, ..options(&path, cache) };
        Suite::new(open(&options)).refuses_changes();
    }
}
