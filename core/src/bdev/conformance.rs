//! The suite that every block driver passes.
//!
//! Flow: a driver's test makes a bdev → [`Suite`] opens channels in [`TestBed`]s and drives them like a worker would,
//! against a naive twin in memory. Owner: tests; failures panic, as tests do.
//! **Invariant:** chance comes from one seed only, and a failure names it.

mod bed;

use std::sync::Arc;
use std::time::Instant;

use crate::io::{IoFlags, IoOp, Tag};
use crate::limits::SECTOR_BYTES;
use crate::mem::Segment;
use crate::reactor::Entropy;
use crate::status::IoStatus;
use crate::units::{bytes_u64, index, usize_of};

use super::Bdev;
use bed::{ARENA_BYTES, ARENAS, HANG, gather};

pub use bed::TestBed;

const SECTOR: u64 = SECTOR_BYTES as u64;

/// The longest transfer of the random tests.
const TRANSFER_BYTES_MAX: u64 = 1 << 20;

/// The part of the disk that the random tests work on.
const WINDOW_BYTES_MAX: u64 = 8 << 20;

/// Spreads `data` over the segments.
fn scatter(segments: &[Segment], mut data: &[u8]) {
    for segment in segments {
        data = &data[segment.write_from(data)..];
    }
}

/// `len_bytes` of noise.
fn noise(entropy: &mut Entropy, len_bytes: usize) -> Vec<u8> {
    let words = len_bytes.div_ceil(8);
    let mut bytes: Vec<u8> = (0..words).flat_map(|_| entropy.next_u64().to_le_bytes()).collect();
    bytes.truncate(len_bytes);
    bytes
}

/// How memory of a request is cut up.
#[derive(Clone, Copy, Debug)]
enum Cutting {
    /// One page-aligned segment.
    Whole,
    /// So many segments of odd lengths at odd addresses.
    Odd(usize),
    /// So many segments of whole sectors at sector addresses.
    Sectors(usize),
}

/// Segments for `len_bytes` in an arena.
fn cut(
    bed: &TestBed,
    entropy: &mut Entropy,
    arena: usize,
    len_bytes: u64,
    cutting: Cutting,
) -> Vec<Segment> {
    let (count, unit, gap) = match cutting {
        Cutting::Whole => return vec![bed.segment(arena, 0, usize_of(len_bytes))],
        Cutting::Odd(count) => (count, 1, 7),
        Cutting::Sectors(count) => (count, SECTOR, 3),
    };
    let units = len_bytes / unit;
    let count = bytes_u64(count).clamp(1, units);
    let mut segments = Vec::new();
    let (mut left, mut at) = (units, 0);
    for i in 0..count {
        let others = count - i - 1;
        // Leaves at least one unit for each of the others; the last takes the rest.
        let fair = (left / (others + 1) * 2).clamp(1, left - others);
        let take = if others == 0 { left } else { 1 + entropy.below(fair) };
        let take = take.min(left - others);
        at += unit * entropy.below(gap);
        segments.push(bed.segment(arena, usize_of(at), usize_of(take * unit)));
        at += take * unit;
        left -= take;
    }
    segments
}

/// What the disk should contain, in the plainest way.
struct Twin {
    bytes: Vec<u8>,
    /// By sector: false after a discard.
    known: Vec<bool>,
}

impl Twin {
    fn new(len_bytes: u64) -> Twin {
        let sectors = usize_of(len_bytes / SECTOR);
        Twin { bytes: vec![0; usize_of(len_bytes)], known: vec![false; sectors] }
    }

    fn put(&mut self, at_bytes: u64, data: &[u8]) {
        let at = usize_of(at_bytes);
        self.bytes[at..at + data.len()].copy_from_slice(data);
        self.know(at_bytes, bytes_u64(data.len()), true);
    }

    fn know(&mut self, at_bytes: u64, len_bytes: u64, known: bool) {
        self.known[usize_of(at_bytes / SECTOR)..usize_of((at_bytes + len_bytes) / SECTOR)]
            .fill(known);
    }

    #[track_caller]
    fn check(&self, at_bytes: u64, data: &[u8], what: &dyn std::fmt::Debug) {
        for (i, sector) in data.chunks(index(SECTOR_BYTES)).enumerate() {
            let number = usize_of(at_bytes / SECTOR) + i;
            let at = number * index(SECTOR_BYTES);
            if self.known[number] && self.bytes[at..at + sector.len()] != *sector {
                let byte = sector.iter().zip(&self.bytes[at..]).position(|(a, b)| a != b);
                panic!("sector {number} differs at byte {byte:?}, read by {what:?}");
            }
        }
    }
}

/// One request of the random test.
struct Flying {
    tag: Tag,
    op: IoOp,
    flags: IoFlags,
    offset_bytes: u64,
    len_bytes: u64,
    arena: usize,
    cutting: Cutting,
    segments: Vec<Segment>,
    data: Vec<u8>,
}

impl std::fmt::Debug for Flying {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Flying { tag, op, flags, offset_bytes, len_bytes, cutting, segments, .. } = self;
        write!(f, "{op:?} {flags:?} at {offset_bytes}+{len_bytes} as {tag:?}, ")?;
        write!(f, "{cutting:?} in {} segments", segments.len())
    }
}

/// Prints how to repeat a failure.
struct SeedOnPanic(u64);

impl Drop for SeedOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to repeat this failure, run the same test with RINGMILL_SEED={}", self.0);
        }
    }
}

/// The suite for one bdev.
#[derive(Clone)]
pub struct Suite {
    /// The device under test.
    pub bdev: Arc<dyn Bdev>,
    /// Where chance starts.
    pub seed: u64,
    /// Requests of the random test.
    pub requests_count: usize,
    /// Requests use memory that is pinned and known to the ring.
    pub pinned: bool,
}

impl std::fmt::Debug for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Suite").field("seed", &self.seed).finish_non_exhaustive()
    }
}

impl Suite {
    /// A suite with the seed of `RINGMILL_SEED`, or a new one.
    #[must_use]
    pub fn new(bdev: Arc<dyn Bdev>) -> Suite {
        let told = std::env::var("RINGMILL_SEED").ok().and_then(|text| text.parse().ok());
        let fresh = crate::reactor::ticks_now() & 0xffff_ffff;
        Suite { bdev, seed: told.unwrap_or(fresh), requests_count: 4000, pinned: false }
    }

    fn bed(&self) -> TestBed {
        if self.pinned { TestBed::pinned(&*self.bdev) } else { TestBed::new(&*self.bdev) }
    }

    fn size_bytes(&self) -> u64 {
        self.bdev.info().size_bytes()
    }

    fn window_bytes(&self) -> u64 {
        self.size_bytes().min(WINDOW_BYTES_MAX)
    }

    /// What every device passes, also one that keeps no data.
    ///
    /// # Panics
    /// On the first failure, as all tests here.
    pub fn run_without_data(&self) {
        let _seed = SeedOnPanic(self.seed);
        self.geometry();
        self.bounds();
        self.exactly_once();
        self.removal();
    }

    /// Everything.
    ///
    /// # Panics
    /// On the first failure.
    pub fn run(&self) {
        let _seed = SeedOnPanic(self.seed);
        self.run_without_data();
        self.many_segments();
        self.read_your_writes();
        self.neighbours();
        self.flushes();
        self.ranges();
    }

    /// Sizes and limits make sense.
    ///
    /// # Panics
    /// On failure.
    pub fn geometry(&self) {
        let info = self.bdev.info();
        let geometry = info.geometry();
        geometry.check().expect("a geometry that passes its own check");
        let (block, physical) = (geometry.block_bytes, geometry.physical_block_bytes);
        assert!(physical >= block && physical.is_multiple_of(block), "physical block {physical}");
        assert_eq!(info.size_bytes(), info.blocks_count() * u64::from(block));
        if geometry.discard {
            let granularity = geometry.discard_granularity_bytes;
            assert!(granularity.is_multiple_of(block), "discard granularity {granularity}");
        }
        assert_eq!(self.bdev.rescan().expect("a rescan"), info.blocks_count());
    }

    /// Nothing reaches beyond the end, wraps, or is of half a sector; nothing is a fine length.
    ///
    /// # Panics
    /// On failure.
    pub fn bounds(&self) {
        let mut bed = self.bed();
        let size = self.size_bytes();
        let segments = [bed.segment(0, 0, 4096), bed.segment(1, 0, 4096)];
        let mut expect = |op: IoOp, offset: u64, len: u64, wanted: IoStatus| {
            let pieces: &[Segment] = match (op.has_data(), len) {
                (false, _) | (_, 0) => &[],
                (true, 512) => &[segments[0].sub(0, 512)],
                (true, 4096) => &segments[..1],
                (true, _) => &segments,
            };
            let got = bed.run(op, IoFlags::NONE, offset, len, pieces);
            assert_eq!(got, wanted, "{op:?} at {offset} of {len} bytes on {size}");
        };
        for op in [IoOp::Read, IoOp::Write, IoOp::Discard, IoOp::WriteZeroes] {
            for offset in [size, size + SECTOR, size - SECTOR, 1 << 62, u64::MAX - 511] {
                expect(op, offset, 8192, IoStatus::Range);
            }
            expect(op, size, 512, IoStatus::Range);
            expect(op, 0, 0, IoStatus::Ok);
            expect(op, size, 0, IoStatus::Ok);
            expect(op, 1, 512, IoStatus::Invalid);
        }
        expect(IoOp::Discard, u64::MAX - 511, u64::MAX - 511, IoStatus::Range);
        expect(IoOp::Read, size - 4096, 4096, IoStatus::Ok);
        expect(IoOp::Read, size - 512, 512, IoStatus::Ok);
        // The segments must be what the length says.
        let short = [segments[0].sub(0, 512)];
        let got = bed.run(IoOp::Read, IoFlags::NONE, 0, 4096, &short);
        assert_eq!(got, IoStatus::Invalid, "fewer segments than bytes");
        bed.finish();
    }

    /// Good and bad requests in large numbers: each ends once (the bed checks).
    ///
    /// # Panics
    /// On failure.
    pub fn exactly_once(&self) {
        let mut bed = self.bed();
        let mut entropy = Entropy::seeded(self.seed);
        let sectors = self.window_bytes() / SECTOR;
        let mut ended = 0;
        let mut taken = 0;
        let start = Instant::now();
        while ended < 2000 {
            let at = entropy.below(sectors + 8) * SECTOR;
            let segment = bed.segment(taken % ARENAS, 0, 512);
            let fits = at + SECTOR <= self.size_bytes();
            let op = if entropy.below(8) == 0 { IoOp::Flush } else { IoOp::Read };
            let segments: &[Segment] = if op == IoOp::Flush { &[] } else { &[segment] };
            let len = if op == IoOp::Flush { 0 } else { SECTOR };
            if taken < 2000 && bed.offer(op, IoFlags::NONE, at, len, segments).is_some() {
                taken += 1;
            }
            if !fits || entropy.below(4) == 0 || taken == 2000 {
                ended += bed.turn(|_, _| {});
            }
            assert!(start.elapsed() < HANG, "{} requests are lost", bed.out_count());
        }
        bed.finish();
    }

    /// After the device is gone every request says so.
    ///
    /// # Panics
    /// On failure.
    pub fn removal(&self) {
        let mut bed = self.bed();
        for arena in 0..8 {
            let segment = bed.segment(arena, 0, 4096);
            let _ = bed.offer(IoOp::Read, IoFlags::NONE, 0, 4096, &[segment]);
        }
        bed.remove();
        let segment = bed.segment(0, 0, 512);
        for op in [IoOp::Read, IoOp::Write] {
            assert_eq!(bed.run(op, IoFlags::NONE, 0, 512, &[segment]), IoStatus::Gone);
        }
        assert_eq!(bed.run(IoOp::Flush, IoFlags::NONE, 0, 0, &[]), IoStatus::Gone);
        bed.finish();
    }

    /// Requests of 1 to 2,000 segments, aligned and not, and nothing outside the segments is touched.
    ///
    /// # Panics
    /// On failure.
    pub fn many_segments(&self) {
        let mut bed = self.bed();
        let mut entropy = Entropy::seeded(self.seed);
        let window = self.window_bytes();
        for count in [1, 2, 3, 4, 5, 17, 127, 160, 161, 700, 1024, 1025, 2000] {
            for cutting in [Cutting::Odd(count), Cutting::Sectors(count)] {
                let len = (bytes_u64(count) * SECTOR).next_multiple_of(4096).min(window);
                let offset = entropy.below((window - len) / SECTOR + 1) * SECTOR;
                let out = cut(&bed, &mut entropy, 0, len, cutting);
                let data = noise(&mut entropy, usize_of(len));
                scatter(&out, &data);
                let status = bed.run(IoOp::Write, IoFlags::NONE, offset, len, &out);
                assert_eq!(status, IoStatus::Ok, "write, {cutting:?}");
                let back = cut(&bed, &mut entropy, 1, len, cutting);
                let arena = bed.segment(1, 0, ARENA_BYTES);
                arena.fill_zero();
                let status = bed.run(IoOp::Read, IoFlags::NONE, offset, len, &back);
                assert_eq!(status, IoStatus::Ok, "read, {cutting:?}");
                assert!(gather(&back) == data, "{cutting:?} at {offset}+{len} came back different");
                back.iter().for_each(Segment::fill_zero);
                let rest = gather(&[arena]);
                assert!(rest.iter().all(|&b| b == 0), "{cutting:?}: memory beside the segments");
            }
        }
        bed.finish();
    }

    /// Random requests at queue depths 1 to 64 against the twin.
    ///
    /// # Panics
    /// On failure.
    pub fn read_your_writes(&self) {
        let mut bed = self.bed();
        let mut entropy = Entropy::seeded(self.seed);
        let window = self.window_bytes();
        let mut twin = Twin::new(window);
        let mut at = 0;
        while at < window {
            let len = (window - at).min(TRANSFER_BYTES_MAX);
            let data = noise(&mut entropy, usize_of(len));
            assert_eq!(bed.write(at, &data), IoStatus::Ok, "filling at {at}");
            twin.put(at, &data);
            at += len;
        }
        let mut flying: Vec<Flying> = Vec::new();
        let mut depth = 1;
        let mut last_progress = Instant::now();
        let (mut started, mut ended) = (0, 0);
        while ended < self.requests_count {
            if started % 50 == 0 {
                depth = 1 << entropy.below(7);
            }
            if started < self.requests_count
                && flying.len() < depth
                && let Some(next) = self.throw(&mut bed, &mut entropy, &flying)
            {
                flying.push(next);
                started += 1;
                continue;
            }
            let mut landed = Vec::new();
            bed.turn(|tag, status| landed.push((tag, status)));
            for (tag, status) in landed {
                let at = flying.iter().position(|f| f.tag == tag).expect("a known tag");
                let request = flying.swap_remove(at);
                assert_eq!(status, IoStatus::Ok, "{request:?}");
                settle(&mut twin, &request);
                ended += 1;
                last_progress = Instant::now();
            }
            assert!(last_progress.elapsed() < HANG, "no answer to {flying:?}");
        }
        let all = (0..window).step_by(usize_of(TRANSFER_BYTES_MAX));
        for at in all {
            let len = usize_of((window - at).min(TRANSFER_BYTES_MAX));
            let data = bed.read(at, len).expect("a read");
            twin.check(at, &data, &"the last look");
        }
        bed.finish();
    }

    /// Makes up one request that overlaps none in flight and submits it.
    fn throw(&self, bed: &mut TestBed, entropy: &mut Entropy, flying: &[Flying]) -> Option<Flying> {
        let window = self.window_bytes();
        let geometry = self.bdev.info().geometry();
        let (op, flags) = pick_op(entropy, (geometry.discard, geometry.write_zeroes));
        let unit = if entropy.below(2) == 0 { SECTOR } else { 4096 };
        let longest = match entropy.below(10) {
            0..=6 => 8 * SECTOR,
            7 | 8 => 128 << 10,
            _ => TRANSFER_BYTES_MAX,
        };
        let len_bytes = (1 + entropy.below(longest.div_ceil(unit))) * unit;
        let len_bytes = len_bytes.min(TRANSFER_BYTES_MAX);
        let offset_bytes = entropy.below((window - len_bytes) / unit + 1) * unit;
        let collides = |f: &Flying| {
            offset_bytes < f.offset_bytes + f.len_bytes && f.offset_bytes < offset_bytes + len_bytes
        };
        if flying.iter().any(collides) && op != IoOp::Flush {
            return None;
        }
        let (offset_bytes, len_bytes) =
            if op == IoOp::Flush { (0, 0) } else { (offset_bytes, len_bytes) };
        let arena = (0..ARENAS).find(|&a| flying.iter().all(|f| f.arena != a))?;
        let cutting = match entropy.below(6) {
            0 | 1 => Cutting::Whole,
            2 => Cutting::Odd(1 + usize_of(entropy.below(6))),
            3 => Cutting::Odd(1 + usize_of(entropy.below(300))),
            4 => Cutting::Sectors(1 + usize_of(entropy.below(6))),
            _ => Cutting::Sectors(1 + usize_of(entropy.below(300))),
        };
        let mut segments = Vec::new();
        let mut data = Vec::new();
        if op.has_data() {
            segments = cut(bed, entropy, arena, len_bytes, cutting);
        }
        if op == IoOp::Write {
            data = noise(entropy, usize_of(len_bytes));
            scatter(&segments, &data);
        }
        let tag = bed.offer(op, flags, offset_bytes, len_bytes, &segments)?;
        Some(Flying { tag, op, flags, offset_bytes, len_bytes, arena, cutting, segments, data })
    }

    /// Two reactors write neighbouring sectors of the same 4 KiB blocks; nobody's sector is lost.
    ///
    /// # Panics
    /// On failure.
    pub fn neighbours(&self) {
        const BLOCKS: u64 = 4;
        const ROUNDS: u64 = 60;
        let side = |side: u64| {
            let suite = self.clone();
            std::thread::spawn(move || {
                let mut bed = suite.bed();
                let mut entropy = Entropy::seeded(suite.seed ^ side);
                let sectors: Vec<u64> = (0..BLOCKS * 8).filter(|s| s % 2 == side).collect();
                for round in 0..ROUNDS {
                    // All of this side's sectors at once, so that both sides are always in each other's way.
                    let data = noise(&mut entropy, 512);
                    let segment = bed.segment(0, usize_of(round % 2) * 512, 512);
                    segment.write_from(&data);
                    let mut todo = sectors.clone();
                    let start = Instant::now();
                    while !todo.is_empty() || bed.out_count() > 0 {
                        todo.retain(|s| {
                            let at = s * SECTOR;
                            bed.offer(IoOp::Write, IoFlags::NONE, at, SECTOR, &[segment]).is_none()
                        });
                        bed.turn(|_, status| assert_eq!(status, IoStatus::Ok));
                        assert!(start.elapsed() < HANG, "writers of one block starve each other");
                    }
                    for &sector in &sectors {
                        let got = bed.read(sector * SECTOR, 512).expect("a read");
                        assert!(got == data, "round {round}: sector {sector} lost its write");
                    }
                }
                bed.finish();
            })
        };
        let sides = [side(0), side(1)];
        for side in sides {
            side.join().expect("both sides keep their sectors");
        }
    }

    /// Flushes, alone and among writes; writes that are stable by themselves.
    ///
    /// # Panics
    /// On failure.
    pub fn flushes(&self) {
        let mut bed = self.bed();
        assert_eq!(bed.run(IoOp::Flush, IoFlags::NONE, 0, 0, &[]), IoStatus::Ok);
        let segment = bed.segment(0, 0, 4096);
        for round in 0..32_u8 {
            segment.write_from(&[round; 4096]);
            let flags = if round % 2 == 0 { IoFlags::FUA } else { IoFlags::NONE };
            assert_eq!(bed.run(IoOp::Write, flags, 4096, 4096, &[segment]), IoStatus::Ok);
            // A flush behind other writes covers the one above, whatever order they end in.
            let others = [bed.segment(1, 0, 4096), bed.segment(2, 0, 512)];
            let _ = bed.offer(IoOp::Write, IoFlags::FUA, 8192, 4096, &others[..1]);
            let _ = bed.offer(IoOp::Write, IoFlags::FUA, 16384, 512, &others[1..]);
            assert_eq!(bed.run(IoOp::Flush, IoFlags::NONE, 0, 0, &[]), IoStatus::Ok);
            bed.drain();
            assert_eq!(bed.read(4096, 4096), Ok(vec![round; 4096]));
        }
        bed.finish();
    }

    /// Write-zeroes reads as zeroes; discards and zeroes leave their neighbours alone.
    ///
    /// # Panics
    /// On failure.
    pub fn ranges(&self) {
        let mut bed = self.bed();
        let geometry = self.bdev.info().geometry().clone();
        let span = (2 << 20).min(self.window_bytes());
        let full = vec![0xa5; usize_of(span)];
        let unmap = IoFlags::MAY_UNMAP;
        let flag_sets = [IoFlags::NONE, unmap, IoFlags::FUA, unmap.with(IoFlags::FUA)];
        let cases = [
            (0, 4096),
            (512, 512),
            (4096 - 512, 1024),
            (4096 + 512, 12288),
            (8192, span / 2),
            (512, span - 1024),
            (0, span),
        ];
        for (offset, len) in cases {
            for flags in flag_sets {
                assert_eq!(bed.write(0, &full), IoStatus::Ok);
                let status = bed.run(IoOp::WriteZeroes, flags, offset, len, &[]);
                if !geometry.write_zeroes {
                    assert_eq!(status, IoStatus::Unsupported, "write-zeroes that is not offered");
                    continue;
                }
                assert_eq!(status, IoStatus::Ok, "write-zeroes {flags:?} at {offset}+{len}");
                let mut wanted = full.clone();
                wanted[usize_of(offset)..usize_of(offset + len)].fill(0);
                let got = bed.read(0, full.len()).expect("a read");
                assert!(got == wanted, "write-zeroes {flags:?} at {offset}+{len}");
            }
            if geometry.discard {
                assert_eq!(bed.write(0, &full), IoStatus::Ok);
                let status = bed.run(IoOp::Discard, IoFlags::NONE, offset, len, &[]);
                assert_eq!(status, IoStatus::Ok, "discard at {offset}+{len}");
                let got = bed.read(0, full.len()).expect("a read");
                let (from, to) = (usize_of(offset), usize_of(offset + len));
                let beside = got[..from].iter().chain(&got[to..]).all(|&b| b == 0xa5);
                assert!(beside, "a discard at {offset}+{len} changed its neighbours");
                let first = got.get(from).copied().unwrap_or(0);
                assert!(first == 0 || first == 0xa5, "a discard made {first:#x} up");
            }
        }
        bed.finish();
    }

    /// After `change`, which sets the backing store to that many blocks, the new size holds for open channels too.
    ///
    /// # Panics
    /// On failure.
    pub fn resize(&self, blocks_count: u64, change: impl FnOnce()) {
        let _seed = SeedOnPanic(self.seed);
        let mut bed = self.bed();
        let info = self.bdev.info();
        let block = usize_of(u64::from(info.geometry().block_bytes));
        assert!(bed.read(info.size_bytes() - bytes_u64(block), block).is_ok());
        change();
        assert_eq!(self.bdev.rescan().expect("a rescan"), blocks_count);
        info.set_blocks(blocks_count);
        assert!(bed.read(info.size_bytes() - bytes_u64(block), block).is_ok(), "the last block");
        assert_eq!(bed.read(info.size_bytes(), block), Err(IoStatus::Range));
        bed.finish();
    }

    /// A read-only device reads, flushes, and refuses everything else.
    ///
    /// # Panics
    /// On failure.
    pub fn refuses_changes(&self) {
        let _seed = SeedOnPanic(self.seed);
        assert!(self.bdev.info().geometry().read_only);
        self.geometry();
        let mut bed = self.bed();
        let before = bed.read(0, 4096).expect("a read");
        assert_eq!(bed.write(0, &[1; 4096]), IoStatus::ReadOnly);
        for op in [IoOp::Discard, IoOp::WriteZeroes] {
            assert_eq!(bed.run(op, IoFlags::NONE, 0, 4096, &[]), IoStatus::ReadOnly);
        }
        assert_eq!(bed.run(IoOp::Flush, IoFlags::NONE, 0, 0, &[]), IoStatus::Ok);
        assert_eq!(bed.read(0, 4096), Ok(before));
        bed.finish();
    }
}

fn pick_op(entropy: &mut Entropy, (discards, zeroes): (bool, bool)) -> (IoOp, IoFlags) {
    let flags = match entropy.below(8) {
        0 => IoFlags::FUA,
        1..=3 => IoFlags::MAY_UNMAP,
        _ => IoFlags::NONE,
    };
    match entropy.below(20) {
        0..=8 => (IoOp::Read, IoFlags::NONE),
        9..=16 if flags == IoFlags::MAY_UNMAP => (IoOp::Write, IoFlags::NONE),
        9..=16 => (IoOp::Write, flags),
        17 if zeroes => (IoOp::WriteZeroes, flags),
        18 if discards => (IoOp::Discard, IoFlags::NONE),
        _ => (IoOp::Flush, IoFlags::NONE),
    }
}

/// Tells the twin of a request that succeeded, or checks what it read.
fn settle(twin: &mut Twin, request: &Flying) {
    let (at, len) = (request.offset_bytes, request.len_bytes);
    match request.op {
        IoOp::Read => twin.check(at, &gather(&request.segments), request),
        IoOp::Write => twin.put(at, &request.data),
        IoOp::WriteZeroes => twin.put(at, &vec![0; usize_of(len)]),
        IoOp::Discard => twin.know(at, len, false),
        IoOp::Flush => {}
    }
}
