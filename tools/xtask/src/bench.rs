//! `cargo xtask bench`: builds everything as it ships, measures, and writes docs/PERFORMANCE.md.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

/// What is handed on to the program that measures.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Measure only these sections (comma-separated): depth, size, disks, paper, peers, uring, idle, fairness, cross, nvme, quiet
    #[arg(long)]
    only: Option<String>,
    /// Rounds; each point is measured once per round
    #[arg(long)]
    rounds: Option<u32>,
    /// Length of each measurement, seconds
    #[arg(long)]
    seconds: Option<f64>,
    /// One short round of few points into target/bench-docs, to see whether everything works
    #[arg(long)]
    quick: bool,
    /// Only write the page again, from docs/performance/results.json
    #[arg(long)]
    render: bool,
}

/// Builds with the release profile and measures. True when the measurement ran to its end.
pub(crate) fn run(root: &Path, options: &Options) -> Result<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--package",
            "ringmill-tools",
            "--package",
            "ringmill-benches",
        ])
        .args(["--package", "ringmill-drivers", "--features", "ringmill-drivers/model"])
        .args([
            "--bin",
            "ringmilld",
            "--bin",
            "ringmill-perf",
            "--bin",
            "marks",
            "--bin",
            "nvme-model",
        ])
        .args(["--example", "model_speed"])
        .current_dir(root)
        .status()
        .context("cannot run cargo")?;
    if !built.success() {
        bail!("the release build failed");
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let release = target.join("release");
    // A quick run must not overwrite figures that mean something.
    let docs = if options.quick { target.join("bench-docs") } else { root.join("docs") };
    let mut command = Command::new(release.join("marks"));
    command.arg("--programs").arg(&release).arg("--docs").arg(&docs).current_dir(root);
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    if let Some(rounds) = options.rounds {
        command.args(["--rounds", &rounds.to_string()]);
    }
    if let Some(seconds) = options.seconds {
        command.args(["--seconds", &seconds.to_string()]);
    }
    command.args(options.quick.then_some("--quick")).args(options.render.then_some("--render"));
    let status = command.status().context("cannot start the marks")?;
    if status.success() {
        println!("written to {}", docs.join("PERFORMANCE.md").display());
    }
    Ok(status.success())
}
