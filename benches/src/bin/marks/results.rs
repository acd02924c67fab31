//! What was measured, as it is kept in `docs/performance/results.json`: every round of every point.
//!
//! Sections are replaced one by one, so that one can be measured again; each says when and how long it was measured.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// One measurement. What a case does not have is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Figure {
    pub(crate) iops: f64,
    pub(crate) mean_ns: f64,
    pub(crate) p50_ns: f64,
    pub(crate) p99_ns: f64,
    pub(crate) p999_ns: f64,
    /// Mean latency of writes of a mixed load; `mean_ns` is that of its reads.
    pub(crate) write_mean_ns: f64,
    /// Busy cycles of the reactor per request, by the daemon's own counters.
    pub(crate) cycles: f64,
    /// Anything else: bytes, system calls, as the section says.
    pub(crate) other: f64,
}

/// Rounds of one point of one series.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) series: String,
    /// Depth, size or number of disks.
    pub(crate) x: u64,
    pub(crate) rounds: Vec<Figure>,
}

/// What belongs together and was measured in turn.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Section {
    /// Date and time, UTC.
    pub(crate) taken: String,
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    pub(crate) rows: Vec<Row>,
    /// Command lines that were used.
    pub(crate) commands: Vec<String>,
    /// What a reader must know: what was left out and why.
    pub(crate) notes: Vec<String>,
}

/// Everything.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Facts of the machine, by name.
    pub(crate) machine: BTreeMap<String, String>,
    pub(crate) sections: BTreeMap<String, Section>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

impl Row {
    /// The median of one part of the figures.
    pub(crate) fn median(&self, part: impl Fn(&Figure) -> f64) -> f64 {
        median(self.rounds.iter().map(part).collect())
    }

    /// The lowest and highest of one part.
    pub(crate) fn range(&self, part: impl Fn(&Figure) -> f64) -> (f64, f64) {
        let values = || self.rounds.iter().map(&part);
        (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max))
    }
}

impl Section {
    /// The row of a series at a place.
    pub(crate) fn row(&self, series: &str, x: u64) -> Option<&Row> {
        self.rows.iter().find(|row| row.series == series && row.x == x)
    }

    /// A median, if it was measured.
    pub(crate) fn median(&self, series: &str, x: u64, part: fn(&Figure) -> f64) -> Option<f64> {
        let value = self.row(series, x)?.median(part);
        value.is_finite().then_some(value)
    }

    /// The series in the order of their first appearance.
    pub(crate) fn series(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !names.contains(&row.series.as_str()) {
                names.push(&row.series);
            }
        }
        names
    }

    /// The places, ascending.
    pub(crate) fn places(&self) -> Vec<u64> {
        let mut places: Vec<u64> = self.rows.iter().map(|row| row.x).collect();
        places.sort_unstable();
        places.dedup();
        places
    }
}

impl Results {
    /// What was kept; nothing if there is no file yet.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Results> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is not ours", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Results::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Keeps it.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("figures as JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// A section.
    pub(crate) fn section(&self, name: &str) -> Option<&Section> {
        self.sections.get(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_take_the_middle_and_rows_are_found() {
        let figure = |iops| Figure { iops, ..Figure::default() };
        let row = |x, values: &[f64]| Row {
            series: "a".into(),
            x,
            rounds: values.iter().copied().map(figure).collect(),
        };
        let section = Section {
            rows: vec![row(8, &[3.0, 100.0, 1.0]), row(1, &[2.0, 4.0]), row(2, &[])],
            ..Section::default()
        };
        assert_eq!(section.median("a", 8, |f| f.iops), Some(3.0));
        assert_eq!(section.median("a", 1, |f| f.iops), Some(3.0));
        assert_eq!(section.median("a", 2, |f| f.iops), None);
        assert_eq!(section.median("b", 1, |f| f.iops), None);
        assert_eq!(section.places(), [1, 2, 8]);
        assert_eq!(section.rows[0].range(|f| f.iops), (1.0, 100.0));
    }
}
