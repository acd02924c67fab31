//! What a hog costs its neighbour, measured: 1 MiB at a depth of 1,024 beside 4 KiB at a depth of 1 on one reactor.
//!
//! Not for a busy machine and not part of the ordinary tests. One thread drives both disks, so the client's scheduling is
//! the same in both cases; the reactor has a core of its own:
//!
//! `cargo test --release -p ringmill-tools --test fairness -- --ignored --nocapture`
//!
//! The exact bounds behind the figures are tested in `vmm-glue/tests/fairness.rs`.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use daemon::Daemon;
use media::{MIB, set_len};
use ringmill_core::reactor::Entropy;
use ringmill_tools::load::{Client, ClientOptions, Transfer, fill};
use serde_json::json;
use tempfile::TempDir;

const SMALL_BYTES: usize = 4096;
const HOG_BYTES: usize = 1 << 20;
const HOG_DEPTH: u32 = 1024;
const DISK_BYTES: u64 = 256 * MIB;
const ROUND: Duration = Duration::from_millis(1500);
const ROUNDS: usize = 5;
const RATIO_MAX: f64 = 5.0;

fn client(socket: &Path, depth: u32, bytes: usize) -> Client {
    let options = ClientOptions {
        queues_count: 1,
        queue_size: u16::try_from((4 * depth).next_power_of_two().max(16)).expect("a small depth"),
        slots_count: depth as usize,
        slot_bytes: bytes,
        features_more: 0,
        features_less: 0,
    };
    Client::connect_with(socket, &options).expect("a client")
}

/// A disk with a small client and a hog on a disk beside it.
struct Pair {
    small: Client,
    hog: Client,
    hog_is_full: bool,
    entropy: Entropy,
}

#[derive(Clone, Copy, Debug)]
struct Figures {
    p50_ns: u64,
    p99_ns: u64,
    hog_mib_per_s: f64,
}

impl Pair {
    fn offset(&mut self, bytes: usize) -> u64 {
        self.entropy.below(DISK_BYTES / bytes as u64) * bytes as u64
    }

    fn feed_hog(&mut self, slots: impl Iterator<Item = u32>) {
        for slot in slots {
            let offset = self.offset(HOG_BYTES);
            self.hog.submit(0, Transfer::Read, offset, slot, HOG_BYTES).expect("room");
        }
        self.hog.kick(0).expect("a kick");
    }

    /// One request of the small client at a time, with or without the hog; or the hog without the small one.
    fn run(&mut self, with_small: bool, with_hog: bool) -> Figures {
        let mut done = Vec::new();
        if with_hog && !self.hog_is_full {
            self.feed_hog(0..HOG_DEPTH);
            self.hog_is_full = true;
        }
        let (mut latencies, mut hog_count) = (Vec::with_capacity(1 << 20), 0u64);
        let begin = Instant::now();
        // The first part is for the reactor to see what is new.
        let (warm, end) = (begin + ROUND / 3, begin + ROUND);
        let mut sent: Option<Instant> = None;
        loop {
            let now = Instant::now();
            if now >= end && sent.is_none() {
                break;
            }
            if with_small && sent.is_none() {
                let offset = self.offset(SMALL_BYTES);
                sent = Some(Instant::now());
                self.small.submit(0, Transfer::Read, offset, 0, SMALL_BYTES).expect("room");
                self.small.kick(0).expect("a kick");
            }
            if let Some(at) = sent {
                self.small.completions(0, &mut done);
                if let Some((_, ret)) = done.pop() {
                    assert_eq!(ret, 0, "a small read failed");
                    let now = Instant::now();
                    if now > warm {
                        latencies.push(u64::try_from((now - at).as_nanos()).expect("short"));
                    }
                    sent = None;
                }
                assert!(at.elapsed() < Duration::from_secs(20), "the small one hangs");
            }
            if self.hog_is_full {
                self.hog.completions(0, &mut done);
                assert!(done.iter().all(|(_, ret)| *ret == 0), "a large read failed");
                if now > warm {
                    hog_count += done.len() as u64;
                }
                if with_hog && !done.is_empty() {
                    let slots: Vec<u32> = done.drain(..).map(|(slot, _)| slot).collect();
                    self.feed_hog(slots.into_iter());
                }
                done.clear();
            }
        }
        if !with_hog {
            self.hog_is_full = false;
        }
        latencies.sort_unstable();
        let at =
            |percent: usize| latencies.get(latencies.len() * percent / 100).copied().unwrap_or(0);
        let seconds = (ROUND - ROUND / 3).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let hog_mib_per_s = hog_count as f64 / seconds;
        Figures { p50_ns: at(50), p99_ns: at(99), hog_mib_per_s }
    }

    /// Waits until the hog has nothing in flight.
    fn quiet(&mut self) {
        let (mut done, mut inflight) =
            (Vec::new(), if self.hog_is_full { HOG_DEPTH as usize } else { 0 });
        while inflight > 0 {
            self.hog.completions(0, &mut done);
            inflight -= done.len();
            done.clear();
        }
        self.hog_is_full = false;
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The median over the rounds of p99 beside the hog, in p99 alone.
fn measure(kind: &str, small: &Path, hog: &Path) -> f64 {
    let mut pair = Pair {
        small: client(small, 1, SMALL_BYTES),
        hog: client(hog, HOG_DEPTH, HOG_BYTES),
        hog_is_full: false,
        entropy: Entropy::seeded(7),
    };
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let alone = pair.run(true, false);
        let hog_alone = pair.run(false, true);
        let beside = pair.run(true, true);
        pair.quiet();
        #[expect(clippy::cast_precision_loss, reason = "latencies are short")]
        let ratio = beside.p99_ns as f64 / alone.p99_ns.max(1) as f64;
        eprintln!(
            "{kind} round {round}: p50/p99 alone {}/{} ns, beside {}/{} ns: p99 x {ratio:.2}; hog alone {:.0} MiB/s, beside {:.0}",
            alone.p50_ns,
            alone.p99_ns,
            beside.p50_ns,
            beside.p99_ns,
            hog_alone.hog_mib_per_s,
            beside.hog_mib_per_s
        );
        ratios.push(ratio);
    }
    median(ratios)
}

#[test]
#[ignore = "a measurement: wants a quiet machine with two cores"]
fn a_small_guest_beside_a_hog() {
    let daemon = Daemon::with(["-m", "2", "--idle", "poll"]);
    // The client stays on core 0, the reactor has core 1.
    let mut set = rustix::thread::CpuSet::new();
    set.set(0);
    rustix::thread::sched_setaffinity(None, &set).expect("core 0");
    let shm = TempDir::new_in("/dev/shm").expect("tmpfs");
    let mut disks: Vec<(&str, PathBuf, PathBuf)> = Vec::new();
    for name in ["n-small", "n-hog"] {
        let params = json!({"name": name, "block_size": 512, "num_blocks": DISK_BYTES / 512});
        daemon.call("bdev_null_create", &params);
        daemon.add_controller(name, name, &json!({}));
    }
    disks.push(("null", daemon.socket("n-small"), daemon.socket("n-hog")));
    let ram = |name: &str| daemon.add_malloc(name, DISK_BYTES, 512);
    disks.push(("malloc", ram("m-small"), ram("m-hog")));
    let file = |name: &str| {
        let image = shm.path().join(name);
        set_len(&image, DISK_BYTES);
        daemon.add_uring(name, &image, &json!({}))
    };
    disks.push(("uring", file("u-small"), file("u-hog")));
    let mut medians = Vec::new();
    for (kind, small, hog) in &disks {
        for socket in [small, hog] {
            let mut writer = client(socket, 8, HOG_BYTES);
            fill(&mut writer, DISK_BYTES, 8, 1, |_| {}).expect("a filled disk");
        }
        medians.push((*kind, measure(kind, small, hog)));
    }
    eprintln!("p99 beside / alone, median of {ROUNDS} rounds: {medians:.2?}");
    for (kind, ratio) in medians {
        assert!(ratio <= RATIO_MAX, "{kind}: {ratio:.2}");
    }
    daemon.stop();
}
