//! What `cargo xtask instructions` runs under callgrind: one case, by its name.
//!
//! `counted list` prints a line per case: its name, and `no-libc` where the C library's instructions do not count.
//! `counted run NAME` does the case's work and prints how many requests or calls that was.

use std::process::ExitCode;

use anyhow::{Context, bail};
use ringmill_benches::cases::{CASES, Count};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("counted: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> anyhow::Result<()> {
    match words {
        ["list"] => {
            for case in CASES {
                println!("{}\t{}", case.name, if case.without_libc { "no-libc" } else { "" });
            }
            Ok(())
        }
        ["run", name] => {
            let case = CASES.iter().find(|case| case.name == *name);
            let case = case.with_context(|| format!("there is no case \"{name}\""))?;
            let mut count = Count::default();
            (case.run)(&mut count).context(case.name)?;
            println!("{}", count.units_count);
            Ok(())
        }
        _ => bail!("usage: counted list | counted run NAME"),
    }
}
