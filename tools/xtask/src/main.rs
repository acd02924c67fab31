//! `cargo xtask`: the developer's commands. Nothing here ships.
//!
//! tidy checks what a machine can check of the house style; test runs everything, guest only the QEMU guests, sim the
//! simulator; fuzz meets a driver with devices that lie; instructions counts what a request costs, bench measures speed beside other servers; packages says which Debian packages are missing and, as root, installs them; man writes man pages and
//! shell completions.

mod bench;
mod callgrind;
mod fuzz;
mod groups;
mod instructions;
mod man;
// The lab's own list, so that what is installed and what is looked for cannot differ; a dependency on the whole tools
// crate would make every xtask wait for it.
#[expect(unreachable_pub, reason = "public in the tools crate")]
#[path = "../../src/guest_lab/packages.rs"]
mod packages;
mod provision;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use groups::{GroupName, SimRange};
use instructions::Outcome;

/// Developer commands of ringmill.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Check file lengths, headers, hot paths, dependency direction and SAFETY notes
    Tidy,
    /// Run all tests; as root, install the Debian packages they need first
    Test {
        /// Run only these groups (comma-separated)
        #[arg(long, value_enum, value_delimiter = ',')]
        only: Vec<GroupName>,
    },
    /// Run the tests that boot QEMU guests
    Guest {
        /// Run only the tests whose names contain this
        filter: Option<String>,
        /// What serves the disks; by default what the tests choose
        #[arg(long, value_parser = ["ringmilld", "qemu-storage-daemon"])]
        server: Option<String>,
    },
    /// Run the simulator with one seed or with many
    Sim {
        /// Replay this seed
        #[arg(long, conflicts_with = "seeds")]
        seed: Option<u64>,
        /// Run the seeds 0 to N-1
        #[arg(long, value_name = "N", default_value_t = 100)]
        seeds: u64,
    },
    /// Have a driver meet devices that lie, in the device model, for some time
    Fuzz(fuzz::Options),
    /// Write man pages and shell completions to target/man and target/completions
    Man,
    /// Measure ringmilld beside qemu-storage-daemon and fio, in one run, into docs/PERFORMANCE.md; about ten minutes
    Bench(bench::Options),
    /// Count instructions per request and compare them with benches/instructions.toml
    Instructions {
        /// Make the counts the table
        #[arg(long)]
        write: bool,
        /// Also name the functions in which they were spent
        #[arg(long)]
        functions: bool,
    },
    /// Say which Debian packages the tests still need
    Packages {
        /// Install them (root only)
        #[arg(long)]
        install: bool,
    },
}

fn main() -> ExitCode {
    match run(&Args::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// False: the command did its work and found something wrong.
fn run(task: &Task) -> Result<bool> {
    let root = workspace_root()?;
    match task {
        Task::Tidy => {
            let findings = tidy::check(&root)?;
            for finding in &findings {
                println!("{finding}");
            }
            eprintln!("tidy: {} finding(s)", findings.len());
            Ok(findings.is_empty())
        }
        Task::Test { only } => groups::test(&root, only),
        Task::Guest { filter, server } => {
            groups::guest(&root, filter.as_deref(), server.as_deref())
        }
        Task::Sim { seed, seeds } => {
            let range = seed.map_or(SimRange::First(*seeds), SimRange::One);
            groups::sim(&root, range)
        }
        Task::Fuzz(options) => fuzz::run(&root, options),
        Task::Man => man::man(&root),
        Task::Bench(options) => bench::run(&root, options),
        Task::Instructions { write, functions } => {
            let options = instructions::Options { write: *write, functions: *functions };
            match instructions::run(&root, options)? {
                Outcome::Same => Ok(true),
                Outcome::Different => Ok(false),
                Outcome::NotCompared(why) => {
                    println!("not compared: {why}");
                    Ok(true)
                }
            }
        }
        Task::Packages { install } => {
            let outcome = if *install { provision::provision(&root)? } else { provision::look() };
            if let Some(missing) = &outcome.missing {
                println!("missing: {missing}");
            } else {
                println!("all Debian packages are there");
            }
            Ok(outcome.missing.is_none())
        }
    }
}

fn workspace_root() -> Result<PathBuf> {
    // Where cargo runs us from, not where we were compiled: a checkout may have moved.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").context("run this as `cargo xtask`")?;
    let root = Path::new(&manifest).ancestors().nth(2).context("tools/xtask has no grandparent")?;
    Ok(root.to_owned())
}
