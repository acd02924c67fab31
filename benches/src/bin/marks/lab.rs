//! Where everything is measured: cores, programs, lengths, and the loads that every server gets alike.
//!
//! **Invariant:** only the server under measurement uses the server core: a polling reactor is put to sleep before a peer
//! is measured, and woken before its own turn. Points take turns, round by round, so a slow moment hits all.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ringmill_tools::load::{Client, LoadOptions, Mix, random_load};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::Value;

use crate::results::{Figure, Row, Section};
use crate::servers::Ringmilld;

/// The same offsets for every server.
const SEED: u64 = 7;

/// What the measurements share.
pub(crate) struct Lab {
    pub(crate) dir: PathBuf,
    /// Where all programs are.
    pub(crate) programs: PathBuf,
    pub(crate) ringmilld: PathBuf,
    pub(crate) perf: PathBuf,
    pub(crate) server_core: u32,
    pub(crate) client_core: u32,
    pub(crate) seconds: f64,
    pub(crate) rounds: usize,
    pub(crate) quick: bool,
}

/// Who is measured at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// The daemon: its reactor polls.
    Ours,
    /// Something else on the daemon's core: the reactor sleeps.
    Peer,
}

/// Something to measure once per round.
pub(crate) struct Point<'a> {
    pub(crate) series: String,
    pub(crate) x: u64,
    pub(crate) who: Who,
    pub(crate) run: Box<dyn FnMut() -> anyhow::Result<Figure> + 'a>,
}

impl<'a> Point<'a> {
    /// A point.
    pub(crate) fn new(
        series: impl Into<String>,
        x: u64,
        who: Who,
        run: impl FnMut() -> anyhow::Result<Figure> + 'a,
    ) -> Point<'a> {
        Point { series: series.into(), x, who, run: Box::new(run) }
    }
}

/// Runs a closure on a core of its own thread.
pub(crate) fn on_core<T: Send>(
    core: u32,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let mut cpus = CpuSet::new();
            cpus.set(core as usize);
            sched_setaffinity(None, &cpus).with_context(|| format!("cannot pin to core {core}"))?;
            work()
        });
        thread.join().unwrap_or_else(|_| bail!("a measuring thread panicked"))
    })
}

impl Lab {
    /// Measures all points in turn, round by round.
    pub(crate) fn measure(
        &self,
        title: &str,
        section: &mut Section,
        daemon: &Ringmilld,
        mut points: Vec<Point<'_>>,
    ) -> anyhow::Result<()> {
        let bar = ProgressBar::new((points.len() * self.rounds) as u64);
        let style = ProgressStyle::with_template("{prefix:<9} [{bar:40}] {pos}/{len}  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let bar = bar.with_style(style).with_prefix(title.to_owned());
        section.rounds = self.rounds;
        section.seconds = self.seconds;
        let first = section.rows.len();
        for point in &points {
            let (series, x) = (point.series.clone(), point.x);
            section.rows.push(Row { series, x, rounds: Vec::new() });
        }
        let mut awake = None;
        for _ in 0..self.rounds {
            for (number, point) in points.iter_mut().enumerate() {
                if awake != Some(point.who) {
                    daemon.poll(point.who == Who::Ours)?;
                    awake = Some(point.who);
                }
                bar.set_message(format!("{} {}", point.series, point.x));
                let figure = (point.run)()
                    .with_context(|| format!("{title}: {} at {}", point.series, point.x))?;
                section.rows[first + number].rounds.push(figure);
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        eprintln!("{title}: {} points, {} rounds", points.len(), self.rounds);
        Ok(())
    }

    /// Runs ringmill-perf on these targets and returns its JSON.
    pub(crate) fn perf(&self, targets: &[String], args: &[&str]) -> anyhow::Result<Value> {
        self.perf_for(self.seconds, targets, args)
    }

    /// The same for another time.
    pub(crate) fn perf_for(
        &self,
        seconds: f64,
        targets: &[String],
        args: &[&str],
    ) -> anyhow::Result<Value> {
        let output = Command::new(&self.perf)
            .args(["--json", "--ramp", "0.2", "--seed", &SEED.to_string()])
            .args(["--core", &self.client_core.to_string(), "-t", &seconds.to_string()])
            .args(args)
            .args(targets)
            .stdin(Stdio::null())
            .output()
            .context("cannot start ringmill-perf")?;
        if !output.status.success() {
            bail!("ringmill-perf {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("ringmill-perf's output is not JSON")
    }

    /// Writes every block of these disks once, as fast as it goes.
    pub(crate) fn fill(&self, sockets: &[String], span_bytes: u64) -> anyhow::Result<()> {
        let span = span_bytes.to_string();
        let args = ["-w", "verify", "--pass", "fill", "-o", "64k", "-q", "8", "--span", &span];
        self.perf(sockets, &args).map(drop).context("writing the media beforehand")
    }

    /// A load on disks of the daemon, with the cycles that its reactor spent.
    pub(crate) fn ours(
        &self,
        daemon: &Ringmilld,
        sockets: &[String],
        args: &[&str],
    ) -> anyhow::Result<Figure> {
        let before = daemon.busy_ticks()?;
        let answer = self.perf(sockets, args)?;
        let busy = daemon.busy_ticks()? - before;
        let mut figure = figure(&answer, 0);
        let count: f64 = jobs(&answer).flat_map(|job| [&job["read"], &job["write"]]).map(all).sum();
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        {
            figure.cycles = busy as f64 / count.max(1.0);
        }
        Ok(figure)
    }

    /// The `virtio-driver` crate's client on a disk: 4 KiB random reads.
    pub(crate) fn virtio_driver(&self, socket: &Path, depth: usize) -> anyhow::Result<Figure> {
        const BLOCK_BYTES: usize = 4096;
        let seconds = self.seconds;
        on_core(self.client_core, move || {
            // Three descriptors per request without indirect tables.
            let queue_size = u16::try_from((depth * 4).next_power_of_two().max(256))?;
            let mut client = Client::connect(socket, 1, queue_size, depth, BLOCK_BYTES)?;
            let options = LoadOptions {
                block_bytes: BLOCK_BYTES,
                depth,
                duration: Duration::from_secs_f64(seconds),
                mix: Mix::READS,
                span_bytes: client.capacity_bytes(),
                seed: SEED,
            };
            let report = random_load(&mut client, &options, |_| ())?;
            let latency = |quantile| {
                let ns = report.latency_ns.value_at_quantile(quantile);
                Duration::from_nanos(ns).as_secs_f64() * 1e9
            };
            Ok(Figure {
                iops: report.iops(),
                mean_ns: report.latency_ns.mean(),
                p50_ns: latency(0.5),
                p99_ns: latency(0.99),
                p999_ns: latency(0.999),
                ..Figure::default()
            })
        })
    }
}

fn jobs(answer: &Value) -> impl Iterator<Item = &Value> {
    answer["jobs"].as_array().into_iter().flatten()
}

fn all(op: &Value) -> f64 {
    op["all_ios"].as_f64().unwrap_or(0.0)
}

/// The figures of a job of fio or ringmill-perf. Percentiles are those of its reads, or of its writes without reads.
pub(crate) fn figure(answer: &Value, job: usize) -> Figure {
    let job = &answer["jobs"][job];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let (reads, writes) = (number(&job["read"]["iops"]), number(&job["write"]["iops"]));
    let op = if reads > 0.0 { &job["read"] } else { &job["write"] };
    let percentile = |name| number(&op["lat_ns"]["percentile"][name]);
    Figure {
        iops: reads + writes,
        mean_ns: number(&op["lat_ns"]["mean"]),
        p50_ns: percentile("50.000000"),
        p99_ns: percentile("99.000000"),
        p999_ns: percentile("99.900000"),
        write_mean_ns: if reads > 0.0 { number(&job["write"]["lat_ns"]["mean"]) } else { 0.0 },
        ..Figure::default()
    }
}
