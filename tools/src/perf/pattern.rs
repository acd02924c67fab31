//! HOT PATH
//! Which blocks a load touches: random or in order, reads or writes or both.
//!
//! Owner: the load's thread. One stream per lane, each with its own seed, so that a load repeats for the same options.

use ringmill_core::reactor::Entropy;

use super::engine::{Io, Workload};
use super::slots::Op;

/// The order of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Any block, evenly.
    Random,
    /// One after the other, from a place of the lane's own on, round and round.
    Sequential,
}

/// A lane's blocks.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    entropy: Entropy,
    blocks_count: u64,
    cursor: u64,
}

impl Stream {
    /// A stream over `blocks_count` blocks that starts, when in order, at `first`.
    #[cold]
    pub(crate) fn new(seed: u64, lane: u64, blocks_count: u64, first: u64) -> Stream {
        // One step of the generator keeps neighbouring seeds apart.
        let seed = Entropy::seeded(seed ^ lane.wrapping_mul(0x9e37_79b9_7f4a_7c15)).next_u64();
        Stream { entropy: Entropy::seeded(seed), blocks_count, cursor: first }
    }

    /// Any block, and 32 further random bits.
    #[inline]
    pub(crate) fn random(&mut self) -> (u64, u64) {
        let bits = self.entropy.next_u64();
        // The high half of the product is the block: even within 2^-64 of its weight, and no division.
        let product = u128::from(bits) * u128::from(self.blocks_count);
        let block = u64::try_from(product >> 64).unwrap_or(0);
        (block, bits & 0xffff_ffff)
    }

    #[inline]
    fn following(&mut self) -> u64 {
        let block = self.cursor;
        self.cursor = if block + 1 >= self.blocks_count { 0 } else { block + 1 };
        block
    }
}

/// Compares with 32 random bits: below it, the request is a read.
#[must_use]
pub(crate) fn read_threshold(read_percent: u32) -> u64 {
    (u64::from(read_percent) << 32) / 100
}

/// What a lane requests.
#[derive(Clone, Debug)]
pub(crate) struct LanePattern {
    pub(crate) order: Order,
    pub(crate) io_bytes: u64,
    /// From [`read_threshold`].
    pub(crate) read_threshold: u64,
    pub(crate) stream: Stream,
}

/// Reads and writes that do not look at data.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    pub(crate) lanes: Box<[LanePattern]>,
}

impl Workload for Pattern {
    const TOUCHES_DATA: bool = false;

    #[inline]
    fn next(&mut self, lane: usize) -> Option<Io> {
        let lane = &mut self.lanes[lane];
        let (mut block, chance) = lane.stream.random();
        if lane.order == Order::Sequential {
            block = lane.stream.following();
        }
        let op = if chance < lane.read_threshold { Op::Read } else { Op::Write };
        Some(Io { op, offset_bytes: block * lane.io_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(order: Order, read_percent: u32) -> Pattern {
        let lanes = (0..2).map(|lane| LanePattern {
            order,
            io_bytes: 4096,
            read_threshold: read_threshold(read_percent),
            stream: Stream::new(7, lane, 100, 50 * lane),
        });
        Pattern { lanes: lanes.collect() }
    }

    #[test]
    fn shares_of_reads_are_kept_and_blocks_are_even() {
        for percent in [0, 1, 30, 99, 100] {
            let mut pattern = pattern(Order::Random, percent);
            let (mut reads, mut seen) = (0, [0u32; 100]);
            for _ in 0..100_000 {
                let io = pattern.next(0).unwrap();
                reads += u32::from(io.op == Op::Read);
                seen[usize::try_from(io.offset_bytes / 4096).unwrap()] += 1;
            }
            assert!(reads.abs_diff(percent * 1000) < 600, "{percent} %: {reads}");
            assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
        }
    }

    #[test]
    fn lanes_differ_and_repeat() {
        let mut one = pattern(Order::Random, 100);
        let mut other = pattern(Order::Random, 100);
        let blocks = |p: &mut Pattern, lane| -> Vec<u64> {
            (0..20).map(|_| p.next(lane).unwrap().offset_bytes).collect()
        };
        let (first, second) = (blocks(&mut one, 0), blocks(&mut one, 1));
        assert_ne!(first, second);
        assert_eq!(first, blocks(&mut other, 0));
    }

    #[test]
    fn sequential_lanes_start_apart_and_wrap() {
        let mut pattern = pattern(Order::Sequential, 0);
        let blocks: Vec<u64> =
            (0..60).map(|_| pattern.next(1).unwrap().offset_bytes / 4096).collect();
        assert_eq!((blocks[0], blocks[49], blocks[50], blocks[59]), (50, 99, 0, 9));
    }
}
