//! What the demo prints: a progress bar while it works, figures when it is done.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use ringmill_core::reactor::tick_rate;
use serde_json::{Value, json};

use crate::ctl;
use crate::hist;

/// Replies of our own daemon come at once; this only bounds a mistake.
const REPLY_MAX: Duration = Duration::from_secs(20);

/// A connection to the demo's daemon.
pub(super) fn connect(rpc: &Path) -> anyhow::Result<ctl::client::Client> {
    ctl::client::Client::connect(rpc, REPLY_MAX).context("the demo's daemon does not answer")
}

/// A bar for a share from 0 to 1; on a terminal only.
pub(super) fn bar(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("  {msg:<46} [{bar:30}] {percent:>3} %")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::new(1000).with_style(style).with_message(what.to_owned())
}

/// Moves the bar.
pub(super) fn advance(bar: &ProgressBar, share: f64) {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..1000"
    )]
    bar.set_position((share.clamp(0.0, 1.0) * 1000.0) as u64);
}

/// Busy ticks of all reactors so far.
pub(super) fn busy_ticks(client: &mut ctl::client::Client) -> anyhow::Result<u64> {
    let answer = client.call("framework_get_reactors", Value::Null)?;
    let reactors = answer["reactors"].as_array().context("no reactors in the answer")?;
    Ok(reactors.iter().filter_map(|r| r["busy"].as_u64()).sum())
}

/// Prints the stage latencies of every disk as a table and a plot.
pub(super) fn print_latencies(client: &mut ctl::client::Client) -> anyhow::Result<()> {
    let answer = client.call("latency_get_histograms", json!({}))?;
    let rows = hist::merge_queues(hist::rows_of(&answer)?);
    let rows: Vec<hist::Row> =
        rows.into_iter().filter(|r| r.op == "read" || r.op == "write").collect();
    println!("Where the time goes, as the reactor sees it:\n");
    println!("{}", hist::table::render(&rows));
    let reads: Vec<hist::Row> = rows.into_iter().filter(|r| r.op == "read").collect();
    println!("{}", hist::plot::render(&reads));
    Ok(())
}

/// One line about the machine, so that the figures mean something to somebody else.
#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
pub(super) fn machine(reactor: u32, client: u32) -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    let model = model.trim_start_matches([' ', '\t', ':']);
    let ghz = tick_rate() as f64 / 1e9;
    format!("{model}, TSC {ghz:.2} GHz; reactor on core {reactor}, client on core {client}")
}
