//! Queues that share a reactor: how much a hog moves between two polls of a small one, and who gets what in the end.
//!
//! Time is virtual and every pass is played by the test, so the figures are exact. The RAM disk's channel really copies:
//! bytes are counted in the guest's memory.

mod bench;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bench::{Bench, Setup};
use ringmill_core::bdev::{Bdev, Channel, ReadyQueue, Room};
use ringmill_core::io::{BatchView, Completion, Completions, Tag};
use ringmill_core::limits::{
    FAIR_ALONE_BYTES, FAIR_HOLD_NS, FAIR_INFLIGHT_BYTES, FAIR_LIGHT_BYTES, FAIR_QUANTUM_BYTES,
    QUEUE_INFLIGHT_MAX,
};
use ringmill_core::reactor::{IoCx, Poller, ReactorCx};
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::status::IoStatus;
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_vmm_glue::sim::{Buffer, GuestMemory, GuestRing};

const DATA_AT: u64 = 1 << 32;
const FILL: u8 = 0x5a;

/// A RAM disk of 4 MiB that is full of `FILL`.
fn disk() -> MallocBdev {
    let options =
        MallocOptions { blocks_count: bench::SECTORS_COUNT, block_bytes: 512, uuid: None };
    MallocBdev::new("ram", &options).expect("memory")
}

fn memory(data_bytes: usize) -> GuestMemory {
    GuestMemory::new(&[(bench::RING_AT, 16 * bench::MEMORY_BYTES), (DATA_AT, data_bytes)])
}

/// A queue on a context of the test's, with a channel into `disk`.
fn queue(cx: &mut ReactorCx, disk: &MallocBdev, data_bytes: usize) -> Bench {
    let channel = disk.open_channel(None).expect("a seed")(&mut cx.io).expect("a channel");
    let mut bench = Bench::with(Setup::default(), memory(data_bytes), move |_| channel);
    // Bench has attached it to a context of its own.
    bench.worker.detach(&mut bench.cx);
    bench.worker.attach(cx);
    bench
}

fn read(bench: &mut Bench, sector: u64, at: u64, len_bytes: u32) -> [Buffer; 3] {
    let header = bench.header(spec::T_IN, sector);
    [header, Buffer { addr: DATA_AT + at, len_bytes, writable: true }, bench.status_byte()]
}

fn fill(cx: &mut ReactorCx, bench: &mut Bench, disk_bytes: u64) {
    bench.memory.fill(DATA_AT, u32::try_from(disk_bytes).expect("small"), FILL);
    for at in (0..disk_bytes).step_by(1 << 20) {
        let header = bench.header(spec::T_OUT, at / 512);
        let data = Buffer { addr: DATA_AT + at, len_bytes: 1 << 20, writable: false };
        let status = bench.status_byte();
        bench.offer(&[header, data, status]);
    }
    for _ in 0..64 {
        pass(cx, &mut [bench], 1000);
    }
    while bench.ring.take_used(&bench.memory).is_some() {}
    bench.memory.fill(DATA_AT, u32::try_from(disk_bytes).expect("small"), 0);
}

/// One pass of the reactor over its queues.
fn pass(cx: &mut ReactorCx, queues: &mut [&mut Bench], ns: u64) {
    cx.io.clock.advance_ns(ns);
    cx.pass_ns = cx.io.clock.now_ns();
    for queue in queues {
        queue.worker.poll(cx);
    }
}

/// Bytes of the guest's data that came from the disk.
fn copied(bench: &Bench, from: u64, len_bytes: usize) -> u64 {
    let mut bytes = vec![0; len_bytes];
    bench.memory.read(DATA_AT + from, &mut bytes);
    bytes.iter().filter(|&&b| b == FILL).count() as u64
}

#[test]
fn a_hog_copies_a_quantum_between_two_polls_of_a_small_queue() {
    const HOG_BYTES: usize = 4 << 20;
    let mut cx = ReactorCx::simulated(1).expect("memory");
    let disk = disk();
    let mut hog = queue(&mut cx, &disk, HOG_BYTES);
    fill(&mut cx, &mut hog, HOG_BYTES as u64);
    let mut small = queue(&mut cx, &disk, 1 << 20);
    for at in 0..4u64 {
        let chain = read(&mut hog, at * 2048, at << 20, 1 << 20);
        hog.offer(&chain);
    }
    // Alone, the first pass moves a lot.
    pass(&mut cx, &mut [&mut hog], 1000);
    let mut before = copied(&hog, 0, HOG_BYTES);
    assert_eq!(before, FAIR_ALONE_BYTES);
    let mut finished = 0;
    for turn in 0u32.. {
        small.reuse_buffers();
        let chain = read(&mut small, u64::from(turn % 100), 0, 4096);
        let head = small.offer(&chain);
        pass(&mut cx, &mut [&mut small, &mut hog], 1000);
        let answered = small.ring.take_used(&small.memory);
        assert_eq!(answered, Some((u32::from(head), 4097)), "turn {turn}: not in its pass");
        let now = copied(&hog, 0, HOG_BYTES);
        let most = most_bytes(u64::from(turn));
        assert_eq!(now - before, most.min(HOG_BYTES as u64 - before), "turn {turn}");
        before = now;
        while let Some((_, len)) = hog.ring.take_used(&hog.memory) {
            assert_eq!(len, (1 << 20) + 1);
            finished += 1;
        }
        if finished == 4 {
            break;
        }
    }
    assert_eq!(before, HOG_BYTES as u64);
}

#[test]
fn a_queue_without_light_neighbours_is_not_cut() {
    let mut cx = ReactorCx::simulated(1).expect("memory");
    let disk = disk();
    let mut hog = queue(&mut cx, &disk, 4 << 20);
    fill(&mut cx, &mut hog, 4 << 20);
    let mut small = queue(&mut cx, &disk, 1 << 20);
    let chain = read(&mut small, 0, 0, 4096);
    small.offer(&chain);
    pass(&mut cx, &mut [&mut small, &mut hog], 1000);
    // The small one is idle from now on; after a while nobody minds it.
    pass(&mut cx, &mut [&mut small, &mut hog], FAIR_HOLD_NS);
    for at in 0..2u64 {
        let chain = read(&mut hog, at * 2048, at << 20, 1 << 20);
        hog.offer(&chain);
    }
    for turn in 1..=2u64 {
        pass(&mut cx, &mut [&mut small, &mut hog], 1000);
        assert_eq!(copied(&hog, 0, 4 << 20), turn << 20);
    }
}

/// What a hog may copy in a turn: in the first one it has nothing in flight yet, as a light queue.
fn most_bytes(turn: u64) -> u64 {
    if turn == 0 { FAIR_LIGHT_BYTES } else { FAIR_QUANTUM_BYTES }
}

/// Small requests behind a long one on the same queue: both go on.
#[test]
fn a_stream_of_small_requests_does_not_starve_a_long_one() {
    let mut cx = ReactorCx::simulated(1).expect("memory");
    let disk = disk();
    let mut hog = queue(&mut cx, &disk, 4 << 20);
    fill(&mut cx, &mut hog, 4 << 20);
    let mut light = queue(&mut cx, &disk, 1 << 20);
    let long = read(&mut hog, 0, 0, 1 << 20);
    let chain = read(&mut light, 0, 0, 4096);
    light.offer(&chain);
    pass(&mut cx, &mut [&mut light], 1000);
    let long = hog.offer(&long);
    let (mut inflight, mut small_count) = (0, 0);
    for turn in 0u64.. {
        assert!(turn < 1000, "the long request starves");
        while inflight < 16 {
            let chain = read(&mut hog, 4096, 2 << 20, 4096);
            hog.offer(&chain);
            inflight += 1;
        }
        let before = copied(&hog, 0, 1 << 20);
        pass(&mut cx, &mut [&mut light, &mut hog], 1000);
        let (mut small, mut ended) = (0, false);
        while let Some((id, _)) = hog.ring.take_used(&hog.memory) {
            if id == u32::from(long) && copied(&hog, 0, 1 << 20) == 1 << 20 {
                ended = true;
            } else {
                small += 1;
                inflight -= 1;
            }
        }
        let moved = copied(&hog, 0, 1 << 20) - before + small * 4096;
        assert!(moved <= most_bytes(turn), "turn {turn}: {moved}");
        small_count += small;
        assert!(small_count * 3 >= turn, "{small_count} small ones in {turn} turns");
        if ended {
            break;
        }
    }
}

/// Takes everything and ends nothing until it is told to.
#[derive(Debug)]
struct Slow {
    taken: Vec<Tag>,
    ready: ReadyQueue,
    ends: Arc<AtomicUsize>,
}

impl Channel for Slow {
    fn room(&self, _io: &IoCx) -> Room {
        Room { requests: QUEUE_INFLIGHT_MAX, bytes: u64::MAX, not_before_ns: 0 }
    }

    fn submit(&mut self, _io: &mut IoCx, batch: BatchView<'_>) -> usize {
        self.taken.extend(batch.tags());
        batch.requests().len()
    }

    fn poll(&mut self, _io: &mut IoCx, done: &mut Completions) {
        while !self.taken.is_empty() && self.ends.load(Ordering::Relaxed) > 0 {
            self.ends.fetch_sub(1, Ordering::Relaxed);
            self.ready.push(Completion { tag: self.taken.remove(0), status: IoStatus::Ok });
        }
        self.ready.drain_into(done);
    }

    fn inflight(&self) -> usize {
        self.taken.len() + self.ready.len()
    }

    fn must_poll(&self) -> bool {
        false
    }

    fn close(&mut self, _io: &mut IoCx) {}
}

fn slow_queue(cx: &mut ReactorCx) -> (Bench, Arc<AtomicUsize>) {
    let ends = Arc::new(AtomicUsize::new(0));
    let told = Arc::clone(&ends);
    let setup = Setup { size: 256, ..Setup::default() };
    let mut bench = Bench::with(setup, memory(1 << 20), move |_| {
        Box::new(Slow { taken: Vec::new(), ready: ReadyQueue::new(QUEUE_INFLIGHT_MAX), ends: told })
    });
    bench.worker.detach(&mut bench.cx);
    bench.worker.attach(cx);
    (bench, ends)
}

#[test]
fn data_in_flight_is_bounded_beside_a_light_queue_and_everybody_has_some() {
    let mut cx = ReactorCx::simulated(1).expect("memory");
    let (mut hog, hog_ends) = slow_queue(&mut cx);
    let (mut small, small_ends) = slow_queue(&mut cx);
    let chain = read(&mut small, 0, 0, 4096);
    let head = small.offer(&chain);
    small_ends.store(1, Ordering::Relaxed);
    pass(&mut cx, &mut [&mut small], 1000);
    assert_eq!(small.ring.take_used(&small.memory).map(|u| u.0), Some(u32::from(head)));
    for _ in 0..60 {
        let chain = read(&mut hog, 0, 0, 256 << 10);
        hog.offer(&chain);
    }
    let most = usize::try_from(FAIR_INFLIGHT_BYTES / 2 / (256 << 10)).expect("small");
    for _ in 0..30 {
        pass(&mut cx, &mut [&mut small, &mut hog], 1000);
    }
    assert_eq!(hog.worker.inflight_count(), most);
    // It waits for a completion, not for a poll: the reactor may sleep.
    assert!(!hog.worker.prepare_sleep(&mut cx));
    // The small one's way is free.
    let chain = read(&mut small, 0, 0, 4096);
    small.offer(&chain);
    pass(&mut cx, &mut [&mut small, &mut hog], 1000);
    assert_eq!((small.worker.inflight_count(), hog.worker.inflight_count()), (1, most));
    // What ends makes room for as much, no more.
    hog_ends.store(3, Ordering::Relaxed);
    for _ in 0..10 {
        pass(&mut cx, &mut [&mut small, &mut hog], 1000);
    }
    assert_eq!(hog.worker.inflight_count(), most);
    // Nobody light for a while: all of it goes out.
    for _ in 0..30 {
        pass(&mut cx, &mut [&mut small, &mut hog], FAIR_HOLD_NS);
    }
    assert_eq!(hog.worker.inflight_count(), 57);
    hog_ends.store(57, Ordering::Relaxed);
    small_ends.store(1, Ordering::Relaxed);
    for _ in 0..4 {
        pass(&mut cx, &mut [&mut small, &mut hog], 1000);
    }
    assert_eq!(hog.worker.inflight_count() + small.worker.inflight_count(), 0);
    // A queue that leaves takes nothing of the budget along: another one gets its half.
    hog.worker.detach(&mut cx);
    let (mut next, _ends) = slow_queue(&mut cx);
    let chain = read(&mut small, 0, 0, 4096);
    small.offer(&chain);
    small_ends.store(1, Ordering::Relaxed);
    for _ in 0..60 {
        let chain = read(&mut next, 0, 0, 256 << 10);
        next.offer(&chain);
    }
    for _ in 0..30 {
        pass(&mut cx, &mut [&mut small, &mut next], 1000);
    }
    assert_eq!(next.worker.inflight_count(), most);
}

mod coalescing {
    use super::*;

    const DELAY_MAX_NS: u64 = 10_000_000;

    /// What a guest sees of a load of so many requests per second over a time: interrupts, and the longest that an answer
    /// lay there before the guest was told.
    fn load(bench: &mut Bench, per_second: u64, time_ns: u64) -> (u64, u64) {
        let (mut interrupts, mut longest_ns) = (0, 0);
        let mut untold_since = None;
        let start_ns = bench.cx.io.clock.now_ns();
        let (mut offered, mut elapsed_ns) = (0, 0);
        while elapsed_ns < time_ns || untold_since.is_some() {
            if elapsed_ns < time_ns && offered * 1_000_000_000 <= elapsed_ns * per_second {
                bench.reuse_buffers();
                let header = bench.header(spec::T_FLUSH, 0);
                let status = bench.status_byte();
                bench.offer(&[header, status]);
                offered += 1;
            }
            bench.pass();
            let now_ns = bench.cx.io.clock.now_ns();
            elapsed_ns = now_ns - start_ns;
            while bench.ring.take_used(&bench.memory).is_some() {
                untold_since.get_or_insert(now_ns);
            }
            if bench.worker.take_interrupt() {
                interrupts += 1;
                longest_ns = longest_ns.max(untold_since.take().map_or(0, |since| now_ns - since));
            } else if untold_since.is_some() {
                assert!(bench.worker.prepare_sleep(&mut bench.cx), "it would sleep on an answer");
            }
            assert!(elapsed_ns < 2 * time_ns + DELAY_MAX_NS, "an answer was never told");
        }
        (interrupts, longest_ns)
    }

    #[test]
    fn a_busy_guest_is_interrupted_less_and_never_late() {
        let mut bench = Bench::new(Setup { record: false, ..Setup::default() });
        bench.worker.take_interrupt();
        let second = 1_000_000_000;
        // Off: one interrupt per answer, at once.
        let (interrupts, longest_ns) = load(&mut bench, 20_000, second / 5);
        assert!((3_999..=4_002).contains(&interrupts) && longest_ns == 0, "{interrupts}");
        // 20,000 per second are four times above 4,000: four base delays of 100 µs.
        bench.device.coalesce().set(100, 4_000);
        let (interrupts, longest_ns) = load(&mut bench, 20_000, second / 5);
        assert!((450..=650).contains(&interrupts), "{interrupts}");
        assert!((340_000..=402_000).contains(&longest_ns), "{longest_ns}");
        // A slow guest is not kept waiting; the first window still has the rate of before.
        load(&mut bench, 3_000, second / 50);
        let (interrupts, longest_ns) = load(&mut bench, 3_000, second / 5);
        assert!(interrupts >= 599 && longest_ns == 0, "{interrupts}, {longest_ns}");
        // However large the product, no answer waits longer than the bound.
        bench.device.coalesce().set(1_000_000, 1);
        let (interrupts, longest_ns) = load(&mut bench, 20_000, second / 5);
        assert!(
            (15..=225).contains(&interrupts) && longest_ns <= DELAY_MAX_NS + 1000,
            "{interrupts}, {longest_ns}"
        );
        // Off again: it ends with the next window.
        bench.device.coalesce().set(0, 0);
        load(&mut bench, 20_000, second / 50);
        let (interrupts, longest_ns) = load(&mut bench, 20_000, second / 50);
        assert!(interrupts >= 399 && longest_ns == 0, "{interrupts}");
    }
}
