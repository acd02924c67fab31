//! Loads that check what they read: a fill of the span, random reads and writes over it, a check of all of it.
//!
//! In: sectors as `stamp` makes them. Out: faults. Each block has a generation, counted up by every write, so that a
//! lost write is found as stale data. Owner: the load's thread, with the blocks of all lanes of a disk in one table.
//! **Invariant:** at most one request is in flight per block, so every read has exactly one right answer.

use ringmill_core::mem::Segment;
use ringmill_core::units::{bytes_u64, usize_of};

use super::engine::{Io, Workload};
use super::pattern::Stream;
use super::slots::Op;
use super::stamp::{Fault, STAMP_BYTES, Stamp};

/// Faults that are kept for the report; all are counted.
const FAULTS_KEPT: usize = 10;

/// What a pass does with the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Writes every block once.
    Fill,
    /// Reads and writes blocks at random.
    Mix,
    /// Reads every block once.
    Check,
}

impl Pass {
    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pass::Fill => "fill",
            Pass::Mix => "mix",
            Pass::Check => "check",
        }
    }
}

/// A block's state: its generation, or one of these.
const BUSY: u32 = 1 << 31;
/// Nobody knows what it contains: a write of it failed.
const UNKNOWN: u32 = BUSY - 1;

#[derive(Debug)]
struct Disk {
    blocks: Vec<u32>,
    /// The next block of a fill or check.
    cursor: usize,
}

/// The verifying workload over all disks of a load.
#[derive(Debug)]
pub(crate) struct Verify {
    pass: Pass,
    seed: u64,
    io_bytes: u64,
    read_threshold: u64,
    disks: Vec<Disk>,
    /// The disk of each lane.
    disk_of_lane: Vec<usize>,
    streams: Vec<Stream>,
    expected: Vec<u8>,
    got: Vec<u8>,
    /// The first faults with the number of their disk.
    pub(crate) faults: Vec<(usize, Fault)>,
    pub(crate) faults_count: u64,
    /// Sectors compared.
    pub(crate) checked_count: u64,
}

/// What a verifying load is about.
#[derive(Clone, Debug)]
pub(crate) struct VerifyOptions {
    pub(crate) seed: u64,
    /// A multiple of 512.
    pub(crate) io_bytes: u32,
    pub(crate) read_threshold: u64,
    /// Blocks of `io_bytes` of each disk.
    pub(crate) blocks_counts: Vec<u64>,
    pub(crate) disk_of_lane: Vec<usize>,
}

impl Verify {
    /// Blocks that are all taken for written once (generation 1).
    pub(crate) fn new(options: VerifyOptions) -> Verify {
        let VerifyOptions { seed, io_bytes, read_threshold, blocks_counts, disk_of_lane } = options;
        let disks = blocks_counts.iter().map(|&count| vec![1; usize_of(count)]);
        let streams = (0u64..)
            .zip(&disk_of_lane)
            .map(|(lane, &disk)| Stream::new(seed, lane, blocks_counts[disk], 0))
            .collect();
        let io_len = usize_of(u64::from(io_bytes));
        Verify {
            pass: Pass::Fill,
            seed,
            io_bytes: u64::from(io_bytes),
            read_threshold,
            disks: disks.map(|blocks| Disk { blocks, cursor: 0 }).collect(),
            disk_of_lane,
            streams,
            expected: vec![0; io_len],
            got: vec![0; io_len],
            faults: Vec::new(),
            faults_count: 0,
            checked_count: 0,
        }
    }

    /// Begins a pass.
    pub(crate) fn start(&mut self, pass: Pass) {
        self.pass = pass;
        for disk in &mut self.disks {
            disk.cursor = 0;
        }
    }

    fn block(&self, io: Io) -> usize {
        usize_of(io.offset_bytes / self.io_bytes)
    }

    /// The bytes of a block's version, into `expected`.
    fn make(&mut self, io: Io, generation: u32) {
        for (number, sector) in (0u64..).zip(self.expected.chunks_exact_mut(STAMP_BYTES)) {
            let offset_bytes = io.offset_bytes + number * bytes_u64(STAMP_BYTES);
            Stamp { seed: self.seed, offset_bytes, generation }.write(sector);
        }
    }

    #[cold]
    fn note_faults(&mut self, disk: usize, io: Io, generation: u32) {
        let sectors =
            self.expected.chunks_exact(STAMP_BYTES).zip(self.got.chunks_exact(STAMP_BYTES));
        for (number, (expected, got)) in (0u64..).zip(sectors) {
            if expected == got {
                continue;
            }
            self.faults_count += 1;
            if self.faults.len() < FAULTS_KEPT {
                let offset_bytes = io.offset_bytes + number * bytes_u64(STAMP_BYTES);
                let stamp = Stamp { seed: self.seed, offset_bytes, generation };
                self.faults.push((disk, stamp.diagnose(expected, got)));
            }
        }
    }
}

/// A random block that no request uses: the first one from there on. There is one, as the options demand more blocks
/// than requests in flight.
fn idle_block(blocks: &[u32], from: usize) -> Option<usize> {
    let is_idle = |at: &usize| blocks[*at] & BUSY == 0;
    (from..blocks.len()).chain(0..from).find(is_idle)
}

impl Workload for Verify {
    const TOUCHES_DATA: bool = true;

    fn next(&mut self, lane: usize) -> Option<Io> {
        let disk = &mut self.disks[self.disk_of_lane[lane]];
        let (block, op) = match self.pass {
            Pass::Fill | Pass::Check => {
                let block = disk.cursor;
                if block >= disk.blocks.len() {
                    return None;
                }
                disk.cursor += 1;
                (block, if self.pass == Pass::Fill { Op::Write } else { Op::Read })
            }
            Pass::Mix => {
                let (from, chance) = self.streams[lane].random();
                let block = idle_block(&disk.blocks, usize_of(from))?;
                (block, if chance < self.read_threshold { Op::Read } else { Op::Write })
            }
        };
        disk.blocks[block] |= BUSY;
        Some(Io { op, offset_bytes: bytes_u64(block) * self.io_bytes })
    }

    fn is_over(&self) -> bool {
        self.pass != Pass::Mix && self.disks.iter().all(|disk| disk.cursor >= disk.blocks.len())
    }

    fn before(&mut self, lane: usize, io: Io, data: Segment) {
        let (disk, block) = (self.disk_of_lane[lane], self.block(io));
        match io.op {
            Op::Write => {
                let old = self.disks[disk].blocks[block] & !BUSY;
                let generation = match (self.pass, old) {
                    (Pass::Fill, _) | (_, UNKNOWN) => 1,
                    (_, old) => old + 1,
                };
                self.disks[disk].blocks[block] = generation | BUSY;
                self.make(io, generation);
                data.write_from(&self.expected);
            }
            // A read that moves nothing must not find the right bytes left in the slot.
            Op::Read => {
                for at in (0..data.len_bytes()).step_by(STAMP_BYTES) {
                    data.sub(at, 16).fill_zero();
                }
            }
            Op::Flush => {}
        }
    }

    fn after(&mut self, lane: usize, io: Io, data: Segment, ok: bool) {
        let (disk, block) = (self.disk_of_lane[lane], self.block(io));
        let generation = self.disks[disk].blocks[block] & !BUSY;
        self.disks[disk].blocks[block] = generation;
        match (io.op, ok) {
            (Op::Write, false) => self.disks[disk].blocks[block] = UNKNOWN,
            (Op::Read, true) if generation != UNKNOWN => {
                self.make(io, generation);
                data.read_into(&mut self.got);
                self.checked_count += bytes_u64(self.got.len() / STAMP_BYTES);
                if self.expected != self.got {
                    self.note_faults(disk, io, generation);
                }
            }
            _ => {}
        }
    }
}

/// One flush per disk, sent through its first lane.
#[derive(Debug)]
pub(crate) struct FlushAll {
    /// Whether each lane still has one to send.
    pub(crate) owed: Vec<bool>,
}

impl Workload for FlushAll {
    const TOUCHES_DATA: bool = false;

    fn next(&mut self, lane: usize) -> Option<Io> {
        std::mem::take(&mut self.owed[lane]).then_some(Io { op: Op::Flush, offset_bytes: 0 })
    }

    fn is_over(&self) -> bool {
        !self.owed.contains(&true)
    }
}

#[cfg(test)]
mod tests {
    use ringmill_core::mem::MemTable;
    use ringmill_core::units::GuestAddr;

    use super::super::pattern::read_threshold;
    use super::*;

    fn verify(blocks: u64) -> (Verify, MemTable, Segment) {
        let options = VerifyOptions {
            seed: 5,
            io_bytes: 1024,
            read_threshold: read_threshold(50),
            blocks_counts: vec![blocks],
            disk_of_lane: vec![0, 0],
        };
        let table = MemTable::anonymous(GuestAddr(0), 4096).unwrap();
        let segment = table.translate(GuestAddr(0), 1024, &mut 0).unwrap();
        (Verify::new(options), table, segment)
    }

    /// A disk that loses one write in `lose_one_in`.
    fn mix(lose_one_in: u64) -> Verify {
        let (mut verify, _table, data) = verify(16);
        let mut disk = vec![0u8; 16 * 1024];
        let mut count = 0;
        for pass in [Pass::Fill, Pass::Mix, Pass::Check] {
            verify.start(pass);
            for _ in 0..500 {
                let Some(io) = verify.next(0) else { break };
                let at = usize::try_from(io.offset_bytes).unwrap();
                verify.before(0, io, data);
                if io.op == Op::Write {
                    count += 1;
                    if count % lose_one_in != 0 {
                        data.read_into(&mut disk[at..at + 1024]);
                    }
                } else {
                    data.write_from(&disk[at..at + 1024]);
                }
                verify.after(0, io, data, true);
            }
        }
        assert!(verify.is_over());
        verify
    }

    #[test]
    fn a_good_disk_passes_and_every_sector_is_checked() {
        let verify = mix(u64::MAX);
        assert_eq!(verify.faults_count, 0, "{:?}", verify.faults);
        assert!(verify.checked_count > 32 + 2 * 200);
    }

    #[test]
    fn a_lost_write_is_found_as_stale_data() {
        let verify = mix(97);
        assert!(verify.faults_count > 0);
        assert!(verify.faults[0].1.to_string().contains("stale"), "{:?}", verify.faults);
        assert!(verify.faults.len() <= FAULTS_KEPT);
    }

    #[test]
    fn blocks_in_flight_are_left_alone() {
        let (mut verify, _table, _) = verify(4);
        verify.start(Pass::Mix);
        let mut seen: Vec<u64> =
            (0..4).map(|lane| verify.next(lane % 2).unwrap().offset_bytes).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1024, 2048, 3072]);
        assert_eq!(verify.next(0), None);
    }

    #[test]
    fn a_failed_write_leaves_a_block_that_is_not_checked() {
        let (mut verify, _table, data) = verify(1);
        let io = verify.next(0).unwrap();
        verify.before(0, io, data);
        verify.after(0, io, data, false);
        verify.start(Pass::Check);
        let io = verify.next(0).unwrap();
        verify.before(0, io, data);
        verify.after(0, io, data, true);
        assert_eq!((verify.faults_count, verify.checked_count), (0, 0));
    }
}
