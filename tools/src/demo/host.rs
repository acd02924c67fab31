//! The demo without a guest: daemon and client in one program, each on a core of its own where there are two.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringmill_core::reactor::IdlePolicy;
use rustix::thread::CpuSet;
use serde_json::{Map, Value, json};

use super::report;
use crate::config::ConfigCall;
use crate::daemon::control::{Daemon, SPIN_US_DEFAULT, Settings, allowed_cores};
use crate::daemon::engine::SocketSettings;
use crate::daemon::log::Log;
use crate::guest_lab::ScratchDir;
use crate::load::{Client, LoadOptions, Mix, fill, random_load, verify_filled};
use crate::rpc::engine::LogLevel;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 512 * MIB;
/// Written and read back on each disk before the load.
const VERIFIED_BYTES: u64 = 96 * MIB;
const VERIFY_SLOT_BYTES: usize = 128 << 10;
const VERIFY_DEPTH: usize = 16;
const LOAD_BLOCK_BYTES: usize = 4096;
const SEED: u64 = 0x7269_6e67_6d69_6c6c;

/// The daemon of a demo, in a thread of this program and a directory of its own.
pub(super) struct DemoDaemon {
    scratch: ScratchDir,
    thread: Option<std::thread::JoinHandle<anyhow::Result<Vec<String>>>>,
    /// The cores of the reactor and of the client.
    pub(super) cores: (u32, u32),
}

fn call(method: &str, params: Value) -> ConfigCall {
    let params = match params {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    ConfigCall { method: method.to_owned(), params, place: "demo".to_owned() }
}

impl DemoDaemon {
    /// Starts it with a RAM disk `ram` and a sparse file behind `file`.
    pub(super) fn start() -> anyhow::Result<DemoDaemon> {
        let cores = allowed_cores()?;
        let (Some(&first), Some(&last)) = (cores.first(), cores.last()) else {
            bail!("no core to run on")
        };
        let scratch = ScratchDir::new().context("cannot create a temporary directory")?;
        let image = scratch.path().join("disk.img");
        let file = std::fs::File::create(&image).context("cannot create an image")?;
        file.set_len(DISK_BYTES).context("cannot size the image")?;
        let blocks = DISK_BYTES / 512;
        // Direct I/O is what virtual machines use; some filesystems (and tmpfs on old kernels) have none.
        let cache = if direct_io_works(&image) { "none" } else { "writeback" };
        let calls = vec![
            call(
                "bdev_malloc_create",
                json!({"name": "ram", "num_blocks": blocks, "block_size": 512}),
            ),
            call("bdev_uring_create", json!({"name": "file", "filename": image, "cache": cache})),
            call("vhost_create_blk_controller", json!({"ctrlr": "ram", "dev_name": "ram"})),
            call("vhost_create_blk_controller", json!({"ctrlr": "file", "dev_name": "file"})),
        ];
        let settings = Settings {
            cores: vec![last],
            sockets: SocketSettings { dir: scratch.path().to_owned(), mode: 0o600, group: None },
            rpc_socket: scratch.path().join("rpc.sock"),
            idle: IdlePolicy::Adaptive { spin_ns: u64::from(SPIN_US_DEFAULT) * 1000 },
        };
        let (sender, ready) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                let daemon = Daemon::start(settings, calls, Log::start(LogLevel::Error));
                let started = daemon.as_ref().map(drop).map_err(|e| format!("{e:#}"));
                // The demo waits for this below.
                let _ = sender.send(started);
                daemon?.serve()
            })
            .context("cannot start a thread")?;
        match ready.recv() {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => bail!("the demo's daemon did not start: {reason}"),
            Err(_) => bail!("the demo's daemon did not start"),
        }
        Ok(DemoDaemon { scratch, thread: Some(thread), cores: (last, first) })
    }

    /// The RPC's socket.
    pub(super) fn rpc(&self) -> PathBuf {
        self.scratch.path().join("rpc.sock")
    }

    /// A disk's socket.
    pub(super) fn socket(&self, disk: &str) -> PathBuf {
        self.scratch.path().join(disk)
    }

    /// Stops it as an operator would.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        report::connect(&self.rpc())?.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"}))?;
        match self.thread.take().map(std::thread::JoinHandle::join) {
            Some(Ok(Ok(stuck))) if stuck.is_empty() => Ok(()),
            Some(Ok(Ok(stuck))) => bail!("requests did not come back from {}", stuck.join(", ")),
            Some(Ok(Err(error))) => Err(error),
            Some(Err(_)) | None => bail!("the demo's daemon ended badly"),
        }
    }
}

fn direct_io_works(path: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

/// One line of the result.
struct Line {
    what: String,
    iops: f64,
    p50_ns: u64,
    p99_ns: u64,
    cycles: f64,
}

fn connect(socket: &Path, slots: usize, slot_bytes: usize) -> anyhow::Result<Client> {
    Ok(Client::connect(socket, 1, 256, slots, slot_bytes)?)
}

/// Writes and reads back the first part of a disk.
fn verify(daemon: &DemoDaemon, disk: &str) -> anyhow::Result<()> {
    let mut client = connect(&daemon.socket(disk), VERIFY_DEPTH, VERIFY_SLOT_BYTES)?;
    let bar = report::bar(&format!("{disk}: write {} MiB, flush, read back", VERIFIED_BYTES / MIB));
    fill(&mut client, VERIFIED_BYTES, VERIFY_DEPTH, SEED, |share| {
        report::advance(&bar, share / 2.0)
    })?;
    verify_filled(&mut client, VERIFIED_BYTES, VERIFY_DEPTH, SEED, |share| {
        report::advance(&bar, 0.5 + share / 2.0);
    })?;
    bar.finish_and_clear();
    println!(
        "  {disk}: {} MiB written, flushed and read back; every byte is right",
        VERIFIED_BYTES / MIB
    );
    Ok(())
}

fn load(
    daemon: &DemoDaemon,
    disk: &str,
    depth: usize,
    mix: Mix,
    duration: Duration,
) -> anyhow::Result<Line> {
    let what = match mix.write_percent {
        0 => format!("{disk}: 4 KiB random reads, queue depth {depth}"),
        percent => format!("{disk}: 4 KiB random, {percent} % writes, queue depth {depth}"),
    };
    let mut client = connect(&daemon.socket(disk), depth, LOAD_BLOCK_BYTES)?;
    let mut rpc = report::connect(&daemon.rpc())?;
    let options = LoadOptions {
        block_bytes: LOAD_BLOCK_BYTES,
        depth,
        duration,
        mix,
        // What was written before: unwritten parts of a sparse file cost nothing to read and would flatter.
        span_bytes: VERIFIED_BYTES,
        seed: SEED,
    };
    let bar = report::bar(&what);
    let busy = report::busy_ticks(&mut rpc)?;
    let result = random_load(&mut client, &options, |share| report::advance(&bar, share))?;
    let busy = report::busy_ticks(&mut rpc)?.saturating_sub(busy);
    bar.finish_and_clear();
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    Ok(Line {
        what,
        iops: result.iops(),
        p50_ns: result.latency_ns.value_at_quantile(0.5),
        p99_ns: result.latency_ns.value_at_quantile(0.99),
        cycles: busy as f64 / result.requests_count.max(1) as f64,
    })
}

/// Runs the demo with loads of this length.
pub(super) fn run(duration: Duration) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    let daemon = DemoDaemon::start()?;
    let started = start.elapsed();
    let (reactor, own) = daemon.cores;
    let mut cpus = CpuSet::new();
    cpus.set(own as usize);
    if reactor != own && rustix::thread::sched_setaffinity(None, &cpus).is_err() {
        println!("  (the client could not be pinned to core {own}; figures may vary)");
    }
    println!("ringmill {} · {}", env!("CARGO_PKG_VERSION"), report::machine(reactor, own));
    println!(
        "A daemon with two disks was ready after {:.0} ms: a RAM disk and a sparse file.\n",
        started.as_secs_f64() * 1e3
    );
    let mut lines = Vec::new();
    for disk in ["ram", "file"] {
        verify(&daemon, disk)?;
    }
    report::connect(&daemon.rpc())?.call("latency_reset_histograms", json!({}))?;
    let (reads, mixed) = (Mix::READS, Mix { write_percent: 30 });
    for (disk, depth, mix) in
        [("ram", 1, reads), ("ram", 32, mixed), ("file", 1, reads), ("file", 32, mixed)]
    {
        lines.push(load(&daemon, disk, depth, mix, duration)?);
    }
    println!(
        "\n{:<50} {:>11} {:>9} {:>9} {:>12}",
        "What a guest would get", "IOPS", "p50", "p99", "cycles/req"
    );
    for line in &lines {
        println!(
            "{:<50} {:>11.0} {:>9} {:>9} {:>12.0}",
            line.what,
            line.iops,
            duration_text(line.p50_ns),
            duration_text(line.p99_ns),
            line.cycles
        );
    }
    println!(
        "cycles/req: busy cycles of the reactor per request; copying and the kernel's work are included.\n"
    );
    report::print_latencies(&mut report::connect(&daemon.rpc())?)?;
    daemon.stop()?;
    println!(
        "Done in {:.1} s. Next: `ringmilld --help` to serve disks of your own, `ringmilld demo --guest` for a real guest.",
        start.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::cast_precision_loss, reason = "a duration for people")]
fn duration_text(ns: u64) -> String {
    crate::hist::duration_text(ns as f64)
}
