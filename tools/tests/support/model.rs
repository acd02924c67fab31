//! A disk's naive twin: one stamp per 512-byte sector, and requests that are checked against it as they complete.
//!
//! In: a connected client. Out: a panic that names seed and sector when the disk disagrees. Owner: the test's thread.
//! **Invariant:** no two requests in flight overlap unless both read, so what a sector holds is always decided.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ringmill_core::reactor::Entropy;
use ringmill_tools::load::{Client, Transfer};

pub const SECTOR_BYTES: u64 = 512;
const WORDS: u64 = SECTOR_BYTES / 8;

/// Zeroes.
const ZERO: u64 = 0;
/// Anything: discarded, or the target of a write that failed.
pub const UNKNOWN: u64 = u64::MAX;

/// Nothing may take longer than this, on whatever machine.
const HANG_MAX: Duration = Duration::from_secs(30);

/// The word that a sector with this stamp holds at `word` (counted from the disk's start).
fn word_of(stamp: u64, word: u64) -> u64 {
    if stamp == ZERO {
        return 0;
    }
    let mut x =
        stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 29)
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    Flush,
    Discard,
    /// With or without leave to unmap.
    WriteZeroes(bool),
}

impl Op {
    fn changes(self) -> bool {
        !matches!(self, Op::Read | Op::Flush)
    }
}

#[derive(Clone, Copy, Debug)]
struct Request {
    op: Op,
    queue: usize,
    lba: u64,
    sectors: u64,
    stamp: u64,
}

/// A client, the twin of its disk, and what is under way.
pub struct Exercise {
    pub client: Client,
    pub stamps: Vec<u64>,
    pub entropy: Entropy,
    seed: u64,
    depth: usize,
    inflight: HashMap<u32, Request>,
    per_queue: Vec<usize>,
    free: Vec<u32>,
    next_stamp: u64,
    /// When set, failed requests are counted instead of ending the test.
    pub tolerates_errors: bool,
    pub errors_count: u64,
    pub completed_count: u64,
    /// The longest time without an answer while something was in flight.
    pub longest_gap: Duration,
    last_answer: Instant,
    done: Vec<(u32, i32)>,
}

impl Exercise {
    /// On a disk that holds zeroes.
    pub fn new(client: Client, depth: usize, seed: u64) -> Exercise {
        let sectors =
            usize::try_from(client.capacity_bytes() / SECTOR_BYTES).expect("a small disk");
        Self::with_stamps(client, depth, seed, vec![ZERO; sectors])
    }

    /// On a disk that another exercise has left.
    pub fn with_stamps(client: Client, depth: usize, seed: u64, stamps: Vec<u64>) -> Exercise {
        let queues = client.queues_count();
        let slots = u32::try_from(queues * depth).expect("few slots");
        let next_stamp = stamps.iter().filter(|s| **s != UNKNOWN).max().map_or(1, |max| max + 1);
        Exercise {
            client,
            stamps,
            entropy: Entropy::seeded(seed),
            seed,
            depth,
            inflight: HashMap::new(),
            per_queue: vec![0; queues],
            free: (0..slots).collect(),
            next_stamp,
            tolerates_errors: false,
            errors_count: 0,
            completed_count: 0,
            longest_gap: Duration::ZERO,
            last_answer: Instant::now(),
            done: Vec::new(),
        }
    }

    pub fn sectors_count(&self) -> u64 {
        self.stamps.len() as u64
    }

    pub fn inflight_count(&self) -> usize {
        self.inflight.len()
    }

    /// A free buffer and a place in the queue's ring.
    pub fn has_room(&self, queue: usize) -> bool {
        self.per_queue[queue] < self.depth && !self.free.is_empty()
    }

    fn conflicts(&self, op: Op, lba: u64, sectors: u64) -> bool {
        self.inflight.values().any(|r| {
            (op.changes() || r.op.changes()) && lba < r.lba + r.sectors && r.lba < lba + sectors
        })
    }

    /// Submits a request; false when it would overlap one in flight or there is no room.
    pub fn begin(&mut self, op: Op, queue: usize, lba: u64, sectors: u64) -> bool {
        if !self.has_room(queue) || self.conflicts(op, lba, sectors) {
            return false;
        }
        let Some(slot) = self.free.pop() else { return false };
        if self.inflight.is_empty() {
            self.last_answer = Instant::now();
        }
        let (offset, len) = (lba * SECTOR_BYTES, sectors * SECTOR_BYTES);
        let bytes = usize::try_from(len).expect("a small request");
        let mut stamp = ZERO;
        let client = &mut self.client;
        let result = match op {
            Op::Write => {
                stamp = self.next_stamp;
                self.next_stamp += 1;
                client.fill_slot(slot, bytes, |word| word_of(stamp, lba * WORDS + word));
                client.submit(queue, Transfer::Write, offset, slot, bytes)
            }
            Op::Read => {
                // A read that moves nothing must not find the right bytes left in the slot.
                client.fill_slot(slot, bytes, |_| 0xdead_beef_dead_beef);
                client.submit(queue, Transfer::Read, offset, slot, bytes)
            }
            Op::Flush => client.submit_flush(queue, slot),
            Op::Discard => client.submit_range(queue, offset, len, None, slot),
            Op::WriteZeroes(unmap) => client.submit_range(queue, offset, len, Some(unmap), slot),
        };
        result.unwrap_or_else(|error| panic!("{op:?} at sector {lba}: {error} ({self})"));
        self.per_queue[queue] += 1;
        self.inflight.insert(slot, Request { op, queue, lba, sectors, stamp });
        true
    }

    pub fn kick(&mut self) {
        for queue in 0..self.client.queues_count() {
            self.client.kick(queue).expect("a kick");
        }
    }

    /// Takes what has completed; yields the core when nothing has.
    pub fn poll(&mut self) -> usize {
        let mut done = std::mem::take(&mut self.done);
        for queue in 0..self.client.queues_count() {
            self.client.completions(queue, &mut done);
        }
        let count = done.len();
        for (slot, ret) in done.drain(..) {
            let request = self.inflight.remove(&slot).unwrap_or_else(|| {
                panic!("slot {slot} completed, but nothing is in flight there ({self})")
            });
            self.per_queue[request.queue] -= 1;
            self.completed_count += 1;
            self.settle(slot, request, ret);
            self.free.push(slot);
        }
        self.done = done;
        if count > 0 {
            let now = Instant::now();
            self.longest_gap = self.longest_gap.max(now - self.last_answer);
            self.last_answer = now;
        } else {
            assert!(
                self.inflight.is_empty() || self.last_answer.elapsed() < HANG_MAX,
                "no answer to {:?} ({self})",
                self.inflight
            );
            std::thread::yield_now();
        }
        count
    }

    fn settle(&mut self, slot: u32, request: Request, ret: i32) {
        let Request { op, lba, sectors, stamp, .. } = request;
        if ret != 0 {
            assert!(self.tolerates_errors, "{request:?} failed with {ret} ({self})");
            self.errors_count += 1;
        }
        if ret != 0 && lba + sectors > self.sectors_count() {
            // Refused as a whole: what is inside must not have changed.
            return;
        }
        let range = usize::try_from(lba).unwrap()..usize::try_from(lba + sectors).unwrap();
        match op {
            Op::Flush => {}
            Op::Read if ret != 0 => {}
            Op::Read => self.check(slot, lba, sectors),
            _ if ret != 0 || op == Op::Discard => self.stamps[range].fill(UNKNOWN),
            Op::Write => self.stamps[range].fill(stamp),
            _ => self.stamps[range].fill(ZERO),
        }
    }

    fn check(&self, slot: u32, lba: u64, sectors: u64) {
        let len = usize::try_from(sectors * SECTOR_BYTES).unwrap();
        for (index, got) in (0u64..).zip(self.client.read_slot(slot, len)) {
            let sector = lba + index / WORDS;
            let stamp = self.stamps[usize::try_from(sector).unwrap()];
            let expected = word_of(stamp, lba * WORDS + index);
            assert!(
                stamp == UNKNOWN || got == expected,
                "sector {sector}, byte {} of a read of {sectors} sectors from {lba}: {got:#018x}, not {expected:#018x} \
                 of stamp {stamp} ({self})",
                index % WORDS * 8
            );
        }
    }

    /// Waits for everything in flight.
    pub fn drain(&mut self) {
        self.kick();
        while !self.inflight.is_empty() {
            self.poll();
        }
    }

    /// One request on queue 0, to its end.
    pub fn one(&mut self, op: Op, lba: u64, sectors: u64) {
        assert!(self.begin(op, 0, lba, sectors), "no room for {op:?} ({self})");
        self.drain();
    }

    /// Whether one request on queue 0 succeeds.
    pub fn succeeds(&mut self, op: Op, lba: u64, sectors: u64) -> bool {
        let before = (self.tolerates_errors, self.errors_count);
        self.tolerates_errors = true;
        self.one(op, lba, sectors);
        self.tolerates_errors = before.0;
        self.errors_count == before.1
    }

    /// Reads the whole disk back and checks it.
    pub fn verify(&mut self) {
        let step = self.client.slot_bytes() as u64 / SECTOR_BYTES;
        let queues = self.client.queues_count();
        let total = self.sectors_count();
        let (mut lba, mut turn) = (0, 0);
        while lba < total {
            let sectors = step.min(total - lba);
            turn = (turn + 1) % queues;
            if self.begin(Op::Read, turn, lba, sectors) {
                lba += sectors;
                self.client.kick(turn).expect("a kick");
            } else {
                self.poll();
            }
        }
        self.drain();
    }

    /// One random request of up to `sectors_max` sectors of the first `span` sectors, if there is room.
    pub fn random(&mut self, span: u64, sectors_max: u64) {
        // Sizes of all magnitudes alike.
        let top = 1 << self.entropy.below(u64::from(sectors_max.ilog2()) + 1);
        let sectors = (1 + self.entropy.below(top)).min(sectors_max).min(span);
        let lba = self.entropy.below(span - sectors + 1);
        let op = match self.entropy.below(100) {
            0..40 => Op::Read,
            40..85 => Op::Write,
            85..90 => Op::Flush,
            90..94 => Op::Discard,
            94..97 => Op::WriteZeroes(true),
            _ => Op::WriteZeroes(false),
        };
        let queue = usize::try_from(self.entropy.below(self.client.queues_count() as u64)).unwrap();
        if op == Op::Flush {
            self.begin(op, queue, 0, 0);
        } else {
            self.begin(op, queue, lba, sectors);
        }
    }

    /// Random requests for a number of rounds, in batches, then everything is read back.
    pub fn random_rounds(&mut self, rounds: u32, span: u64, sectors_max: u64) {
        for round in 0..rounds {
            self.random(span, sectors_max);
            if round % 4 == 0 {
                self.kick();
                self.poll();
            }
        }
        self.drain();
    }

    /// Random requests for a time; `until` may end them earlier.
    pub fn random_for(
        &mut self,
        time: Duration,
        span: u64,
        sectors_max: u64,
        mut until: impl FnMut(&Exercise) -> bool,
    ) {
        let end = Instant::now() + time;
        while Instant::now() < end && !until(self) {
            for _ in 0..8 {
                self.random(span, sectors_max);
            }
            self.kick();
            self.poll();
        }
    }

    /// The twin, for the next client of the same disk. What is in flight is in doubt.
    pub fn into_stamps(mut self) -> Vec<u64> {
        for request in self.inflight.values().filter(|r| r.op.changes()) {
            let (lba, end) = (request.lba, request.lba + request.sectors);
            self.stamps[usize::try_from(lba).unwrap()..usize::try_from(end).unwrap()].fill(UNKNOWN);
        }
        std::mem::take(&mut self.stamps)
    }
}

impl std::fmt::Display for Exercise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "seed {:#x}, {} queues, depth {}, {} requests done",
            self.seed,
            self.per_queue.len(),
            self.depth,
            self.completed_count
        )
    }
}

/// The seed of a test: `RINGMILL_TEST_SEED` replays another.
pub fn seed(default: u64) -> u64 {
    let text = std::env::var("RINGMILL_TEST_SEED").unwrap_or_default();
    let digits = text.trim_start_matches("0x");
    u64::from_str_radix(digits, if digits.len() < text.len() { 16 } else { 10 }).unwrap_or(default)
}

/// A client with `depth` slots of `slot_bytes` per queue.
pub fn connect(socket: &std::path::Path, queues: usize, depth: usize, slot_bytes: usize) -> Client {
    // A request without indirect tables takes up to four descriptors.
    let size = u16::try_from((4 * depth).next_power_of_two()).expect("a small depth");
    Client::connect(socket, queues, size, queues * depth, slot_bytes)
        .unwrap_or_else(|error| panic!("{error}"))
}
