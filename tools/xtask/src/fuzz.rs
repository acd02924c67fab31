//! `cargo xtask fuzz`: the real driver on devices that lie, seed after seed, for a given time.
//!
//! Flow: slices of seeds → processes of the program `nvme-liar`, two at a time → their lines, each waited for no longer than
//! [`HANG`]. So a panic, a lost request and a hang end one process, and its last line has the seed.
//! **Invariant:** no process outlives the command.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

/// Processes at a time: most of a life is waiting.
const WORKERS: usize = 2;
/// Seeds per process.
const SLICE: u64 = 64;
/// No life takes longer, whatever the device does; the driver's own bounds come first.
const HANG: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(200);
/// Lives of one seed when it is replayed: what a driver asks depends on time, too, so not every one is the same.
const REPLAYS: u64 = 20;
/// What a process said, kept for a report.
const TAIL_BYTES: usize = 16 << 10;

/// What is met with lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// The NVMe driver
    Nvme,
}

/// For how long, and which.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What is met with lies
    #[arg(value_enum)]
    target: Target,
    /// Go on for this long, seconds
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Begin with this seed instead of one that depends on the time
    #[arg(long, value_name = "SEED")]
    first: Option<u64>,
    /// Replay this seed, twenty times
    #[arg(long, conflicts_with_all = ["seconds", "first"])]
    seed: Option<u64>,
}

/// A seed that failed.
struct Failure {
    seed: u64,
    what: String,
    said: String,
}

/// What all workers share.
struct Run {
    /// The program and what it is told before the seeds.
    program: PathBuf,
    args: Vec<String>,
    hang: Duration,
    end: Instant,
    next_seed: AtomicU64,
    is_over: AtomicBool,
    sums: Mutex<BTreeMap<String, u64>>,
    failures: Mutex<Vec<Failure>>,
}

/// Builds the program and has it meet liars. False: a seed failed.
pub(crate) fn run(root: &Path, options: &Options) -> Result<bool> {
    let Target::Nvme = options.target;
    let program = build(root)?;
    let is_replay = options.seed.is_some();
    let begin = Instant::now();
    let first = options.seed.or(options.first).unwrap_or_else(seed_of_now);
    let run = Run {
        program,
        args: Vec::new(),
        hang: HANG,
        end: begin + Duration::from_secs(options.seconds),
        next_seed: AtomicU64::new(first),
        is_over: AtomicBool::new(false),
        sums: Mutex::default(),
        failures: Mutex::default(),
    };
    if is_replay {
        for _ in 0..REPLAYS {
            run.slice(first, 1, None)?;
            if run.is_over.load(Ordering::Acquire) {
                break;
            }
        }
    } else {
        eprintln!("xtask: seeds from {first} on, {} s", options.seconds);
        run.all(begin)?;
    }
    Ok(run.report(begin.elapsed()))
}

/// Not used twice by people who run this every day.
fn seed_of_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() << 16
}

fn build(root: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--profile", "fast", "--package", "ringmill-drivers"])
        .args(["--example", "nvme-liar"])
        .current_dir(root)
        .status()
        .context("cannot run cargo")?;
    if !built.success() {
        bail!("the build of nvme-liar failed");
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    Ok(target.join("fast/examples/nvme-liar"))
}

/// A process that does not outlive this.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // One that has ended cannot be killed, and needs not.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How a process ended.
enum End {
    /// All its seeds, or the time was up.
    Over,
    /// In the middle of a life.
    Died,
    Hung,
}

impl Run {
    fn all(&self, begin: Instant) -> Result<()> {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS)
                .map(|_| {
                    scope.spawn(|| {
                        while !self.is_over.load(Ordering::Acquire) && Instant::now() < self.end {
                            let first = self.next_seed.fetch_add(SLICE, Ordering::Relaxed);
                            let end = self.slice(first, SLICE, Some(self.end));
                            if end.is_err() {
                                self.is_over.store(true, Ordering::Release);
                                return end;
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            self.show_progress(begin, || workers.iter().all(thread::ScopedJoinHandle::is_finished));
            workers.into_iter().try_for_each(|worker| {
                worker.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a worker panicked")))
            })
        })
    }

    /// One process.
    fn slice(&self, first: u64, count: u64, end: Option<Instant>) -> Result<()> {
        let mut process = Guard(
            Command::new(&self.program)
                .args(&self.args)
                .args([first.to_string(), count.to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("starting {}", self.program.display()))?,
        );
        let stdout = process.0.stdout.take().context("no pipe")?;
        let stderr = process.0.stderr.take().context("no pipe")?;
        let (to_us, lines) = channel();
        let reader = thread::spawn(move || read_lines(stdout, &to_us));
        let listener = thread::spawn(move || tail_of(stderr));
        let mut seed = first;
        let how = self.listen(&lines, (&mut seed, count), end);
        let is_alive = process.0.try_wait().is_ok_and(|status| status.is_none());
        if let (End::Died, true) = (&how, is_alive) {
            // Its output is closed, so it is ending.
            thread::sleep(LOOK);
        }
        let status = process.0.try_wait().ok().flatten();
        drop(process);
        let _ = reader.join();
        let said = listener.join().unwrap_or_default();
        let what = match how {
            End::Hung => format!("hangs: no end within {} s", self.hang.as_secs()),
            End::Died => match status {
                Some(status) => format!("ended the process: {status}"),
                None => "ended the process".to_owned(),
            },
            End::Over => return Ok(()),
        };
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(Failure { seed, what, said });
        self.is_over.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes lines until there are no more, or it is enough. `seed` is the last one that began.
    fn listen(
        &self,
        lines: &Receiver<String>,
        (seed, count): (&mut u64, u64),
        end: Option<Instant>,
    ) -> End {
        let (mut is_alive, mut ended) = (false, 0);
        let mut since = Instant::now();
        loop {
            match lines.recv_timeout(LOOK) {
                Ok(line) => {
                    since = Instant::now();
                    let mut words = line.split(' ');
                    let (verb, number) = (words.next(), words.next().and_then(|n| n.parse().ok()));
                    match (verb, number) {
                        (Some("begin"), Some(number)) => (*seed, is_alive) = (number, true),
                        (Some("end"), Some(_)) => {
                            (is_alive, ended) = (false, ended + 1);
                            self.add(words);
                        }
                        _ => {}
                    }
                }
                Err(RecvTimeoutError::Timeout) if since.elapsed() > self.hang => return End::Hung,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if ended < count => return End::Died,
                Err(RecvTimeoutError::Disconnected) => return End::Over,
            }
            // A life that has begun is waited for: it may be about to fail.
            if !is_alive && end.is_some_and(|end| Instant::now() >= end) {
                return End::Over;
            }
        }
    }

    fn add<'a>(&self, words: impl Iterator<Item = &'a str>) {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        *sums.entry("seeds".to_owned()).or_default() += 1;
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            *sums.entry(name.to_owned()).or_default() += value.parse::<u64>().unwrap_or(0);
        }
    }

    fn sum(&self, name: &str) -> u64 {
        let sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.get(name).copied().unwrap_or(0)
    }

    /// A line that changes, on a terminal; elsewhere nothing.
    fn show_progress(&self, begin: Instant, is_done: impl Fn() -> bool) {
        let is_shown = std::io::stderr().is_terminal();
        while !is_done() {
            thread::sleep(LOOK);
            if is_shown {
                eprint!("\r{}\x1b[K", self.progress(begin));
            }
        }
        if is_shown {
            eprintln!();
        }
    }

    fn progress(&self, begin: Instant) -> String {
        const WIDTH: u64 = 30;
        let whole = self.end.duration_since(begin).as_secs().max(1);
        let done = begin.elapsed().as_secs().min(whole);
        let bar: String =
            (0..WIDTH).map(|at| if at * whole < done * WIDTH { '#' } else { '.' }).collect();
        let (seeds, requests) = (self.sum("seeds"), self.sum("requests"));
        format!("[{bar}] {done}/{whole} s, {seeds} seeds, {requests} requests")
    }

    /// The figures and what failed; true when nothing did.
    fn report(&self, took: Duration) -> bool {
        let seeds = self.sum("seeds");
        println!(
            "{seeds} seeds in {:.0} s ({:.1}/s): {} attached; {} requests, {} of them done; {} resets, {} aborts, \
             {} stale completions, {} events; {} lies, {} accesses stopped by the IOMMU",
            took.as_secs_f64(),
            seeds as f64 / took.as_secs_f64().max(0.001),
            self.sum("attached"),
            self.sum("requests"),
            self.sum("good"),
            self.sum("resets"),
            self.sum("aborts"),
            self.sum("stale"),
            self.sum("events"),
            self.sum("lies"),
            self.sum("faults"),
        );
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        for Failure { seed, what, said } in &*failures {
            println!("\n{said}\nseed {seed} {what}; again: cargo xtask fuzz nvme --seed {seed}");
        }
        failures.is_empty()
    }
}

fn read_lines(stdout: impl Read, to_us: &Sender<String>) {
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        if to_us.send(line).is_err() {
            return;
        }
    }
}

/// The end of what a process says.
fn tail_of(mut stderr: impl Read) -> String {
    let (mut tail, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = stderr.read(&mut buffer) {
        tail.extend_from_slice(&buffer[..count]);
        if tail.len() > 2 * TAIL_BYTES {
            tail.drain(..tail.len() - TAIL_BYTES);
        }
    }
    String::from_utf8_lossy(&tail).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program of a few words; `$1` and `$2` are the first seed and how many.
    fn script(text: &str) -> Run {
        Run {
            program: "/bin/sh".into(),
            args: ["-c", text, "script"].map(str::to_owned).into(),
            hang: Duration::from_millis(500),
            end: Instant::now() + Duration::from_secs(60),
            next_seed: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            sums: Mutex::default(),
            failures: Mutex::default(),
        }
    }

    fn failure_of(text: &str) -> (u64, String, String) {
        let run = script(text);
        run.slice(5, 2, None).unwrap();
        assert!(!run.report(Duration::from_secs(1)));
        assert!(run.is_over.load(Ordering::Acquire));
        let failure = run.failures.lock().unwrap().pop().unwrap();
        (failure.seed, failure.what, failure.said)
    }

    #[test]
    fn what_lives_say_is_added_up() {
        let text = "echo begin $1; echo end $1 requests=3; echo begin 6; echo end 6 requests=4";
        let run = script(text);
        run.slice(5, 2, None).unwrap();
        assert_eq!((run.sum("seeds"), run.sum("requests")), (2, 7));
        assert!(run.report(Duration::from_secs(1)));
    }

    #[test]
    fn a_life_that_does_not_end_well_is_named_with_what_was_said() {
        let (seed, what, said) =
            failure_of("echo begin 5; echo end 5; echo begin 6; echo ouch >&2; kill -6 $$");
        assert_eq!((seed, said.as_str()), (6, "ouch"));
        assert!(what.contains("signal: 6"), "{what}");
        let (seed, what, _) = failure_of("echo begin 5; echo end 5; echo begin 6; exec sleep 60");
        assert_eq!(seed, 6);
        assert!(what.contains("hangs"), "{what}");
    }

    #[test]
    fn a_program_that_ends_before_its_last_seed_is_a_failure() {
        assert_eq!(failure_of("exit 0").0, 5);
    }
}
