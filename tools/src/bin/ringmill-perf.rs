//! The load generator; see `ringmill_tools::perf`.

use std::process::ExitCode;

use clap::Parser;
use ringmill_tools::perf::{self, Cli};

fn main() -> ExitCode {
    match perf::main(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ringmill-perf: {error}");
            ExitCode::FAILURE
        }
    }
}
