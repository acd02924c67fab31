//! A running queue worker allocates nothing: counted, with a channel that passes through and with bounced requests.
#![expect(unsafe_code)] // UNSAFETY: a global allocator that counts.

mod bench;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use bench::{BenchOf, Format, MEMORY_BYTES, Packed, RING_AT, SECTORS_COUNT, Setup, Split};
use ringmill_core::bdev::{AlignChannel, Alignment, BlockLocks};
use ringmill_core::spec::virtio_blk as spec;
use ringmill_vmm_glue::sim::{GuestMemory, GuestRing};

struct Counting;

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn note() {
    if ARMED.get() {
        COUNT.set(COUNT.get() + 1);
    }
}

// SAFETY: hands every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: our caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        note();
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs every kind of request from the very first poll on; returns what was allocated or freed inside the polls.
fn allocations_of<F: Format>(bench: &mut BenchOf<F>) -> u64 {
    COUNT.set(0);
    let mut answers = 0u64;
    for round in 0..60u64 {
        bench.reuse_buffers();
        for at in 0..8u64 {
            let sector = (round * 31 + at * 13) % (SECTORS_COUNT - 600);
            let status = bench.status_byte();
            let buffers = match at {
                0 => vec![bench.header(spec::T_FLUSH, 0), status],
                1 => vec![bench.header(spec::T_GET_ID, 0), bench.buffer(20, true), status],
                2 => vec![bench.header(55, 0), status],
                3 => vec![bench.header(spec::T_WRITE_ZEROES, 0), bench.range(sector, 9, 0), status],
                4 => vec![bench.header(spec::T_OUT, sector), bench.buffer(512 * 17, false), status],
                5 => {
                    // Many segments, at odd addresses.
                    let mut list = vec![bench.header(spec::T_IN, sector)];
                    list.extend((0..32).map(|_| bench.buffer(513, true)));
                    list.push(bench.buffer(512 * 33 - 513 * 32, true));
                    list.push(status);
                    list
                }
                6 => vec![bench.header(spec::T_IN, sector), bench.buffer(300 << 10, true), status],
                _ => vec![bench.header(spec::T_OUT, sector), bench.buffer(512, false), status],
            };
            bench.offer_indirect(&buffers);
        }
        ARMED.set(true);
        for _ in 0..40 {
            bench.pass();
        }
        ARMED.set(false);
        while bench.ring.take_used(&bench.memory).is_some() {
            answers += 1;
        }
    }
    assert_eq!(answers, 480, "everything was answered");
    COUNT.get()
}

#[test]
fn polling_allocates_nothing() {
    let setup = Setup { record: false, ..Setup::default() };
    assert_eq!(allocations_of(&mut BenchOf::<Split>::new(setup)), 0);
    assert_eq!(allocations_of(&mut BenchOf::<Packed>::new(setup)), 0);
}

#[test]
fn bouncing_and_sub_block_writes_allocate_nothing() {
    bounces::<Split>();
    bounces::<Packed>();
}

fn bounces<F: Format>() {
    let rules = Alignment { block_bytes: 4096, address_bytes: 512, segment_bytes: 512 };
    for takes_max in [usize::MAX, 2] {
        let setup = Setup { record: false, takes_max, ..Setup::default() };
        let memory = GuestMemory::new(&[(RING_AT, 2 * MEMORY_BYTES)]);
        let locks = Arc::new(BlockLocks::default());
        let mut bench = BenchOf::<F>::with(setup, memory, |channel| {
            Box::new(AlignChannel::new(channel, rules, Some(locks)))
        });
        assert_eq!(allocations_of(&mut bench), 0);
        assert!(bench.cx.io.bounces_count() > 480, "the bounce path was not taken");
    }
}
