//! Two reactors serve two queues of one disk, and no cache line is written by both.
//!
//! In: everything that the reactors reach comes from an arena without gaps, the worst that an allocator may do; the
//! program's own statics are watched, too. One reactor works while the other is held still, in turn; what changed
//! meanwhile was written by the one that worked. Out: a line in both lists fails the test and says whose it is.
#![expect(unsafe_code)] // UNSAFETY: a global allocator, and reading memory that others write.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

use ringmill_core::IoStatus;
use ringmill_core::bdev::{Bdev, InstantChannel};
use ringmill_core::io::IoOp;
use ringmill_core::reactor::{
    IdlePolicy, Poller, PollerId, ReactorConfig, ReactorCx, ReactorHandle, spawn,
};
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::stats::QueueStats;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_vmm_glue::blk::{BlkDevice, NoTracking, QueueStatus, QueueWorker, WorkerParts};
use ringmill_vmm_glue::sim::{Buffer, Dice, DriverRing, GuestMemory, GuestRing};
use ringmill_vmm_glue::virtq::SplitQueue;

/// Processors fetch lines in pairs.
const LINE_BYTES: usize = 128;
const ARENA_BYTES: usize = 256 << 20;
const RING_AT: u64 = 0x1_0000;
const QUEUE_SIZE: u16 = 64;

#[repr(align(4096))]
struct Memory(std::cell::UnsafeCell<[u8; ARENA_BYTES]>);
// SAFETY: handed out in pieces that do not overlap.
unsafe impl Sync for Memory {}

static ARENA: Memory = Memory(std::cell::UnsafeCell::new([0; ARENA_BYTES]));
/// Where the pieces of the present round begin; older ones are dead.
static FIRST: AtomicUsize = AtomicUsize::new(0);
static USED: AtomicUsize = AtomicUsize::new(0);
/// Everything allocated while this is set lies in the arena.
static WATCHED: AtomicBool = AtomicBool::new(false);

fn arena_start() -> usize {
    ARENA.0.get() as usize
}

struct Packed;

// SAFETY: pieces of the arena are handed out once each, aligned as asked for; all else is the system's.
unsafe impl GlobalAlloc for Packed {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !WATCHED.load(Ordering::Relaxed) {
            // SAFETY: our caller's promises are handed on.
            return unsafe { System.alloc(layout) };
        }
        let mut at = 0;
        // What malloc guarantees, and no byte between two pieces beyond that.
        let align = layout.align().max(16);
        let place = |used: usize| {
            at = used.next_multiple_of(align);
            let end = at + layout.size();
            (end <= ARENA_BYTES).then_some(end)
        };
        match USED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, place) {
            Ok(_) => {
                let number = PIECES_COUNT.fetch_add(1, Ordering::Relaxed);
                let piece = at << 32 | layout.size();
                PIECES[number].store(piece, Ordering::Relaxed);
                (arena_start() + at) as *mut u8
            }
            Err(_) => std::ptr::null_mut(),
        }
    }

    // SAFETY: as for `alloc`.
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if !(arena_start()..arena_start() + ARENA_BYTES).contains(&(ptr as usize)) {
            // SAFETY: came from the system.
            unsafe { System.dealloc(ptr, layout) };
        }
    }
}

/// Pieces of the arena, each as offset << 32 | bytes, for the words of a failure.
static PIECES: [AtomicUsize; 1 << 17] = [const { AtomicUsize::new(0) }; 1 << 17];
static PIECES_COUNT: AtomicUsize = AtomicUsize::new(0);

/// What lies on a line.
fn objects_at(line: usize) -> String {
    let Some(from) = (line * LINE_BYTES).checked_sub(arena_start()).filter(|at| *at < ARENA_BYTES)
    else {
        return format!("a static at {:#x}", line * LINE_BYTES);
    };
    let pieces = PIECES[..PIECES_COUNT.load(Ordering::Relaxed)].iter();
    let pieces = pieces.map(|p| p.load(Ordering::Relaxed)).map(|p| (p >> 32, p & 0xffff_ffff));
    let here = pieces.filter(|(at, len)| *at < from + LINE_BYTES && at + len > from);
    here.map(|(at, len)| format!("[{len} bytes at {at:#x}] ")).collect()
}

#[global_allocator]
static ALLOCATOR: Packed = Packed;

/// Runs `f` with everything that it allocates, on whatever thread, in the arena.
fn watched<T>(f: impl FnOnce() -> T) -> T {
    WATCHED.store(true, Ordering::SeqCst);
    let made = f();
    WATCHED.store(false, Ordering::SeqCst);
    made
}

/// The writable parts of the program itself.
fn statics() -> Vec<std::ops::Range<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("our own maps");
    let own = std::env::current_exe().expect("our own path").to_string_lossy().into_owned();
    let arena = arena_start()..arena_start() + ARENA_BYTES;
    let (mut ranges, mut last_end) = (Vec::new(), 0);
    for line in maps.lines() {
        let range = line.split(' ').next().expect("a range").split_once('-').expect("a range");
        let hex = |text: &str| usize::from_str_radix(text, 16).expect("an address");
        let (start, end) = (hex(range.0), hex(range.1));
        // The anonymous mapping right behind the program is its zeroed data.
        let is_own = line.ends_with(&own) || start == last_end && !line.contains('[');
        if is_own {
            last_end = end;
        }
        if is_own && line.contains(" rw-p ") {
            // The arena lies inside and is looked at by itself.
            ranges.extend([start..end.min(arena.start), start.max(arena.end)..end]);
        }
    }
    ranges.retain(|r| r.start < r.end);
    ranges
}

/// What the watched memory holds now.
struct Snapshot(Vec<(usize, Vec<u8>)>);

impl Snapshot {
    fn take() -> Snapshot {
        fence(Ordering::SeqCst);
        let arena = arena_start() + FIRST.load(Ordering::Relaxed)
            ..arena_start() + USED.load(Ordering::Relaxed);
        let copy = |range: std::ops::Range<usize>| {
            let mut bytes = vec![0u8; range.len()];
            // SAFETY: mapped and readable, as the maps say; others may write meanwhile, so a byte may be old or new.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    range.start as *const u8,
                    bytes.as_mut_ptr(),
                    bytes.len(),
                );
            }
            (range.start, bytes)
        };
        Snapshot(statics().into_iter().chain([arena]).map(copy).collect())
    }

    /// The lines that differ.
    fn changed(&self, later: &Snapshot) -> BTreeSet<usize> {
        let mut lines = BTreeSet::new();
        for ((start, before), (other, after)) in self.0.iter().zip(&later.0) {
            assert_eq!(start, other);
            for (at, (a, b)) in before.chunks(8).zip(after.chunks(8)).enumerate() {
                if a != b {
                    lines.insert((start + at * 8) / LINE_BYTES);
                }
            }
        }
        lines
    }
}

/// One queue: its reactor, its guest.
struct Side {
    reactor: ReactorHandle,
    status: Arc<QueueStatus>,
    memory: GuestMemory,
    ring: DriverRing,
    dice: Dice,
    hold: Arc<AtomicBool>,
    held: Arc<AtomicBool>,
    number: u64,
}

/// Both sides, each kind of object made for one and at once for the other, as the daemon does it.
fn two_sides(bdev: &Arc<dyn Bdev>, device: &Arc<BlkDevice>) -> [Side; 2] {
    let memories = [0, 1].map(|_| GuestMemory::new(&[(RING_AT, 2 << 20)]));
    let rings = memories.each_ref().map(|m| DriverRing::new(m, RING_AT, QUEUE_SIZE, false, 0));
    let (reactors, statuses) = watched(|| {
        let reactors = [0, 1].map(|_| {
            let idle = IdlePolicy::Poll;
            spawn(&ReactorConfig { core: None, idle, io_wq_cpus: Vec::new() }).expect("a reactor")
        });
        let statuses =
            [0, 1].map(|_| Arc::new(QueueStatus::new(QueueStats::new_shared().expect("memory"))));
        let workers = [0, 1].map(|at: usize| {
            let windows = rings[at].device_rings(&memories[at]).expect("the windows fit");
            let worker = QueueWorker::new(WorkerParts {
                queue: SplitQueue::new(windows, QUEUE_SIZE, 0, false, true),
                tracking: NoTracking,
                mem: memories[at].table(),
                device: Arc::clone(device),
                channel: Box::new(InstantChannel::new(IoStatus::Gone)),
                status: Arc::clone(&statuses[at]),
                kick: None,
                call: None,
                enabled: true,
                events: Box::new(|_| {}),
            });
            Box::new(worker.with_seed(bdev.open_channel(Some(&reactors[at])).expect("a seed")))
        });
        for (reactor, worker) in reactors.iter().zip(workers) {
            assert!(reactor.add_poller(PollerId::next(), "queue", 0, worker));
        }
        for reactor in &reactors {
            // Until it has taken the worker in: what that allocates is watched, too.
            reactor.ask(|_| ()).expect("the reactor answers");
        }
        (reactors, statuses)
    });
    let mut parts = reactors.into_iter().zip(statuses).zip(memories.into_iter().zip(rings));
    [0, 1].map(|number| {
        let ((reactor, status), (memory, ring)) = parts.next().expect("two");
        let (hold, held) = (Arc::default(), Arc::default());
        Side { reactor, status, memory, ring, dice: Dice::new(number, 70), hold, held, number }
    })
}

impl Side {
    /// Holds the reactor still until `go`.
    fn stop(&self) {
        self.hold.store(true, Ordering::SeqCst);
        let (hold, held) = (Arc::clone(&self.hold), Arc::clone(&self.held));
        let message = Box::new(move |_: &mut _| {
            held.store(true, Ordering::SeqCst);
            while hold.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_micros(100));
            }
            held.store(false, Ordering::SeqCst);
        });
        assert!(self.reactor.send(message).is_ok());
        while !self.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }

    fn go(&self) {
        self.hold.store(false, Ordering::SeqCst);
        while self.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }

    /// Reads, writes and flushes at some depth; bad ones among them.
    fn drive(&mut self, requests_count: u64) {
        let started = Instant::now();
        let (mut sent, mut done) = (0, 0);
        while done < requests_count {
            while sent < requests_count && sent - done < 8 {
                let at = RING_AT + 0x1_0000 + (sent % 8) * 0x4000;
                let kind =
                    [spec::T_IN, spec::T_OUT, spec::T_FLUSH, spec::T_IN][(sent % 4) as usize];
                // Each queue has its own half of the disk; every 16th request lies behind its end.
                let sector =
                    if sent % 16 == 15 { 1 << 40 } else { self.number * 4096 + sent % 64 * 8 };
                self.memory.write(at, &kind.to_le_bytes());
                self.memory.write(at + 8, &sector.to_le_bytes());
                let header = Buffer { addr: at, len_bytes: 16, writable: false };
                let data =
                    Buffer { addr: at + 0x1000, len_bytes: 4096, writable: kind == spec::T_IN };
                let status = Buffer { addr: at + 0x3000, len_bytes: 1, writable: true };
                let chain: &[Buffer] =
                    if kind == spec::T_FLUSH { &[header, status] } else { &[header, data, status] };
                let added = self.ring.add(&self.memory, &mut self.dice, chain, chain.len(), 0);
                assert!(added.is_some());
                sent += 1;
            }
            self.ring.publish(&self.memory);
            while self.ring.take_used(&self.memory).is_some() {
                done += 1;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "{done} of {sent} answered");
            std::thread::yield_now();
        }
    }
}

/// The lines that each of the sides has written, in the arena and in the statics.
fn written(sides: &mut [Side; 2]) -> [BTreeSet<usize>; 2] {
    let mut lines = [BTreeSet::new(), BTreeSet::new()];
    sides.iter().for_each(Side::stop);
    for round in 0..6 {
        let at = round % 2;
        // Both before and after, neither side moves: what changes between is the working side's.
        let before = Snapshot::take();
        sides[at].go();
        sides[at].drive(300 + round as u64);
        sides[at].stop();
        lines[at].extend(before.changed(&Snapshot::take()));
    }
    lines
}

fn line_of<T: ?Sized>(object: &T) -> usize {
    std::ptr::from_ref(object).cast::<u8>() as usize / LINE_BYTES
}

/// Adds to its own counter in every pass, beside another reactor's.
struct Careless(Arc<[AtomicU64; 2]>, usize);

impl Poller for Careless {
    fn poll(&mut self, _cx: &mut ReactorCx) -> bool {
        self.0[self.1].fetch_add(1, Ordering::Relaxed);
        false
    }

    fn prepare_sleep(&mut self, _cx: &mut ReactorCx) -> bool {
        true
    }
}

fn shares_no_line(bdev: &Arc<dyn Bdev>) {
    let device = watched(|| Arc::new(BlkDevice::new(bdev, "lines", false)));
    let mut sides = two_sides(bdev, &device);
    let lines = written(&mut sides);
    for (side, lines) in sides.iter().zip(&lines) {
        // It sees what it is made to see.
        let read = side.status.stats.op(IoOp::Read);
        assert!(read.ops_count() > 100);
        assert!(lines.contains(&line_of(side.status.as_ref())), "the queue's state");
        let pollers = side.reactor.pollers();
        assert!(lines.contains(&line_of(pollers[0].counters.as_ref())), "the poller's counters");
    }
    // Counters and latency tables are mapped, each queue's by themselves.
    let [first, second] = sides.each_ref().map(|side| {
        let last = side.status.stats.op(IoOp::ALL[IoOp::ALL.len() - 1]);
        let end = std::ptr::from_ref(last) as usize + size_of_val(last);
        line_of(side.status.stats.op(IoOp::ALL[0]))..=end / LINE_BYTES
    });
    assert!(first.end() < second.start() || second.end() < first.start(), "counters");
    let both: Vec<usize> = lines[0].intersection(&lines[1]).copied().collect();
    for line in &both {
        eprintln!("both write the line of {}", objects_at(*line));
    }
    assert!(both.is_empty(), "{}: {} lines", bdev.info().product_name(), both.len());

    // The same look finds a line that two reactors do share.
    sides.iter().for_each(Side::go);
    let shared = watched(|| {
        let shared = Arc::new([const { AtomicU64::new(0) }; 2]);
        for (at, side) in sides.iter().enumerate() {
            let poller = Box::new(Careless(Arc::clone(&shared), at));
            assert!(side.reactor.add_poller(PollerId::next(), "careless", 0, poller));
            side.reactor.ask(|_| ()).expect("the reactor answers");
        }
        shared
    });
    let lines = written(&mut sides);
    let both: Vec<usize> = lines[0].intersection(&lines[1]).copied().collect();
    assert!(both.contains(&line_of(&shared[0])), "{both:?}");
    sides.iter().for_each(Side::go);
    sides.iter().for_each(|side| side.reactor.stop());
}

/// One test for all: they share the arena and the allocator's switch.
#[test]
fn two_queues_of_one_disk_share_no_line_that_is_written() {
    let null = NullOptions { blocks_count: 1 << 16, block_bytes: 512, uuid: None };
    let ram = MallocOptions { blocks_count: 1 << 16, block_bytes: 512, uuid: None };
    // Every way in which objects can come to lie across lines.
    for shift in (0..LINE_BYTES).step_by(32) {
        watched(|| std::mem::forget(vec![0u8; shift]));
        FIRST.store(USED.load(Ordering::Relaxed), Ordering::Relaxed);
        shares_no_line(&watched(|| -> Arc<dyn Bdev> {
            Arc::new(NullBdev::new("null", &null).unwrap())
        }));
        if shift % 64 == 0 {
            shares_no_line(&watched(|| -> Arc<dyn Bdev> {
                Arc::new(MallocBdev::new("ram", &ram).unwrap())
            }));
        }
    }
}
