//! A running channel allocates nothing: counted on the thread that plays reactor.
#![expect(unsafe_code)] // UNSAFETY: a global allocator that counts.

mod echo;
mod media;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use media::{disk_dir, image, open, options};
use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::TestBed;
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::reactor::{IdlePolicy, Message, ReactorConfig, ReactorHandle, spawn};
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::uring::CacheMode;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is handed on to the system's allocator; the counter is a plain cell of this thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: handed on to our caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: handed on to our caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Every kind of request, whole and in pieces, aligned and not, at some depth.
fn load(bed: &mut TestBed, rounds: u64) {
    let odd: [_; 40] = std::array::from_fn(|i| bed.segment(63, i * 600 + i, 512));
    let page = bed.segment(62, 0, 4096);
    let crooked = bed.segment(61, 3, 4096);
    let pair = [bed.segment(60, 0, 2048), bed.segment(60, 4096, 2048)];
    let none = IoFlags::NONE;
    for round in 0..rounds {
        let at = (round % 64) * 65536;
        let _ = bed.offer(IoOp::Write, none, at, 4096, &[page]);
        let _ = bed.offer(IoOp::Read, none, at + 8192, 4096, &[page]);
        let _ = bed.offer(IoOp::Read, none, at + 4096, 4096, &pair);
        let _ = bed.offer(IoOp::Write, none, at + 16384, 4096, &[crooked]);
        let _ = bed.offer(IoOp::Read, none, at + 512, 512, &odd[..1]);
        let _ = bed.offer(IoOp::Write, IoFlags::FUA, at + 20480, 20480, &odd);
        if round % 16 == 0 {
            let _ = bed.offer(IoOp::WriteZeroes, none, at + 49152, 4096, &[]);
            let _ = bed.offer(IoOp::Discard, none, at + 57344, 4096, &[]);
            let _ = bed.offer(IoOp::WriteZeroes, IoFlags::MAY_UNMAP, 8 << 20, 4 << 20, &[]);
            let _ = bed.offer(IoOp::Flush, none, 0, 0, &[]);
        }
        bed.turn(|_, status| assert!(status.is_ok(), "{status:?}"));
    }
    bed.drain();
}

fn allocates_nothing(bdev: Arc<dyn Bdev>) {
    allocates_nothing_in(TestBed::new(&*bdev), &*bdev);
}

fn allocates_nothing_in(mut bed: TestBed, bdev: &dyn Bdev) {
    load(&mut bed, 200);
    let before = ALLOCATIONS.with(Cell::get);
    load(&mut bed, 2000);
    let after = ALLOCATIONS.with(Cell::get);
    assert_eq!(after - before, 0, "allocations by {}", bdev.info().product_name());
    bed.finish();
}

#[test]
fn null_allocates_nothing() {
    let options = NullOptions { blocks_count: 1 << 16, block_bytes: 512, uuid: None };
    allocates_nothing(Arc::new(NullBdev::new("null", &options).unwrap()));
}

#[test]
fn malloc_allocates_nothing() {
    let options = MallocOptions { blocks_count: 1 << 16, block_bytes: 512, uuid: None };
    allocates_nothing(Arc::new(MallocBdev::new("malloc", &options).unwrap()));
}

#[test]
fn nvme_allocates_nothing() {
    for sgl in [false, true] {
        allocates_nothing(Arc::new(echo::EchoBdev::new(sgl)));
    }
}

#[test]
fn uring_allocates_nothing() {
    let dir = disk_dir();
    for cache in [CacheMode::None, CacheMode::WriteBack] {
        allocates_nothing(open(&options(&image(&dir, 32 << 20), cache)));
    }
}

/// Allocations of the thread that a reactor runs on; the message itself allocates nothing there.
fn allocations_of(reactor: &ReactorHandle) -> u64 {
    let (count, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (to, done) = (Arc::clone(&count), Arc::clone(&answered));
    let message: Message = Box::new(move |_| {
        to.store(ALLOCATIONS.with(Cell::get), Ordering::Relaxed);
        done.store(true, Ordering::Release);
    });
    assert!(reactor.send(message).is_ok());
    while !answered.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    count.load(Ordering::Relaxed)
}

fn crossing_allocates_nothing(inner: Arc<dyn Bdev>) {
    // One that sleeps whenever it can, so that waking it is part of what is looked at.
    let idle = IdlePolicy::Adaptive { spin_ns: 0 };
    let owner = spawn(&ReactorConfig { core: None, idle, io_wq_cpus: Vec::new() }).unwrap();
    let bdev = CrossBdev::new(inner, vec![owner.clone()]).unwrap();
    let mut bed = TestBed::new(&bdev);
    load(&mut bed, 200);
    let owners_before = allocations_of(&owner);
    let before = ALLOCATIONS.with(Cell::get);
    load(&mut bed, 1000);
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "allocations by the requester");
    assert_eq!(allocations_of(&owner) - owners_before, 0, "allocations by the owner");
    bed.finish();
    drop(bdev);
    owner.stop();
}

#[test]
fn crossing_to_another_reactor_allocates_nothing_on_either_side() {
    let ram = MallocOptions { blocks_count: 1 << 16, block_bytes: 512, uuid: None };
    crossing_allocates_nothing(Arc::new(MallocBdev::new("malloc", &ram).unwrap()));
    let dir = disk_dir();
    crossing_allocates_nothing(open(&options(&image(&dir, 32 << 20), CacheMode::None)));
}

#[test]
fn uring_with_pinned_memory_allocates_nothing() {
    let dir = disk_dir();
    for cache in [CacheMode::None, CacheMode::WriteBack] {
        let bdev = open(&options(&image(&dir, 32 << 20), cache));
        let bed = TestBed::pinned(&*bdev);
        let page = bed.segment(0, 0, 4096);
        let mut bed = bed;
        assert!(bed.run(IoOp::Read, IoFlags::NONE, 0, 4096, &[page]).is_ok());
        assert_eq!(bed.fixed_uses_count(), 1);
        allocates_nothing_in(bed, &*bdev);
    }
}
