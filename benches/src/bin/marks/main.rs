//! What `cargo xtask bench` runs: measures ringmilld beside its peers and writes `docs/PERFORMANCE.md`.
//!
//! `sections` says what is measured and `lab` how, `servers` starts the programs, `reference` measures the machine itself;
//! `results` keeps every round as JSON, `targets` judges and `render` writes the page and its plots. Nothing here is a
//! test: the machine's other guests decide part of every figure, which is why ratios of one run are what counts.

mod lab;
mod medium;
mod reference;
mod render;
mod results;
mod sections;
mod servers;
mod targets;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::Parser;
use ringmill_core::reactor::tick_rate;

use lab::Lab;
use results::{Results, Section};
use sections::SECTIONS;

/// Measures ringmilld beside qemu-storage-daemon and fio.
#[derive(Debug, Parser)]
struct Args {
    /// Where ringmilld and ringmill-perf are, built with `cargo build --release`.
    #[arg(long, value_name = "DIR")]
    programs: PathBuf,
    /// Where PERFORMANCE.md and performance/ go.
    #[arg(long, value_name = "DIR")]
    docs: PathBuf,
    /// Rounds; each point is measured once per round.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Length of each measurement, seconds.
    #[arg(long, default_value_t = 0.8)]
    seconds: f64,
    /// Measure only these sections (comma-separated); the others stay as they are.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// One short round of few points, to see whether everything works; figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Only write the page again, from the stored results.
    #[arg(long)]
    render: bool,
    /// Core of the servers and of fio.
    #[arg(long, default_value_t = 1)]
    server_core: u32,
    /// Core of the client.
    #[arg(long, default_value_t = 0)]
    client_core: u32,
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
    let names: Vec<&str> = SECTIONS.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = args.only.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("there is no section \"{unknown}\"; there are {}", names.join(", "));
    }
    let stored = args.docs.join("performance/results.json");
    let mut results = Results::load(&stored)?;
    if !args.render {
        std::fs::create_dir_all(args.docs.join("performance")).context("cannot make docs")?;
        measure(args, &mut results, &stored)?;
    }
    render::render(&results, &args.docs)?;
    for verdict in targets::verdicts(&results) {
        let met = verdict.met.map_or("-", |met| if met { "met" } else { "MISSED" });
        println!("{met:<7} {}: {} ({})", verdict.case, verdict.measured, verdict.wanted);
    }
    Ok(())
}

fn measure(args: &Args, results: &mut Results, stored: &Path) -> anyhow::Result<()> {
    let [ringmilld, perf] = ["ringmilld", "ringmill-perf"].map(|name| args.programs.join(name));
    if !ringmilld.exists() || !perf.exists() {
        bail!("{} or ringmill-perf is not there; build with --release", ringmilld.display());
    }
    // On a disk, beside the programs: /tmp is often tmpfs.
    let dir = tempfile::tempdir_in(&args.programs).context("cannot create a directory")?;
    let lab = Lab {
        dir: dir.path().to_owned(),
        programs: args.programs.clone(),
        ringmilld,
        perf,
        server_core: args.server_core,
        client_core: args.client_core,
        seconds: if args.quick { 0.2 } else { args.seconds },
        rounds: if args.quick { 1 } else { args.rounds.into() },
        quick: args.quick,
    };
    results.machine = machine(&lab)?;
    let mut failed = Vec::new();
    for (name, work) in SECTIONS {
        if !args.only.is_empty() && !args.only.iter().any(|only| only == name) {
            continue;
        }
        let mut section = Section { taken: now(), ..Section::default() };
        if args.quick {
            section.notes.push("a quick run: these figures mean nothing".into());
        }
        match work(&lab, &mut section) {
            Ok(()) => {
                results.sections.insert((*name).to_owned(), section);
                // After each section: what has been measured is kept if the next one fails.
                results.save(stored)?;
            }
            Err(error) => {
                eprintln!("{name} FAILED: {error:#}");
                failed.push(*name);
            }
        }
    }
    if !failed.is_empty() {
        bail!("these sections failed and are as they were: {}", failed.join(", "));
    }
    Ok(())
}

/// Date and time, UTC.
fn now() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    let text = output.map_or_else(|_| Vec::new(), |output| output.stdout);
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn machine(lab: &Lab) -> anyhow::Result<BTreeMap<String, String>> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, value)| value).to_owned()
    };
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let ghz = tick_rate() as f64 / 1e9;
    let round_trip = reference::line_round_trip_ns(lab.client_core, lab.server_core)?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let virtual_machine = if cpuinfo.contains("hypervisor") { "yes" } else { "no" };
    let facts = [
        (
            "processor",
            format!(
                "{}, family {}, model {}",
                field("model name"),
                field("cpu family"),
                field("model\t")
            ),
        ),
        (
            "cores",
            format!("{cores}; servers on {}, client on {}", lab.server_core, lab.client_core),
        ),
        ("virtual machine", virtual_machine.to_owned()),
        ("TSC", format!("{ghz:.3} GHz")),
        ("cache line, there and back", format!("{round_trip:.0} ns")),
        ("kernel", kernel.split('-').next().unwrap_or_default().trim().to_owned()),
        ("ringmilld", servers::version(&lab.ringmilld.display().to_string())),
        ("qemu-storage-daemon", servers::version("qemu-storage-daemon")),
        ("fio", servers::version("fio")),
    ];
    Ok(facts.map(|(name, value)| (name.to_owned(), value)).into())
}
