//! Runs the simulator: `sim --seed N` replays one seed, `sim --seeds N [--from M]` runs many.
//!
//! One line per failing seed with the command that replays it; the exit code is 1 when any failed, 2 for bad arguments.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ringmill_vmm_glue::sim::simulate;

const USAGE: &str = "usage: sim --seed N | --seeds COUNT [--from FIRST]";

struct Seeds {
    first: u64,
    count: u64,
}

fn arguments() -> Result<Seeds, String> {
    let mut seeds = Seeds { first: 0, count: 100 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().and_then(|v| v.parse().ok());
        let value: u64 = value.ok_or_else(|| format!("{word} needs a number\n{USAGE}"))?;
        match word.as_str() {
            "--seed" => seeds = Seeds { first: value, count: 1 },
            "--seeds" => seeds.count = value,
            "--from" => seeds.first = value,
            _ => return Err(format!("unknown argument {word}\n{USAGE}")),
        }
    }
    Ok(seeds)
}

fn main() -> ExitCode {
    let seeds = match arguments() {
        Ok(seeds) => seeds,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    let started = Instant::now();
    let running = Arc::new(AtomicU64::new(seeds.first));
    let panicking = Arc::clone(&running);
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let seed = panicking.load(Ordering::Relaxed);
        println!("seed {seed} panics; replay: cargo xtask sim --seed {seed}");
        usual(info);
    }));
    let (mut failed, mut requests, mut steps) = (0u64, 0, 0);
    for (done, seed) in
        (seeds.first..).take(usize::try_from(seeds.count).unwrap_or(usize::MAX)).enumerate()
    {
        running.store(seed, Ordering::Relaxed);
        match simulate(seed) {
            Ok(report) => {
                requests += report.requests_count;
                steps += report.steps_count;
                if seeds.count == 1 {
                    println!("seed {seed}: {report:?}");
                }
            }
            Err(failure) => {
                failed += 1;
                println!("{failure}; replay: cargo xtask sim --seed {seed}");
            }
        }
        if seeds.count > 1000 && (done + 1) % 1000 == 0 {
            eprintln!("{} of {} seeds, {failed} failed", done + 1, seeds.count);
        }
    }
    println!(
        "{} seeds, {failed} failed, {requests} requests, {steps} steps, {:.1} s",
        seeds.count,
        started.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
