//! Man pages and shell completions, for packagers: `target/man` and `target/completions`.
//!
//! The work is done by an example of the tools package, so that every other xtask builds without clap's generators.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// Writes the pages and scripts. False: cargo or the generator failed, and said why.
pub(crate) fn man(root: &Path) -> Result<bool> {
    let (man, completions) = (root.join("target/man"), root.join("target/completions"));
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root)
        .args(["run", "--quiet", "--package", "ringmill-tools", "--example", "man_pages", "--"])
        .args([&man, &completions])
        .status()
        .context("starting cargo run --example man_pages")?;
    if status.success() {
        println!("man pages: {}\ncompletions: {}", man.display(), completions.display());
    }
    Ok(status.success())
}
