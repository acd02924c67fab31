//! `cargo xtask bench`: the first speed marks, as ratios measured in one run.
//!
//! Every server is pinned to the same core, the client (the same code for all) to another; servers take turns for
//! several rounds, and the median of each counts. Media are written before they are read. Nothing here is a test: the
//! machine's other guests decide part of every figure, which is why the ratios are what is quoted.

mod medium;
mod peers;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use ringmill_core::reactor::tick_rate;
use ringmill_tools::load::{Client, LoadOptions, Mix, fill, random_load};
use rustix::thread::CpuSet;

use medium::Medium;
use peers::{Ringmilld, StorageDaemon, fio};

const BLOCK_BYTES: usize = 4096;
const MEDIUM_BYTES: u64 = 256 << 20;
const FILL_SLOT_BYTES: usize = 128 << 10;
const SEED: u64 = 7;

/// Measures ringmilld beside qemu-storage-daemon and fio.
#[derive(Debug, Parser)]
struct Args {
    /// The daemon to measure; build it with `cargo build --release`.
    #[arg(long, value_name = "PATH")]
    ringmilld: PathBuf,
    /// Rounds; each server is measured once per round.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of each measurement, seconds.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Measure only this: null, tmpfs or zram.
    #[arg(long, value_parser = ["null", "tmpfs", "zram"])]
    only: Option<String>,
    /// Core of the servers and of fio.
    #[arg(long, default_value_t = 1)]
    server_core: u32,
    /// Core of the client.
    #[arg(long, default_value_t = 0)]
    client_core: u32,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Default)]
struct Figure {
    iops: f64,
    p50_ns: u64,
    p99_ns: u64,
    /// Busy cycles per request, as the daemon's own counters say.
    cycles: f64,
    /// TSC rate × busy share / the client's IOPS: the same figure from outside.
    cycles_outside: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn measure(socket: &Path, depth: usize, seconds: u64) -> anyhow::Result<Figure> {
    // Three descriptors per request without indirect tables.
    let queue_size = u16::try_from((depth * 4).next_power_of_two().max(256))?;
    let mut client = Client::connect(socket, 1, queue_size, depth, BLOCK_BYTES)?;
    let options = LoadOptions {
        block_bytes: BLOCK_BYTES,
        depth,
        duration: Duration::from_secs(seconds),
        mix: Mix::READS,
        span_bytes: client.capacity_bytes().min(MEDIUM_BYTES),
        seed: SEED,
    };
    let report = random_load(&mut client, &options, |_| ())?;
    Ok(Figure {
        iops: report.iops(),
        p50_ns: report.latency_ns.value_at_quantile(0.5),
        p99_ns: report.latency_ns.value_at_quantile(0.99),
        ..Figure::default()
    })
}

/// A measurement of ringmilld with its cycles per request, counted twice.
fn measure_ours(
    daemon: &Ringmilld,
    disk: &str,
    depth: usize,
    seconds: u64,
) -> anyhow::Result<Figure> {
    let before = daemon.counters(disk)?;
    let mut figure = measure(&daemon.socket(disk), depth, seconds)?;
    let after = daemon.counters(disk)?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    {
        let busy = (after.busy_ticks - before.busy_ticks) as f64;
        let elapsed =
            (after.busy_ticks + after.idle_ticks - before.busy_ticks - before.idle_ticks) as f64;
        figure.cycles = busy / (after.ops_count - before.ops_count).max(1) as f64;
        // The share is taken over the client's own time: connecting and hanging up are idle time of the reactor.
        let share = busy / (seconds as f64 * tick_rate() as f64).min(elapsed);
        figure.cycles_outside = tick_rate() as f64 * share / figure.iops;
    }
    Ok(figure)
}

fn prepare(socket: &Path) -> anyhow::Result<()> {
    let mut client = Client::connect(socket, 1, 256, 16, FILL_SLOT_BYTES)?;
    let span = client.capacity_bytes().min(MEDIUM_BYTES);
    Ok(fill(&mut client, span, 16, SEED, |_| ())?)
}

fn print(what: &str, figures: &[Figure]) -> f64 {
    let iops = median(figures.iter().map(|f| f.iops).collect());
    let low = figures.iter().map(|f| f.iops).fold(f64::INFINITY, f64::min);
    let high = figures.iter().map(|f| f.iops).fold(0.0, f64::max);
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let p =
        |pick: fn(&Figure) -> u64| median(figures.iter().map(|f| pick(f) as f64).collect()) / 1e3;
    let cycles = median(figures.iter().map(|f| f.cycles).collect());
    print!("  {what:<44} {iops:>10.0} IOPS ({low:.0}…{high:.0})");
    if figures.iter().any(|f| f.p50_ns > 0) {
        print!("  p50 {:.2} µs  p99 {:.2} µs", p(|f| f.p50_ns), p(|f| f.p99_ns));
    }
    if cycles > 0.0 {
        let outside = median(figures.iter().map(|f| f.cycles_outside).collect());
        let apart = 100.0 * (cycles - outside).abs() / cycles;
        let verdict = if apart <= 10.0 { "agree" } else { "DISAGREE" };
        print!(
            "  {cycles:.0} busy cycles/request (TSC × busy share / IOPS: {outside:.0}, {verdict} within 10 %)"
        );
    }
    println!();
    iops
}

fn null_marks(args: &Args, daemon: &Ringmilld, dir: &Path) -> anyhow::Result<()> {
    println!("null medium, 4 KiB random reads, one queue, virtio-driver client:");
    let peer = StorageDaemon::start_null(dir, args.server_core)?;
    for depth in [1, 32, 128] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            theirs.push(measure(&peer.socket(), depth, args.seconds)?);
            ours.push(measure_ours(daemon, "null", depth, args.seconds)?);
        }
        let peer_iops = print(&format!("qemu-storage-daemon null-co, QD{depth}"), &theirs);
        let own_iops = print(&format!("ringmilld null, QD{depth}"), &ours);
        println!("  ratio {:.2}\n", own_iops / peer_iops);
    }
    Ok(())
}

fn medium_marks(args: &Args, daemon: &Ringmilld, medium: &Medium) -> anyhow::Result<()> {
    println!("{}, 4 KiB random reads, QD32:", medium.what());
    daemon.add_file(medium.name(), medium.path())?;
    prepare(&daemon.socket(medium.name()))?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        // The image lock does not keep readers such as fio away; both are never busy at the same time.
        theirs.push(Figure {
            iops: fio(medium.path(), args.server_core, args.seconds)?,
            ..Figure::default()
        });
        ours.push(measure_ours(daemon, medium.name(), 32, args.seconds)?);
    }
    let peer_iops = print("fio --ioengine=io_uring --direct=1", &theirs);
    let own_iops = print("ringmilld uring", &ours);
    println!("  ratio {:.2}\n", own_iops / peer_iops);
    daemon.remove(medium.name())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("marks: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    if !args.ringmilld.exists() {
        bail!("{} does not exist; run `cargo build --release` first", args.ringmilld.display());
    }
    let dir = tempfile::tempdir().context("cannot create a temporary directory")?;
    let daemon = Ringmilld::start(&args.ringmilld, dir.path(), args.server_core)?;
    // After the daemon has started: it would inherit the client's core.
    let mut cpus = CpuSet::new();
    cpus.set(args.client_core as usize);
    rustix::thread::sched_setaffinity(None, &cpus)
        .with_context(|| format!("cannot pin the client to core {}", args.client_core))?;
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let ghz = tick_rate() as f64 / 1e9;
    println!(
        "TSC {ghz:.3} GHz; servers on core {}, client on core {}; {} rounds of {} s, median (lowest…highest)\n",
        args.server_core, args.client_core, args.rounds, args.seconds
    );
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| only == name);
    if wanted("null") {
        daemon.add_null("null", 1 << 30)?;
        null_marks(args, &daemon, dir.path())?;
    }
    for medium in medium::all(MEDIUM_BYTES) {
        match medium {
            Ok(medium) if !wanted(medium.name()) => {}
            Ok(medium) => medium_marks(args, &daemon, &medium)?,
            Err(reason) => println!("left out: {reason:#}\n"),
        }
    }
    daemon.stop()
}
