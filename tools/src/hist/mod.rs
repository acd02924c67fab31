//! Latency histograms for people: tables and plots for the terminal, files for other tools.
//!
//! In: [`Row`]s, each the latencies of one stage of one operation, from the RPC's answer or from the engine. Out:
//! text ([`table`], [`plot`]) or a file ([`dump`]: JSON, HdrHistogram interval log, SVG). Values are nanoseconds.
//! Runs in tools and control threads only.

pub mod dump;
pub mod payload;
pub mod plot;
pub mod svg;
pub mod table;

use hdrhistogram::Histogram;
use serde_json::Value;

use crate::rpc::engine::LatencyRow;

/// Stages in the order in which a request goes through them.
pub const STAGES: [&str; 4] = ["queue", "device", "complete", "total"];

/// Latencies of one stage of one operation.
#[derive(Debug, Clone)]
pub struct Row {
    /// Controller.
    pub controller: String,
    /// Queue index; `None`: all queues together.
    pub queue: Option<u16>,
    /// Operation.
    pub op: String,
    /// Stage.
    pub stage: String,
    /// In ns.
    pub histogram: Histogram<u64>,
}

/// An answer of `latency_get_histograms` that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// A field is missing or of the wrong type.
    #[error("the daemon's answer lacks \"{0}\"; is it another version of ringmill?")]
    Field(&'static str),
    /// The payload is broken.
    #[error(transparent)]
    Payload(#[from] payload::PayloadError),
}

impl From<LatencyRow> for Row {
    fn from(row: LatencyRow) -> Self {
        Self {
            controller: row.controller,
            queue: Some(row.queue),
            op: row.op.to_owned(),
            stage: row.stage.to_owned(),
            histogram: row.histogram,
        }
    }
}

impl Row {
    /// The queue for people.
    pub fn queue_name(&self) -> String {
        self.queue.map_or_else(|| "all queues".to_owned(), |queue| format!("queue {queue}"))
    }
}

/// The rows in an answer of `latency_get_histograms`.
pub fn rows_of(answer: &Value) -> Result<Vec<Row>, RowError> {
    let rows =
        answer.get("histograms").and_then(Value::as_array).ok_or(RowError::Field("histograms"))?;
    rows.iter()
        .map(|row| {
            let text = |name: &'static str| {
                row.get(name)
                    .and_then(Value::as_str)
                    .map(str::to_owned)
                    .ok_or(RowError::Field(name))
            };
            let queue = row
                .get("queue")
                .and_then(Value::as_u64)
                .and_then(|queue| u16::try_from(queue).ok());
            Ok(Row {
                controller: text("ctrlr")?,
                queue: Some(queue.ok_or(RowError::Field("queue"))?),
                op: text("op")?,
                stage: text("stage")?,
                histogram: payload::decode(&text("hdr")?)?,
            })
        })
        .collect()
}

/// One row per controller, operation and stage: the queues added up. Rows without a request are left out.
pub fn merge_queues(rows: Vec<Row>) -> Vec<Row> {
    let mut merged: Vec<Row> = Vec::new();
    for row in rows.into_iter().filter(|row| !row.histogram.is_empty()) {
        let same = merged
            .iter_mut()
            .find(|m| m.controller == row.controller && m.op == row.op && m.stage == row.stage);
        match same {
            // An auto-sized histogram takes any value; a fixed one drops what it cannot hold, as it did before.
            Some(same) => same.histogram.add(&row.histogram).unwrap_or(()),
            None => {
                let mut row = Row { queue: None, ..row };
                row.histogram.auto(true);
                merged.push(row);
            }
        }
    }
    merged
}

/// Rows that belong on one page: same controller, queue and operation; in the order of their first appearance,
/// stages in the order of a request's way.
pub fn groups(rows: &[Row]) -> Vec<Vec<&Row>> {
    let mut groups: Vec<Vec<&Row>> = Vec::new();
    for row in rows.iter().filter(|row| !row.histogram.is_empty()) {
        let same = |group: &&mut Vec<&Row>| {
            group.first().is_some_and(|g| {
                g.controller == row.controller && g.queue == row.queue && g.op == row.op
            })
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    let rank =
        |row: &&Row| STAGES.iter().position(|stage| *stage == row.stage).unwrap_or(STAGES.len());
    for group in &mut groups {
        group.sort_by_key(rank);
    }
    groups
}

/// A time for people, three digits: `512 ns`, `1.53 µs`, `12.4 ms`, `1.00 s`.
pub fn duration_text(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    match value {
        _ if unit == "ns" => format!("{value:.0} ns"),
        v if v < 9.995 => format!("{v:.2} {unit}"),
        v if v < 99.95 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    }
}

/// A value of a histogram as `f64`; exact up to 2⁵³ ns, which is 104 days.
pub(crate) fn as_f64(value: u64) -> f64 {
    let high = u32::try_from(value >> 32).unwrap_or(u32::MAX);
    let low = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Latencies like a device's: a body around `median_ns` and a thin tail.
    pub(crate) fn sample(stage: &str, queue: u16, median_ns: u64) -> Row {
        let mut histogram = Histogram::new(3).unwrap();
        let mut state = median_ns | 1;
        for count in 0..20_000_u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let spread = median_ns / 2 + (state >> 40) * median_ns / (1 << 24);
            let tail = if count % 1_000 == 999 { spread * (8 + state % 32) } else { spread };
            histogram.record(tail).unwrap();
        }
        Row {
            controller: "vm1".to_owned(),
            queue: Some(queue),
            op: "read".to_owned(),
            stage: stage.to_owned(),
            histogram,
        }
    }

    pub(crate) fn samples() -> Vec<Row> {
        let mut rows = Vec::new();
        for queue in 0..2 {
            for (stage, median_ns) in
                [("total", 14_000), ("queue", 900), ("device", 12_000), ("complete", 350)]
            {
                rows.push(sample(stage, queue, median_ns));
            }
        }
        rows
    }

    #[test]
    fn queues_add_up_and_stages_come_in_order() {
        let rows = samples();
        assert_eq!(groups(&rows).len(), 2);
        let merged = merge_queues(rows);
        assert_eq!(merged.len(), 4);
        assert!(merged.iter().all(|row| row.histogram.len() == 40_000 && row.queue.is_none()));
        let groups = groups(&merged);
        let stages: Vec<&str> = groups[0].iter().map(|row| row.stage.as_str()).collect();
        assert_eq!(stages, STAGES);
    }

    #[test]
    fn an_answer_of_the_rpc_becomes_rows_again() {
        let row = sample("total", 3, 10_000);
        let answer = serde_json::json!({"histograms": [{
            "ctrlr": "vm1", "queue": 3, "op": "read", "stage": "total", "hdr": payload::encode(&row.histogram).unwrap(),
        }]});
        let back = rows_of(&answer).unwrap();
        assert_eq!(back[0].histogram, row.histogram);
        assert_eq!(back[0].queue, Some(3));
        assert!(
            rows_of(&serde_json::json!({"histograms": [{}]}))
                .unwrap_err()
                .to_string()
                .contains("ctrlr")
        );
    }

    #[test]
    fn times_have_three_digits() {
        for (ns, text) in [
            (0.0, "0 ns"),
            (999.0, "999 ns"),
            (1530.0, "1.53 µs"),
            (12_400.0, "12.4 µs"),
            (1e8, "100 ms"),
            (1e9, "1.00 s"),
        ] {
            assert_eq!(duration_text(ns), text);
        }
        assert_eq!(as_f64(1 << 40), 1_099_511_627_776.0);
    }
}
