//! The daemon; see `ringmill_tools::daemon`.

use std::process::ExitCode;

use clap::Parser;
use ringmill_tools::daemon::args::{Cli, Command};
use ringmill_tools::daemon::control;
use ringmill_tools::demo;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        None => control::serve(&cli.serve),
        Some(Command::Demo(args)) => demo::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("ringmilld: {error:#}");
        ExitCode::FAILURE
    })
}
