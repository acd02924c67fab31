//! The progress bar: on a terminal only, on standard error, a few times per second.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use super::args::Cli;
use super::engine::Progress;

const STEPS: u64 = 1000;

/// A bar, or none.
#[derive(Debug)]
pub(crate) struct Bar(Option<ProgressBar>);

impl Bar {
    /// A bar with this title.
    pub(crate) fn new(cli: &Cli, title: &str) -> Bar {
        if !std::io::stderr().is_terminal() {
            return Bar(None);
        }
        let style = ProgressStyle::with_template("{prefix} [{bar:40}] {percent:>3} %  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let bar = ProgressBar::new(STEPS).with_style(style);
        Bar(Some(
            bar.with_prefix(format!("{title} {}", crate::config::size::format(cli.io_size.into()))),
        ))
    }

    /// Progress of a load with an end in time.
    pub(crate) fn show_time(&self, progress: Progress, total_ns: u64) {
        let Progress { elapsed_ns, finished_count } = progress;
        let kiops = u128::from(finished_count) * 1_000_000 / u128::from(elapsed_ns.max(1));
        self.show(elapsed_ns, total_ns, || format!("{kiops}k IOPS"));
    }

    /// Progress of a load with a number of requests.
    pub(crate) fn show_count(&self, count: u64, total: u64) {
        self.show(count, total, || format!("{count} of {total} requests"));
    }

    fn show(&self, part: u64, total: u64, text: impl Fn() -> String) {
        let Some(bar) = &self.0 else { return };
        let step = u128::from(part.min(total)) * u128::from(STEPS) / u128::from(total.max(1));
        bar.set_message(text());
        bar.set_position(u64::try_from(step).unwrap_or(STEPS));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
