//! `ringmill-perf`: a load generator for vhost-user-blk disks and for bdevs, fast enough to measure the former.
//!
//! `args` → `drive` connects (`frontend`, `job`), lays out one shared memory (`memory`, `layout`), builds a `port` per queue
//! (`vhost` over `split` or `packed`; `bdev`) and runs a workload (`pattern`, `verify`) on them in `engine`; `record`
//! has the latencies, `report` says what came of it. `floor` is the least that a disk can be, to compare with.
//!
//! **Invariant:** nothing here knows the daemon; any vhost-user-blk server can be at the other end. Unsafe code is in
//! `memory` only. One thread does everything, and each of its waits has a bound.

mod args;
mod bar;
mod bdev;
mod drive;
mod engine;
mod error;
mod floor;
mod frontend;
mod job;
mod layout;
mod memory;
mod pace;
mod packed;
mod pattern;
mod port;
mod record;
mod report;
mod ring;
mod slots;
mod split;
mod stamp;
mod verify;
mod vhost;

#[cfg(test)]
mod ring_tests;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::hist::dump;

pub use args::{BdevChoice, Cli, PassChoice, Work};
pub use error::PerfError;
pub use job::Target;

/// Moves the calling thread to a core.
fn pin_to(core: u32) -> Result<(), PerfError> {
    let mut cpus = CpuSet::new();
    let at = core as usize;
    let known = at < CpuSet::MAX_CPU;
    if known {
        cpus.set(at);
    }
    match sched_setaffinity(None, &cpus) {
        Ok(()) if known => Ok(()),
        _ => Err(PerfError::Options(format!(
            "core {core} does not exist or is not available to this process"
        ))),
    }
}

/// Many disks need many descriptors; what is not allowed is found and said when one cannot be had.
fn open_many() {
    let now = getrlimit(Resource::Nofile);
    if now.current != now.maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, ..now });
    }
}

/// Runs the load and prints its report; failure when requests failed or data was wrong.
///
/// # Errors
/// What kept the load from running to its end.
pub fn main(cli: &Cli) -> Result<ExitCode, PerfError> {
    cli.check()?;
    // The first signal ends the load early, with a report; a second one ends the process.
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let registered = signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)));
        registered.map_err(|error| PerfError::Options(format!("cannot catch signals: {error}")))?;
    }
    let owner = cli.owner.map(bdev::Owner::start).transpose()?;
    if let Some(core) = cli.core {
        pin_to(core)?;
    }
    open_many();
    let report = drive::drive(cli, owner, &stop)?;
    if let Some(path) = &cli.hlog {
        let failed =
            |why: String| PerfError::Options(format!("cannot write {}: {why}", path.display()));
        let log = dump::render(&report.rows(cli), dump::Format::Hlog, SystemTime::now());
        let log = log.map_err(|error| failed(error.to_string()))?;
        std::fs::write(path, log).map_err(|error| failed(error.to_string()))?;
    }
    if cli.json {
        println!("{:#}", report.json(cli));
    } else {
        print!("{}", report.text(cli));
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
