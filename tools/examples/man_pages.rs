//! Writes the man pages and shell completions of all programs: `man_pages MAN_DIR COMPLETIONS_DIR`.
//!
//! In: the command lines as clap knows them, so a page cannot differ from `--help`. Out: one page per program and
//! subcommand, one completion script per shell. Run by `cargo xtask man`, which stays light without these crates.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;
use ringmill_tools::{ctl, daemon, perf};

const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(man), Some(completions)) = (args.next(), args.next()) else {
        anyhow::bail!("usage: man_pages MAN_DIR COMPLETIONS_DIR");
    };
    for dir in [&man, &completions] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    write::<daemon::args::Cli>(&man, &completions)?;
    write::<ctl::Cli>(&man, &completions)?;
    write::<perf::Cli>(&man, &completions)
}

fn write<Cli: CommandFactory>(man: &Path, completions: &Path) -> Result<()> {
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut command, &name, completions)
            .with_context(|| format!("cannot write the {shell} completions of {name}"))?;
    }
    // A page about asking for help helps nobody.
    clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), man)
        .with_context(|| format!("cannot write the man pages of {name}"))
}
