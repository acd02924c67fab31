//! `cargo xtask bench`: builds everything as it ships and runs the speed marks.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Builds with the release profile and measures. True when the measurement ran to its end.
pub(crate) fn run(root: &Path, rounds: u32, seconds: u32) -> Result<bool> {
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
        .current_dir(root)
        .status()
        .context("cannot run cargo")?;
    if !built.success() {
        bail!("the release build failed");
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let release = target.join("release");
    let status = Command::new(release.join("marks"))
        .arg("--ringmilld")
        .arg(release.join("ringmilld"))
        .args(["--rounds", &rounds.to_string(), "--seconds", &seconds.to_string()])
        .current_dir(root)
        .status()
        .context("cannot start the marks")?;
    Ok(status.success())
}
