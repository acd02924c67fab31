//! HOT PATH
//! Counts and latencies of a load.
//!
//! How a latency is measured: the processor's time-stamp counter is read once per batch, when finished requests are
//! found and before their successors are prepared. A latency is the difference between two such readings, so it
//! contains the client's own work on the batch (tens of nanoseconds), never less than what the disk took.
//! Owner: the load's thread. **Invariant:** recording happens after the successors are on their way.
//!
//! note: same start as the last one? count it, else a new run — flush: one histogram update per run

use hdrhistogram::Histogram;
use ringmill_core::reactor::tick_rate;

use super::slots::Op;

/// The longest latency that is told apart from longer ones, nanoseconds.
const LATENCY_NS_MAX: u64 = 200_000_000_000;
const NS_PER_S: u128 = 1_000_000_000;

/// Operations that are counted.
pub(crate) const OPS: usize = 3;

#[derive(Clone, Copy, Debug)]
struct Run {
    start_ticks: u64,
    count: u64,
}

/// What one kind of request did.
#[derive(Debug)]
pub(crate) struct OpRecord {
    runs: Vec<Run>,
    /// Latencies of the measured time, nanoseconds.
    pub(crate) latency_ns: Histogram<u64>,
    /// Finished well, ramp and drain included.
    pub(crate) finished_count: u64,
    /// Failed, whenever.
    pub(crate) errors_count: u64,
}

/// Counts and latencies.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) ops: [OpRecord; OPS],
    ns_per_tick_q32: u128,
}

impl OpRecord {
    #[cold]
    fn new(depth_total: usize) -> OpRecord {
        let latency_ns = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)
            .unwrap_or_else(|_| Histogram::new(3).expect("3 digits are valid"));
        OpRecord {
            runs: Vec::with_capacity(depth_total),
            latency_ns,
            finished_count: 0,
            errors_count: 0,
        }
    }
}

impl Recorder {
    /// An empty record. `batch_max`: requests that can finish at once.
    #[cold]
    pub(crate) fn new(batch_max: usize) -> Recorder {
        Recorder {
            ops: std::array::from_fn(|_| OpRecord::new(batch_max)),
            ns_per_tick_q32: (NS_PER_S << 32) / u128::from(tick_rate().max(1)),
        }
    }

    /// An empty record for each group of lanes.
    #[cold]
    pub(crate) fn one_each(groups_count: usize, batch_max: usize) -> Vec<Recorder> {
        (0..groups_count).map(|_| Recorder::new(batch_max)).collect()
    }

    /// Ticks as nanoseconds.
    #[inline]
    pub(crate) fn ns(&self, ticks: u64) -> u64 {
        let ns = (u128::from(ticks) * self.ns_per_tick_q32) >> 32;
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// A request that started then has finished in this batch.
    #[inline]
    pub(crate) fn note(&mut self, op: Op, start_ticks: u64) {
        let runs = &mut self.ops[op as usize].runs;
        match runs.last_mut() {
            Some(last) if last.start_ticks == start_ticks => last.count += 1,
            _ => runs.push(Run { start_ticks, count: 1 }),
        }
    }

    /// Counts the batch that was found at `now_ticks`, and records its latencies while `measuring`.
    #[inline]
    pub(crate) fn flush(&mut self, now_ticks: u64, measuring: bool) {
        for op in 0..OPS {
            for at in 0..self.ops[op].runs.len() {
                let Run { start_ticks, count } = self.ops[op].runs[at];
                let ns = self.ns(now_ticks.saturating_sub(start_ticks));
                let record = &mut self.ops[op];
                record.finished_count += count;
                if measuring {
                    record.latency_ns.saturating_record_n(ns, count);
                }
            }
            self.ops[op].runs.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use ringmill_core::reactor::ns_to_ticks;

    use super::*;

    #[test]
    fn runs_are_recorded_with_their_count_and_only_while_measuring() {
        let mut recorder = Recorder::new(8);
        let start = 1_000_000;
        for measuring in [false, true] {
            for _ in 0..3 {
                recorder.note(Op::Read, start);
                recorder.note(Op::Write, start + 10);
            }
            recorder.note(Op::Read, start + 20);
            recorder.flush(start + ns_to_ticks(10_000), measuring);
        }
        let reads = &recorder.ops[Op::Read as usize];
        assert_eq!((reads.finished_count, reads.latency_ns.len()), (8, 4));
        assert_eq!(recorder.ops[Op::Write as usize].latency_ns.len(), 3);
        let max = reads.latency_ns.max();
        assert!((9_980..=10_020).contains(&max), "{max}");
    }
}
