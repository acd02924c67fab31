//! What a load did, as text like fio's, as JSON in fio's shape, and as histogram rows.

use std::fmt::Write;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use crate::config::size;
use crate::hist::{Row, as_f64, duration_text};

use super::args::Cli;
use super::engine::{FirstError, Outcome};
use super::job::Job;
use super::record::{OPS, Recorder};
use super::slots::Op;
use super::stamp::Fault;

const NS_PER_S: f64 = 1e9;

/// Percentiles of the text.
const PERCENTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("p99.99", 0.9999)];

/// Percentiles of the JSON, under the names that fio gives them.
const FIO_PERCENTILES: [(&str, f64); 11] = [
    ("1.000000", 0.01),
    ("5.000000", 0.05),
    ("10.000000", 0.1),
    ("25.000000", 0.25),
    ("50.000000", 0.5),
    ("75.000000", 0.75),
    ("90.000000", 0.9),
    ("95.000000", 0.95),
    ("99.000000", 0.99),
    ("99.900000", 0.999),
    ("99.990000", 0.9999),
];

/// A disk's share.
#[derive(Debug)]
pub(crate) struct DiskReport {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    /// The part that was used.
    pub(crate) span_bytes: u64,
    /// The number of its group.
    pub(crate) job: usize,
    /// Requests finished in the measured time, by queue.
    pub(crate) queues: Vec<u64>,
}

/// Disks with the same load.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// The first of them.
    pub(crate) name: String,
    pub(crate) job: Job,
    pub(crate) disks_count: usize,
}

/// One part of a load: the load itself, or a pass of verify.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) outcome: Outcome,
}

/// What verify found.
#[derive(Debug)]
pub(crate) struct VerifyReport {
    pub(crate) sectors_checked: u64,
    pub(crate) faults_count: u64,
    /// The first ones, with the number of their disk.
    pub(crate) faults: Vec<(usize, Fault)>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) groups: Vec<Group>,
    pub(crate) disks: Vec<DiskReport>,
    pub(crate) parts: Vec<Part>,
    /// The part whose latencies are reported.
    pub(crate) main: usize,
    pub(crate) verify: Option<VerifyReport>,
    /// `2 MiB pages` and the like.
    pub(crate) memory: String,
    /// Disks that were only connected.
    pub(crate) idle_count: usize,
}

/// `8.03M`, `12.3k`, as fio writes numbers.
fn short(value: f64) -> String {
    match value {
        v if v < 1e3 => format!("{v:.0}"),
        v if v < 1e4 => format!("{:.2}k", v / 1e3),
        v if v < 1e5 => format!("{:.1}k", v / 1e3),
        v if v < 1e6 => format!("{:.0}k", v / 1e3),
        v if v < 1e7 => format!("{:.2}M", v / 1e6),
        v => format!("{:.1}M", v / 1e6),
    }
}

fn bandwidth(bytes_per_s: f64) -> String {
    let mib = bytes_per_s / f64::from(1 << 20);
    let binary =
        if mib < 1024.0 { format!("{mib:.1}MiB/s") } else { format!("{:.2}GiB/s", mib / 1024.0) };
    format!("{binary} ({:.1}MB/s)", bytes_per_s / 1e6)
}

fn op_name(index: usize) -> &'static str {
    [Op::Read.name(), Op::Write.name(), Op::Flush.name()][index]
}

fn rate(count: u64, elapsed_ns: u64) -> f64 {
    as_f64(count) * NS_PER_S / as_f64(elapsed_ns.max(1))
}

impl Report {
    fn main(&self) -> &Outcome {
        &self.parts[self.main].outcome
    }

    /// Requests that failed, over all parts.
    pub(crate) fn errors_count(&self) -> u64 {
        let records = self.parts.iter().flat_map(|part| &part.outcome.records);
        records.flat_map(|record| &record.ops).map(|op| op.errors_count).sum()
    }

    fn first_error(&self) -> Option<&FirstError> {
        self.parts.iter().find_map(|part| part.outcome.first_error.as_ref())
    }

    /// True when everything went well.
    pub(crate) fn is_good(&self) -> bool {
        self.errors_count() == 0 && self.verify.as_ref().is_none_or(|v| v.faults_count == 0)
    }

    /// The latencies as rows of the histogram tools.
    pub(crate) fn rows(&self, cli: &Cli) -> Vec<Row> {
        let mut rows = Vec::new();
        for (group, record) in self.groups.iter().zip(&self.main().records) {
            let alone = self.groups.len() == 1 && group.disks_count > 1;
            let name = if alone { "all" } else { group.name.as_str() };
            let name = name.rsplit('/').next().unwrap_or(name);
            let ops = record.ops.iter().enumerate();
            rows.extend(ops.filter(|(_, op)| !op.latency_ns.is_empty()).map(|(index, op)| Row {
                controller: name.to_owned(),
                queue: (cli.queues == 1 && self.disks.len() == 1).then_some(0),
                op: op_name(index).to_owned(),
                stage: "client".to_owned(),
                histogram: op.latency_ns.clone(),
            }));
        }
        rows
    }

    /// The text for a terminal.
    pub(crate) fn text(&self, cli: &Cli) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_text(cli, &mut out);
        out
    }

    fn write_text(&self, cli: &Cli, out: &mut String) -> std::fmt::Result {
        let main = self.main();
        for (group, record) in self.groups.iter().zip(&main.records) {
            self.write_group(cli, group, record, out)?;
        }
        if self.disks.len() > 1 || cli.queues > 1 {
            self.write_shares(out)?;
        }
        let idle = match self.idle_count {
            0 => String::new(),
            1 => "; 1 idle disk".to_owned(),
            count => format!("; {count} idle disks"),
        };
        writeln!(
            out,
            "  client: {:.0} % of its rounds found nothing to do; {}{idle}",
            100.0 * as_f64(main.empty_rounds_count) / as_f64(main.rounds_count.max(1)),
            self.memory,
        )?;
        self.write_verdict(out)
    }

    /// Disks with the same load.
    fn write_group(
        &self,
        cli: &Cli,
        group: &Group,
        record: &Recorder,
        out: &mut String,
    ) -> std::fmt::Result {
        let Job { depth, io_size, workload, queues, .. } = group.job;
        let queues = match (&cli.bdev, cli.packed) {
            (Some(_), _) => "1 channel".to_owned(),
            (None, packed) => {
                let form = if packed { "packed" } else { "split" };
                let tables = if cli.indirect { ", indirect" } else { "" };
                let plural = if queues == 1 { "queue" } else { "queues" };
                format!("{queues} {form} {plural}{tables}")
            }
        };
        let (io_bytes, elapsed_ns) = (u64::from(io_size), self.main().elapsed_ns);
        writeln!(
            out,
            "{}: {} requests, depth {depth}, {queues}, {} disk{}, {:.2} s",
            workload.name(),
            size::format(io_bytes),
            group.disks_count,
            if group.disks_count == 1 { "" } else { "s" },
            as_f64(elapsed_ns) / NS_PER_S,
        )?;
        if self.groups.len() > 1 {
            let first = if group.disks_count > 1 { "first of them: " } else { "" };
            writeln!(out, "  {first}{}", group.name)?;
        }
        if workload == super::args::Work::Verify {
            self.write_passes(io_bytes, out)?;
        }
        for (index, op) in record.ops.iter().enumerate().take(OPS - 1) {
            if op.latency_ns.is_empty() {
                continue;
            }
            let iops = rate(op.latency_ns.len(), elapsed_ns);
            writeln!(
                out,
                "  {}: IOPS={}, BW={}, {} requests",
                op_name(index),
                short(iops),
                bandwidth(iops * as_f64(io_bytes)),
                op.latency_ns.len(),
            )?;
            write_latency(&op.latency_ns, out)?;
        }
        Ok(())
    }

    fn write_passes(&self, io_bytes: u64, out: &mut String) -> std::fmt::Result {
        for part in &self.parts {
            let records = part.outcome.records.iter();
            let data = records.flat_map(|record| record.ops.iter().take(OPS - 1));
            let count: u64 = data.map(|op| op.finished_count).sum();
            let elapsed = as_f64(part.outcome.elapsed_ns) / NS_PER_S;
            let what = match count {
                0 => "done".to_owned(),
                count => size::format(count.saturating_mul(io_bytes)),
            };
            writeln!(out, "  {}: {what} in {elapsed:.2} s", part.name)?;
        }
        Ok(())
    }

    /// How evenly requests are spread.
    fn write_shares(&self, out: &mut String) -> std::fmt::Result {
        let shares = self.disks.iter().flat_map(|disk| &disk.queues).copied();
        let (low, high) = (shares.clone().min().unwrap_or(0), shares.max().unwrap_or(0));
        let elapsed_ns = self.main().elapsed_ns;
        let (low, high) = (short(rate(low, elapsed_ns)), short(rate(high, elapsed_ns)));
        writeln!(out, "  per queue: {low} to {high} IOPS")
    }

    fn write_verdict(&self, out: &mut String) -> std::fmt::Result {
        if let Some(error) = self.first_error() {
            let FirstError { place, io, status } = error;
            writeln!(
                out,
                "  FAILED: {} requests; the first was a {} at byte {} of {place}, status {status}",
                self.errors_count(),
                io.op.name(),
                io.offset_bytes,
            )?;
        }
        let Some(verify) = &self.verify else { return Ok(()) };
        if verify.faults_count == 0 {
            return writeln!(out, "  verified: {} sectors, all right", verify.sectors_checked);
        }
        let VerifyReport { sectors_checked, faults_count, faults } = verify;
        writeln!(
            out,
            "  WRONG DATA: {faults_count} of {sectors_checked} sectors; the first ones:"
        )?;
        for (disk, fault) in faults {
            let name = self.disks.get(*disk).map_or("", |disk| disk.name.as_str());
            writeln!(out, "    {name}: {fault}")?;
        }
        Ok(())
    }

    /// The JSON object, in the shape of fio's: `jobs[0].read.iops`, `.lat_ns.percentile["99.000000"]` and so on.
    pub(crate) fn json(&self, cli: &Cli) -> Value {
        let main = self.main();
        let jobs: Vec<Value> = (0..self.groups.len()).map(|group| self.job_json(group)).collect();
        let disks: Vec<Value> = self
            .disks
            .iter()
            .map(|disk| {
                let requests: u64 = disk.queues.iter().sum();
                json!({
                    "name": disk.name,
                    "size_bytes": disk.size_bytes,
                    "span_bytes": disk.span_bytes,
                    "total_ios": requests,
                    "iops": rate(requests, main.elapsed_ns),
                    "job": disk.job,
                    "queues": disk.queues,
                })
            })
            .collect();
        let verify = self.verify.as_ref().map(|verify| {
            let faults = verify.faults.iter().map(|(disk, fault)| {
                json!({
                    "disk": self.disks.get(*disk).map(|disk| disk.name.as_str()),
                    "offset_bytes": fault.expected.offset_bytes,
                    "what": fault.to_string(),
                })
            });
            json!({
                "sectors_checked": verify.sectors_checked,
                "faults": verify.faults_count,
                "first_faults": faults.collect::<Vec<Value>>(),
            })
        });
        json!({
            "ringmill-perf version": env!("CARGO_PKG_VERSION"),
            "global options": {
                "rw": cli.workload.name(),
                "bs": cli.io_size,
                "iodepth": cli.depth,
                "queues": cli.queues,
                "ring": if cli.packed { "packed" } else { "split" },
                "indirect": cli.indirect,
                "rwmixread": cli.read_percent,
                "runtime_s": cli.time,
                "ramp_time_s": cli.ramp,
                "rate_iops": cli.rate,
                "seed": cli.seed,
                "core": cli.core,
            },
            "jobs": jobs,
            "disks": disks,
            "verify": verify,
            "client": {
                "rounds": main.rounds_count,
                "empty_rounds": main.empty_rounds_count,
                "memory": self.memory,
                "idle_disks": self.idle_count,
            },
        })
    }

    /// One group as fio's job.
    fn job_json(&self, group: usize) -> Value {
        let Group { name, job, disks_count } = &self.groups[group];
        let name = if self.groups.len() == 1 { "ringmill-perf" } else { name };
        let mut value = Map::new();
        value.insert("jobname".into(), name.into());
        value.insert("error".into(), i32::from(!self.is_good()).into());
        value.insert("total_err".into(), self.errors_count().into());
        value.insert(
            "job options".into(),
            json!({
                "rw": job.workload.name(),
                "bs": job.io_size,
                "iodepth": job.depth,
                "queues": job.queues,
                "rwmixread": job.read_percent,
                "disks": disks_count,
            }),
        );
        for index in 0..OPS {
            value.insert(op_name(index).to_owned(), self.op_json(group, index));
        }
        value.into()
    }

    fn op_json(&self, group: usize, index: usize) -> Value {
        let main = self.main();
        let op = &main.records[group].ops[index];
        let finished = |part: &Part| {
            part.outcome.records.get(group).map_or(0, |record| record.ops[index].finished_count)
        };
        let total: u64 = self.parts.iter().map(finished).sum();
        let iops = rate(op.latency_ns.len(), main.elapsed_ns);
        let bytes =
            if index == Op::Flush as usize { 0 } else { u64::from(self.groups[group].job.io_size) };
        let h = &op.latency_ns;
        let percentile: Map<String, Value> = FIO_PERCENTILES
            .iter()
            .filter(|_| !h.is_empty())
            .map(|(name, quantile)| ((*name).to_owned(), h.value_at_quantile(*quantile).into()))
            .collect();
        json!({
            "io_bytes": h.len().saturating_mul(bytes),
            "bw_bytes": iops * as_f64(bytes),
            "iops": iops,
            "runtime": main.elapsed_ns / 1_000_000,
            "total_ios": h.len(),
            "all_ios": total,
            "errors": op.errors_count,
            "lat_ns": {
                "min": if h.is_empty() { 0 } else { h.min() },
                "max": h.max(),
                "mean": h.mean(),
                "stddev": h.stdev(),
                "N": h.len(),
                "percentile": percentile,
            },
        })
    }
}

fn write_latency(h: &Histogram<u64>, out: &mut String) -> std::fmt::Result {
    let text = |ns: u64| duration_text(as_f64(ns));
    write!(out, "    lat: min={}, mean={}", text(h.min()), duration_text(h.mean()))?;
    for (name, quantile) in PERCENTILES {
        write!(out, ", {name}={}", text(h.value_at_quantile(quantile)))?;
    }
    writeln!(out, ", max={}", text(h.max()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_as_fio_writes_them() {
        for (value, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (1234.0, "1.23k"),
            (12_345.0, "12.3k"),
            (8.034e6, "8.03M"),
            (2.31e7, "23.1M"),
        ] {
            assert_eq!(short(value), text);
        }
        assert_eq!(bandwidth(1_048_576.0), "1.0MiB/s (1.0MB/s)");
        assert_eq!(bandwidth(4.0 * 1_073_741_824.0), "4.00GiB/s (4295.0MB/s)");
    }
}
