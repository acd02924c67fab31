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
        eprintln!("ringmilld: {}", one_line(error.chain().map(ToString::to_string)));
        ExitCode::FAILURE
    })
}

/// An error and its causes without what is said twice: many messages already contain their cause's.
fn one_line(chain: impl Iterator<Item = String>) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in chain {
        if parts.iter().any(|said| said.contains(&part)) {
            continue;
        }
        parts.retain(|said| !part.contains(said));
        parts.push(part);
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn what_a_message_and_its_cause_both_say_is_said_once() {
        let said = |parts: &[&str]| one_line(parts.iter().map(ToString::to_string));
        assert_eq!(said(&["core 7", "core 7 does not exist"]), "core 7 does not exist");
        assert_eq!(said(&["cannot read x: denied", "denied"]), "cannot read x: denied");
        assert_eq!(said(&["cannot read x", "denied"]), "cannot read x: denied");
    }
}
