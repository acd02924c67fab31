//! Latency histograms as files: JSON, HdrHistogram interval log, SVG.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hdrhistogram::serialization::{
    V2DeflateSerializer,
    interval_log::{IntervalLogWriterBuilder, Tag},
};
use serde_json::{Value, json};

use super::{Row, payload, svg};

/// HdrHistogram's log tools show maxima in ms when the values are ns.
const NS_PER_MS: f64 = 1e6;

/// Form of a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One object with the figures and the whole histograms.
    Json,
    /// HdrHistogram interval log, V2-compressed; one tagged line per row.
    Hlog,
    /// Percentile curves.
    Svg,
}

/// A dump that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the latencies as {format}: {reason}")]
pub struct DumpError {
    /// As what.
    pub format: Format,
    /// Why not.
    pub reason: String,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Hlog => "hlog",
            Self::Svg => "svg",
        })
    }
}

/// The rows in the form asked for. `taken` is when they were read from the daemon.
pub fn render(rows: &[Row], format: Format, taken: SystemTime) -> Result<Vec<u8>, DumpError> {
    let failed = |reason: String| DumpError { format, reason };
    match format {
        Format::Json => json(rows, taken).map_err(|error| failed(error.to_string())),
        Format::Hlog => hlog(rows, taken).map_err(failed),
        Format::Svg => svg::render(rows).map(String::into_bytes).map_err(failed),
    }
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn json(rows: &[Row], taken: SystemTime) -> Result<Vec<u8>, payload::PayloadError> {
    let mut list = Vec::new();
    for row in rows {
        let h = &row.histogram;
        let percentiles: BTreeMap<&str, u64> =
            [("50", 0.5), ("90", 0.9), ("99", 0.99), ("99.9", 0.999), ("99.99", 0.9999)]
                .into_iter()
                .map(|(name, quantile)| (name, h.value_at_quantile(quantile)))
                .collect();
        list.push(json!({
            "ctrlr": row.controller,
            "queue": row.queue,
            "op": row.op,
            "stage": row.stage,
            "count": h.len(),
            "min": h.min(),
            "mean": h.mean(),
            "max": h.max(),
            "percentiles": percentiles,
            "hdr": payload::encode(h)?,
        }));
    }
    let taken_s = since_epoch(taken).as_secs();
    let value: Value = json!({ "unit": "ns", "taken_unix_s": taken_s, "histograms": list });
    Ok(format!("{value:#}\n").into_bytes())
}

fn hlog(rows: &[Row], taken: SystemTime) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let mut builder = IntervalLogWriterBuilder::new();
    builder
        .add_comment("[Histogram log format version 1.3]")
        .add_comment("[ringmill stage latencies in ns; tag: controller/queue/operation/stage]")
        .with_start_time(taken)
        .with_max_value_divisor(NS_PER_MS);
    let mut writer =
        builder.begin_log_with(&mut bytes, &mut serializer).map_err(|error| error.to_string())?;
    for row in rows {
        let tag = tag_text(row);
        writer
            .write_histogram(&row.histogram, Duration::ZERO, Duration::ZERO, Tag::new(&tag))
            .map_err(|error| error.to_string())?;
    }
    Ok(bytes)
}

/// `vm1/q0/read/total`; a tag has no comma, blank or line end.
fn tag_text(row: &Row) -> String {
    let queue = row.queue.map_or_else(|| "all".to_owned(), |queue| format!("q{queue}"));
    let tag = format!("{}/{queue}/{}/{}", row.controller, row.op, row.stage);
    tag.chars()
        .map(|c| if c == ',' || c.is_whitespace() || c.is_control() { '_' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;
    use crate::hist::tests::samples;

    #[test]
    fn the_log_is_read_back_with_its_tags() {
        let rows = samples();
        let bytes = render(&rows, Format::Hlog, SystemTime::now()).unwrap();
        let mut found = Vec::new();
        for entry in IntervalLogIterator::new(&bytes) {
            if let LogEntry::Interval(interval) = entry.unwrap() {
                let histogram = payload::decode(interval.encoded_histogram()).unwrap();
                found.push((interval.tag().unwrap().as_str().to_owned(), histogram));
            }
        }
        assert_eq!(found.len(), rows.len());
        assert_eq!(found[0].0, "vm1/q0/read/total");
        assert!(found.iter().zip(&rows).all(|((_, histogram), row)| *histogram == row.histogram));
    }

    #[test]
    fn json_carries_figures_and_payload() {
        let rows = samples();
        let bytes = render(&rows, Format::Json, SystemTime::now()).unwrap();
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        let first = &value["histograms"][0];
        assert_eq!(first["count"], 20_000);
        assert_eq!(first["percentiles"]["50"], rows[0].histogram.value_at_quantile(0.5));
        assert_eq!(payload::decode(first["hdr"].as_str().unwrap()).unwrap(), rows[0].histogram);
    }

    /// HdrHistogram's own Python package reads the log. Set `RINGMILL_HDRH_PYTHON` to an interpreter that has the
    /// package `hdrhistogram`; without one the test says so and checks nothing.
    #[test]
    fn hdrhistogram_for_python_reads_the_log() {
        let python = std::env::var("RINGMILL_HDRH_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let has = Command::new(&python).args(["-c", "import hdrh.log"]).output();
        if !has.is_ok_and(|output| output.status.success()) {
            let line = format!(
                "SKIPPED hdrhistogram_for_python_reads_the_log: {python} has no package hdrhistogram \
                 (pip install hdrhistogram)"
            );
            eprintln!("{line}");
            if let Some(path) = std::env::var_os("RINGMILL_SKIPPED_FILE") {
                let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
                file.and_then(|mut file| writeln!(file, "{line}")).unwrap();
            }
            return;
        }
        let rows = samples();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.hlog");
        std::fs::write(&path, render(&rows, Format::Hlog, SystemTime::now()).unwrap()).unwrap();
        let script = "
import sys
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader
reader = HistogramLogReader(sys.argv[1], HdrHistogram(1, 2**62, 3))
while True:
    h = reader.get_next_interval_histogram()
    if h is None:
        break
    print(h.get_tag(), h.get_total_count(), h.get_value_at_percentile(50), h.get_max_value())
";
        let output = Command::new(&python).args(["-c", script]).arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let want: Vec<String> = rows
            .iter()
            .map(|row| {
                let h = &row.histogram;
                format!("{} {} {} {}", tag_text(row), h.len(), h.value_at_quantile(0.5), h.max())
            })
            .collect();
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().collect::<Vec<_>>(), want);
    }
}
