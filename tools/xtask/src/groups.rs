//! The groups of tests and how each is run; what was skipped is collected and said in the last line of output.
//!
//! A failing group does not keep the others from running. The guest group is run by plain `cargo test`, one guest at a
//! time, whether or not nextest is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::instructions::{self, Options, Outcome};
use crate::{packages, provision};

/// Seeds of the simulator in a full run.
const SIM_SEEDS: u64 = 100;

/// The integration tests that boot guests; a group of their own.
const GUEST_TESTS: [&str; 2] = ["guest", "guest_vfio"];

/// A group of tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GroupName {
    /// Unit and integration tests of the whole workspace
    Unit,
    /// Examples in the documentation
    Doc,
    /// The sleep handshake in every order that the memory model allows
    Loom,
    /// The simulator
    Sim,
    /// Instructions per request, against the checked-in table
    Instructions,
    /// Guests under QEMU
    Guest,
}

impl GroupName {
    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Doc => "doc",
            Self::Loom => "loom",
            Self::Sim => "sim",
            Self::Instructions => "instructions",
            Self::Guest => "guest",
        }
    }
}

/// Seeds to run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SimRange {
    /// This one.
    One(u64),
    /// As many, from 0 on.
    First(u64),
}

enum GroupOutcome {
    Passed,
    Failed,
    Skipped(String),
}

/// Runs the groups (all if `only` is empty). False: one failed.
pub(crate) fn test(root: &Path, only: &[GroupName]) -> Result<bool> {
    let skipped_file = root.join("target/xtask-skipped.txt");
    let _ = fs::remove_file(&skipped_file);
    let (mut failed, mut skipped) = (Vec::new(), Vec::new());
    for group in GroupName::value_variants() {
        let name = group.name();
        if !only.is_empty() && !only.contains(group) {
            skipped.push(format!("{name} (not in --only)"));
            continue;
        }
        let started = Instant::now();
        let outcome = match group {
            GroupName::Unit => unit(root, &skipped_file)?,
            GroupName::Doc => passed(cargo(root, &["test", "--workspace", "--doc"], &[])?),
            GroupName::Loom => passed(loom(root)?),
            GroupName::Sim => passed(sim(root, SimRange::First(SIM_SEEDS))?),
            GroupName::Instructions => match instructions::run(root, Options::default())? {
                Outcome::Same => GroupOutcome::Passed,
                Outcome::Different => GroupOutcome::Failed,
                Outcome::NotCompared(why) => GroupOutcome::Skipped(why),
            },
            GroupName::Guest => guest_group(root, &skipped_file)?,
        };
        let seconds = started.elapsed().as_secs();
        match outcome {
            GroupOutcome::Passed => eprintln!("xtask: {name} passed in {seconds} s"),
            GroupOutcome::Failed => {
                eprintln!("xtask: {name} FAILED after {seconds} s");
                failed.push(name);
            }
            GroupOutcome::Skipped(why) => skipped.push(format!("{name} ({why})")),
        }
    }
    // Tests that skip themselves write their names here.
    let by_tests = fs::read_to_string(&skipped_file).unwrap_or_default();
    skipped.extend(by_tests.lines().map(str::to_owned));
    eprintln!(
        "xtask: {}",
        if failed.is_empty() {
            "all passed".to_owned()
        } else {
            format!("FAILED: {}", failed.join(", "))
        }
    );
    eprintln!(
        "skipped: {}",
        if skipped.is_empty() { "nothing".to_owned() } else { skipped.join("; ") }
    );
    Ok(failed.is_empty())
}

/// Runs only the guests. False: one failed.
pub(crate) fn guest(root: &Path, filter: Option<&str>, server: Option<&str>) -> Result<bool> {
    let outcome = provision::provision(root)?;
    if let Some(missing) = outcome.missing {
        bail!("the guest tests need Debian packages: {missing}");
    }
    let mut env = vec![("RINGMILL_GUEST_REQUIRED", "1")];
    env.extend(server.map(|server| ("RINGMILL_GUEST_SERVER", server)));
    run_guests(root, filter, &env)
}

/// Model-checks the sleep handshake and the rings between reactors. Everything is built anew with loom's types, in a directory of its own.
fn loom(root: &Path) -> Result<bool> {
    let args = [
        "test",
        "--package",
        "ringmill-core",
        "--lib",
        "--target-dir",
        "target/loom",
        "--",
        "loom_tests",
    ];
    cargo(root, &args, &[("RUSTFLAGS", "--cfg loom")])
}

/// Runs the simulator. False: a seed failed, and the simulator said which.
pub(crate) fn sim(root: &Path, range: SimRange) -> Result<bool> {
    let (option, number) = match range {
        SimRange::One(seed) => ("--seed", seed),
        SimRange::First(count) => ("--seeds", count),
    };
    let number = number.to_string();
    let args = [
        "run",
        "--quiet",
        "--package",
        "ringmill-vmm-glue",
        "--example",
        "sim",
        "--profile",
        "fast",
        "--",
        option,
        &number,
    ];
    cargo(root, &args, &[])
}

fn unit(root: &Path, skipped_file: &Path) -> Result<GroupOutcome> {
    let path = skipped_file.to_string_lossy();
    let env = [("RINGMILL_SKIPPED_FILE", path.as_ref())];
    if has_nextest(root) {
        let not_guest = GUEST_TESTS.map(|name| format!("not binary({name})")).join(" & ");
        return Ok(passed(cargo(
            root,
            &["nextest", "run", "--workspace", "-E", &not_guest],
            &env,
        )?));
    }
    // Plain cargo has no way to leave one test binary out, only to name all the others.
    let mut args = vec!["test", "--workspace", "--lib", "--bins", "--no-fail-fast"];
    let names = integration_tests(root)?;
    for name in names.iter().filter(|name| !GUEST_TESTS.contains(&name.as_str())) {
        args.extend(["--test", name]);
    }
    Ok(passed(cargo(root, &args, &env)?))
}

fn guest_group(root: &Path, skipped_file: &Path) -> Result<GroupOutcome> {
    provision::provision(root)?;
    let missing = packages::missing();
    if !missing.is_empty() {
        return Ok(GroupOutcome::Skipped(format!("missing {}", packages::describe(&missing))));
    }
    let path = skipped_file.to_string_lossy();
    let mut env = vec![("RINGMILL_SKIPPED_FILE", path.as_ref())];
    // An ordinary user without a network may lack the guest's kernel; root gets no excuse.
    if provision::is_root() {
        env.push(("RINGMILL_GUEST_REQUIRED", "1"));
    }
    Ok(passed(run_guests(root, None, &env)?))
}

fn run_guests(root: &Path, filter: Option<&str>, env: &[(&str, &str)]) -> Result<bool> {
    let mut args = vec!["test", "--package", "ringmill-tools", "--no-fail-fast"];
    args.extend(GUEST_TESTS.iter().flat_map(|name| ["--test", name]));
    args.extend(["--", "--test-threads=1", "--nocapture"]);
    args.extend(filter);
    cargo(root, &args, env)
}

fn passed(success: bool) -> GroupOutcome {
    if success { GroupOutcome::Passed } else { GroupOutcome::Failed }
}

fn has_nextest(root: &Path) -> bool {
    let output = cargo_command(root).args(["nextest", "--version"]).output();
    output.is_ok_and(|output| output.status.success())
}

/// Names of the files and directories in each package's `tests/`.
fn integration_tests(root: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for package in ["core", "drivers", "vmm-glue", "tools", "tools/xtask", "benches"] {
        let Ok(entries) = fs::read_dir(root.join(package).join("tests")) else { continue };
        for entry in entries {
            let path = entry.with_context(|| format!("listing {package}/tests"))?.path();
            let is_file = path.extension().is_some_and(|extension| extension == "rs");
            if (is_file || path.join("main.rs").is_file())
                && let Some(stem) = path.file_stem()
            {
                names.insert(stem.to_string_lossy().into_owned());
            }
        }
    }
    Ok(names)
}

fn cargo_command(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

fn cargo(root: &Path, args: &[&str], env: &[(&str, &str)]) -> Result<bool> {
    eprintln!("xtask: cargo {}", args.join(" "));
    let status = cargo_command(root)
        .args(args)
        .envs(env.iter().copied())
        .status()
        .with_context(|| format!("starting cargo {}", args.join(" ")))?;
    Ok(status.success())
}
