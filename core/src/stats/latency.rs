//! HOT PATH
//! A log-linear latency table of at most 5 KiB: one addition per recorded value, or per group of equal ones.
//!
//! Flow: a reactor records nanoseconds; control threads take snapshots and turn them into HDR histograms.
//! Owner: one writer (plain load + store, no read-modify-write), any number of readers.
//! **Invariant:** bucket width ≤ 1/32 of its value (3.1 %); values above the range land in the last bucket, `max_ns`
//! stays exact.
//!
//! record: bucket = leading zeros and 5 more bits → counts[bucket] += 1, sum += value, max

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use hdrhistogram::Histogram;

const SUB_BITS: u32 = 5;
const SUB_COUNT: usize = 1 << SUB_BITS;
/// Values below 64 ns share 32 buckets of 2 ns; each of 28 octaves above has 32 buckets: up to 17 s.
const LINEAR_SHIFT: u32 = 1;
const OCTAVES: usize = 28;
const BUCKETS: usize = SUB_COUNT + OCTAVES * SUB_COUNT;

/// Counts of durations in nanoseconds.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct LatencyTable {
    count: AtomicU64,
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
    min_ns_plus_1: AtomicU64,
    /// The low 32 bits of each count, and the bits above: together they hold 10^12, a day at 10 M/s in one bucket.
    counts: [AtomicU32; BUCKETS],
    carries: [AtomicU8; BUCKETS],
}

const _: () = assert!(size_of::<LatencyTable>() <= 5 * 1024);

impl Default for LatencyTable {
    fn default() -> Self {
        LatencyTable {
            count: AtomicU64::new(0),
            sum_ns: AtomicU64::new(0),
            max_ns: AtomicU64::new(0),
            min_ns_plus_1: AtomicU64::new(0),
            counts: [const { AtomicU32::new(0) }; BUCKETS],
            carries: [const { AtomicU8::new(0) }; BUCKETS],
        }
    }
}

#[inline]
fn bucket_of(value_ns: u64) -> usize {
    let octave = 63 - (value_ns | (2 * SUB_COUNT as u64)).leading_zeros();
    // 6 for the linear part (values up to 63) and the first octave, then one more per power of two.
    let shift = octave - SUB_BITS;
    let sub = crate::units::usize_of(value_ns >> shift);
    let base = crate::units::index(octave - SUB_BITS - LINEAR_SHIFT) * SUB_COUNT;
    // `sub` is 0..=31 in the linear part and 32..=63 above it, so octaves follow each other without gaps.
    (base + sub).min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn upper_ns(bucket: usize) -> u64 {
    let (row, sub) = (bucket / SUB_COUNT, bucket % SUB_COUNT);
    if row == 0 {
        return ((sub as u64) << LINEAR_SHIFT) + 1;
    }
    let shift = row as u64 - 1 + u64::from(LINEAR_SHIFT);
    ((SUB_COUNT + sub) as u64 + 1).wrapping_shl(u32::try_from(shift).unwrap_or(u32::MAX)) - 1
}

#[inline]
fn bump(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl LatencyTable {
    /// Records one duration.
    #[inline]
    pub fn record(&self, value_ns: u64) {
        self.record_many(value_ns, 1);
    }

    /// Records the same duration `times` times.
    #[inline]
    pub fn record_many(&self, value_ns: u64, times: u32) {
        let bucket = bucket_of(value_ns);
        let (count, full) = self.counts[bucket].load(Ordering::Relaxed).overflowing_add(times);
        self.counts[bucket].store(count, Ordering::Relaxed);
        if full {
            self.carry(bucket);
        }
        bump(&self.count, u64::from(times));
        bump(&self.sum_ns, value_ns.wrapping_mul(u64::from(times)));
        if value_ns > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.store(value_ns, Ordering::Relaxed);
        }
        let min = self.min_ns_plus_1.load(Ordering::Relaxed);
        if value_ns.wrapping_add(1) < min || min == 0 {
            self.min_ns_plus_1.store(value_ns.saturating_add(1), Ordering::Relaxed);
        }
    }

    #[cold]
    #[inline(never)]
    fn carry(&self, bucket: usize) {
        let carry = self.carries[bucket].load(Ordering::Relaxed);
        self.carries[bucket].store(carry.saturating_add(1), Ordering::Relaxed);
    }

    /// The table's contents now. Counts of records in progress may differ by one between fields.
    #[must_use]
    #[cold]
    pub fn snapshot(&self) -> LatencySnapshot {
        LatencySnapshot {
            counts: self
                .counts
                .iter()
                .zip(&self.carries)
                .map(|(low, high)| {
                    u64::from(high.load(Ordering::Relaxed)) << 32
                        | u64::from(low.load(Ordering::Relaxed))
                })
                .collect(),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
            max_ns: self.max_ns.load(Ordering::Relaxed),
            min_ns: self.min_ns_plus_1.load(Ordering::Relaxed).saturating_sub(1),
        }
    }
}

/// A copy of a table; differences of two copies give an interval.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LatencySnapshot {
    counts: Vec<u64>,
    sum_ns: u64,
    max_ns: u64,
    min_ns: u64,
}

impl LatencySnapshot {
    /// Values recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The exact sum, nanoseconds.
    #[must_use]
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// The exact mean, nanoseconds; 0 without values.
    #[must_use]
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count()).unwrap_or(0)
    }

    /// The exact maximum since the table began (not only since a baseline).
    #[must_use]
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The exact minimum since the table began.
    #[must_use]
    pub fn min_ns(&self) -> u64 {
        self.min_ns
    }

    /// What was recorded after `baseline`. Minimum and maximum are then those of the buckets that grew.
    #[must_use]
    #[cold]
    pub fn since(&self, baseline: &LatencySnapshot) -> LatencySnapshot {
        if baseline.counts.is_empty() {
            return self.clone();
        }
        let counts: Vec<u64> =
            self.counts.iter().zip(&baseline.counts).map(|(a, b)| a.wrapping_sub(*b)).collect();
        let first = counts.iter().position(|&c| c > 0);
        let last = counts.iter().rposition(|&c| c > 0);
        LatencySnapshot {
            sum_ns: self.sum_ns.wrapping_sub(baseline.sum_ns),
            max_ns: last.map_or(0, |b| {
                if b == BUCKETS - 1 { self.max_ns } else { upper_ns(b).min(self.max_ns) }
            }),
            min_ns: first
                .map_or(0, |b| if b == 0 { 0 } else { upper_ns(b - 1) + 1 }.max(self.min_ns)),
            counts,
        }
    }

    /// Adds another table's counts (queues of one disk, reactors of one daemon).
    pub fn merge(&mut self, other: &LatencySnapshot) {
        if other.count() == 0 {
            return;
        }
        if self.counts.is_empty() || self.count() == 0 {
            *self = other.clone();
            return;
        }
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            *a = a.wrapping_add(*b);
        }
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        self.min_ns = self.min_ns.min(other.min_ns);
    }

    /// The buckets that hold values, as (largest value of the bucket, count), ascending.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.counts.iter().enumerate().filter(|&(_, &count)| count > 0).map(|(bucket, &count)| {
            let upper = if bucket == BUCKETS - 1 { u64::MAX } else { upper_ns(bucket) };
            (upper.min(self.max_ns.max(1)), count)
        })
    }

    /// As an HDR histogram with 3 significant digits, from 1 ns to the largest value (at most 1 h).
    #[must_use]
    #[cold]
    pub fn to_histogram(&self) -> Histogram<u64> {
        // As large as its values need: hundreds of rows are made for one answer.
        let highest_ns = self.max_ns.clamp(1 << 12, 3_600_000_000_000);
        let Ok(mut histogram) = Histogram::<u64>::new_with_bounds(1, highest_ns, 3) else {
            return Histogram::new(3)
                .unwrap_or_else(|_| unreachable!("3 digits is a valid precision"));
        };
        for (value_ns, count) in self.buckets() {
            histogram.saturating_record_n(value_ns.max(1), count);
        }
        histogram
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_are_gapless_and_bounded() {
        let mut previous = None;
        for bucket in 0..BUCKETS {
            let upper = upper_ns(bucket);
            let lower = previous.map_or(0, |p: u64| p + 1);
            assert_eq!(bucket_of(upper), bucket);
            assert_eq!(bucket_of(lower), bucket);
            assert!(
                upper - lower < 2 || (upper - lower) * 32 <= lower + 32,
                "bucket {bucket}: {lower}..{upper}"
            );
            previous = Some(upper);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert!(upper_ns(BUCKETS - 1) > 16_000_000_000);
    }

    #[test]
    fn since_subtracts_a_baseline() {
        let table = LatencyTable::default();
        table.record(100);
        let base = table.snapshot();
        table.record(1000);
        let diff = table.snapshot().since(&base);
        assert_eq!((diff.count(), diff.sum_ns()), (1, 1000));
        assert!(diff.min_ns() <= 1000 && diff.max_ns() >= 1000);
    }

    #[test]
    fn a_group_counts_like_its_members_and_carries() {
        let (one_by_one, grouped) = (LatencyTable::default(), LatencyTable::default());
        for (value_ns, times) in [(100, 3), (7, 1), (1 << 40, 2), (100, 5)] {
            (0..times).for_each(|_| one_by_one.record(value_ns));
            grouped.record_many(value_ns, times);
        }
        assert_eq!(one_by_one.snapshot(), grouped.snapshot());
        grouped.record_many(100, u32::MAX);
        assert_eq!(grouped.snapshot().count(), 11 + u64::from(u32::MAX));
    }

    proptest! {
        /// The naive twin: sort the values and pick by rank.
        #[test]
        fn percentiles_agree_with_sorted_values(mut values in prop::collection::vec(0u64..20_000_000_000, 1..200)) {
            let table = LatencyTable::default();
            for &v in &values { table.record(v); }
            values.sort_unstable();
            let snapshot = table.snapshot();
            prop_assert_eq!(snapshot.count(), values.len() as u64);
            prop_assert_eq!(snapshot.max_ns(), *values.last().unwrap());
            prop_assert_eq!(snapshot.min_ns(), values[0]);
            prop_assert_eq!(snapshot.sum_ns(), values.iter().sum::<u64>());
            let histogram = snapshot.to_histogram();
            for q in [0.5, 0.9, 0.99] {
                let rank = (1..=values.len()).find(|&r| r as f64 >= q * values.len() as f64).unwrap_or(1) - 1;
                let exact = values[rank] as f64;
                let got = histogram.value_at_quantile(q) as f64;
                prop_assert!(got >= exact * 0.96 - 2.0 || exact > 16e9, "{} {}", got, exact);
                prop_assert!(got <= exact * 1.04 + 2.0 || exact > 16e9, "{} {}", got, exact);
            }
        }
    }
}
