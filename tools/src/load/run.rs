//! Loads: a queue depth of random requests for a time, and fill-and-verify passes over a range.
//!
//! In: a connected client. Out: counts and exact latencies. Every wait is bounded.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ringmill_core::reactor::Entropy;

use super::{Client, ClientError, Transfer};

/// A request that takes longer than this is a hang.
const HANG_SECONDS: u64 = 30;

/// Share of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Writes per 100 requests.
    pub write_percent: u32,
}

impl Mix {
    /// Only reads.
    pub const READS: Mix = Mix { write_percent: 0 };
}

/// A random load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Bytes of a request.
    pub block_bytes: usize,
    /// Requests in flight per queue.
    pub depth: usize,
    /// How long.
    pub duration: Duration,
    /// Reads and writes.
    pub mix: Mix,
    /// The part of the disk that is used, from its start.
    pub span_bytes: u64,
    /// Repeatable choice of offsets.
    pub seed: u64,
}

/// What a load did.
#[derive(Debug)]
pub struct LoadReport {
    /// Finished requests.
    pub requests_count: u64,
    /// Over this time.
    pub elapsed: Duration,
    /// Latency as the client saw it, nanoseconds.
    pub latency_ns: Histogram<u64>,
}

impl LoadReport {
    /// Requests per second.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    pub fn iops(&self) -> f64 {
        self.requests_count as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

fn failed(what: &'static str, offset: u64, ret: i32) -> ClientError {
    ClientError::Request { what, offset, errno: -ret }
}

fn hang(inflight: usize) -> ClientError {
    ClientError::Hang { inflight, seconds: HANG_SECONDS }
}

/// Keeps `depth` random requests per queue in flight for the duration; `progress` hears the share done now and then.
///
/// # Errors
/// The first request that fails, or a hang.
pub fn random_load(
    client: &mut Client,
    options: &LoadOptions,
    mut progress: impl FnMut(f64),
) -> Result<LoadReport, ClientError> {
    let blocks = (options.span_bytes / options.block_bytes as u64).max(1);
    let mut entropy = Entropy::seeded(options.seed);
    let queues = client.queues_count();
    let mut latency_ns = Histogram::new_with_bounds(1, 60_000_000_000, 3)
        .unwrap_or_else(|_| Histogram::new(3).expect("3 is valid"));
    let mut started = vec![Instant::now(); queues * options.depth];
    let mut offsets = vec![0u64; queues * options.depth];
    let mut done = Vec::with_capacity(options.depth);
    let start = Instant::now();
    let end = start + options.duration;
    let (mut requests_count, mut inflight) = (0u64, 0usize);
    let mut last_answer = start;
    let mut begin = |client: &mut Client,
                     queue: usize,
                     slot: u32,
                     now: Instant,
                     started: &mut [Instant],
                     offsets: &mut [u64]| {
        let offset = entropy.below(blocks) * options.block_bytes as u64;
        let write = options.mix.write_percent > 0
            && entropy.below(100) < u64::from(options.mix.write_percent);
        let transfer = if write { Transfer::Write } else { Transfer::Read };
        started[slot as usize] = now;
        offsets[slot as usize] = offset;
        client.submit(queue, transfer, offset, slot, options.block_bytes)
    };
    for queue in 0..queues {
        for at in 0..options.depth {
            let slot = u32::try_from(queue * options.depth + at).unwrap_or(u32::MAX);
            begin(client, queue, slot, start, &mut started, &mut offsets)?;
            inflight += 1;
        }
        client.kick(queue)?;
    }
    let mut rounds = 0u32;
    let mut now = start;
    while inflight > 0 {
        for queue in 0..queues {
            client.completions(queue, &mut done);
            if done.is_empty() {
                continue;
            }
            now = Instant::now();
            last_answer = now;
            for &(slot, ret) in &done {
                if ret != 0 {
                    return Err(failed("a request", offsets[slot as usize], ret));
                }
                let ns = now.duration_since(started[slot as usize]).as_nanos();
                latency_ns.saturating_record(u64::try_from(ns).unwrap_or(u64::MAX));
            }
            requests_count += done.len() as u64;
            if now < end {
                for &(slot, _) in &done {
                    begin(client, queue, slot, now, &mut started, &mut offsets)?;
                }
                client.kick(queue)?;
            } else {
                inflight -= done.len();
            }
            done.clear();
        }
        rounds = rounds.wrapping_add(1);
        if rounds.is_multiple_of(1 << 14) {
            let real = Instant::now();
            progress(real.duration_since(start).as_secs_f64() / options.duration.as_secs_f64());
            if real.duration_since(last_answer).as_secs() > HANG_SECONDS {
                return Err(hang(inflight));
            }
        }
    }
    progress(1.0);
    Ok(LoadReport { requests_count, elapsed: now.duration_since(start), latency_ns })
}

/// The word that belongs at a byte of the disk.
fn word_at(seed: u64, byte: u64) -> u64 {
    Entropy::seeded(seed ^ byte).next_u64()
}

/// Goes over a range with `depth` requests of one slot each in flight.
fn sweep(
    client: &mut Client,
    span_bytes: u64,
    depth: usize,
    transfer: Transfer,
    mut prepare: impl FnMut(&mut Client, u32, u64),
    mut check: impl FnMut(&Client, u32, u64) -> Result<(), ClientError>,
    mut progress: impl FnMut(f64),
) -> Result<(), ClientError> {
    let size = client.slot_bytes();
    let queues = client.queues_count();
    let total = span_bytes / size as u64;
    let mut offsets = vec![0u64; depth];
    let mut free: Vec<u32> = (0..u32::try_from(depth).unwrap_or(u32::MAX)).collect();
    let (mut next, mut finished) = (0u64, 0u64);
    let mut done = Vec::new();
    let mut last_answer = Instant::now();
    while finished < total {
        while let Some(slot) = free.pop_if(|_| next < total) {
            let offset = next * size as u64;
            let queue = usize::try_from(next % queues as u64).unwrap_or(0);
            offsets[slot as usize] = offset;
            prepare(client, slot, offset);
            client.submit(queue, transfer, offset, slot, size)?;
            client.kick(queue)?;
            next += 1;
        }
        for queue in 0..queues {
            client.completions(queue, &mut done);
        }
        if done.is_empty() {
            if last_answer.elapsed().as_secs() > HANG_SECONDS {
                return Err(hang(depth - free.len()));
            }
            std::hint::spin_loop();
            continue;
        }
        last_answer = Instant::now();
        for (slot, ret) in done.drain(..) {
            let offset = offsets[slot as usize];
            if ret != 0 {
                return Err(failed(
                    if transfer == Transfer::Read { "a read" } else { "a write" },
                    offset,
                    ret,
                ));
            }
            check(client, slot, offset)?;
            free.push(slot);
            finished += 1;
        }
        #[expect(clippy::cast_precision_loss, reason = "a share for people")]
        progress(finished as f64 / total as f64);
    }
    Ok(())
}

/// Writes a pattern that only `seed` and the place decide over the first `span_bytes`, then flushes.
///
/// # Errors
/// The first write that fails, or a hang.
pub fn fill(
    client: &mut Client,
    span_bytes: u64,
    depth: usize,
    seed: u64,
    progress: impl FnMut(f64),
) -> Result<(), ClientError> {
    let size = client.slot_bytes();
    let prepare = |client: &mut Client, slot: u32, offset: u64| {
        client.fill_slot(slot, size, |index| word_at(seed, offset + index * 8));
    };
    sweep(client, span_bytes, depth, Transfer::Write, prepare, |_, _, _| Ok(()), progress)?;
    client.submit_flush(0, 0)?;
    client.kick(0)?;
    let (mut done, start) = (Vec::new(), Instant::now());
    while done.is_empty() {
        client.completions(0, &mut done);
        if start.elapsed().as_secs() > HANG_SECONDS {
            return Err(hang(1));
        }
    }
    match done[0].1 {
        0 => Ok(()),
        ret => Err(failed("a flush", 0, ret)),
    }
}

/// Reads back what [`fill`] wrote and compares every byte.
///
/// # Errors
/// The first wrong word, a failed read, or a hang.
pub fn verify_filled(
    client: &mut Client,
    span_bytes: u64,
    depth: usize,
    seed: u64,
    progress: impl FnMut(f64),
) -> Result<(), ClientError> {
    let size = client.slot_bytes();
    let check = |client: &Client, slot: u32, offset: u64| {
        for (index, got) in (0u64..).zip(client.read_slot(slot, size)) {
            let expected = word_at(seed, offset + index * 8);
            if got != expected {
                return Err(ClientError::WrongData { offset: offset + index * 8, expected, got });
            }
        }
        Ok(())
    };
    // A read that moves nothing must not find the right bytes left in the slot.
    let prepare = |client: &mut Client, slot: u32, _: u64| {
        client.fill_slot(slot, size, |_| 0xdead_dead_dead_dead)
    };
    sweep(client, span_bytes, depth, Transfer::Read, prepare, check, progress)
}
