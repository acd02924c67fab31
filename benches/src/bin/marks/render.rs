//! `docs/PERFORMANCE.md` and its plots, from what was measured.
//!
//! In: results. Out: text and SVG files; the same results always make the same files.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow};
use ringmill_tools::hist::svg::{Axes, Line, decade_text, decades, figure};

use crate::results::{Figure, Results, Row, Section};
use crate::targets::verdicts;

const INTRO: &str = "# Performance

<!-- Written by `cargo xtask bench` from docs/performance/results.json; edit benches/src/bin/marks, not this file. -->

All figures of a section come from one run: the servers take turns, round by round, each on the server core, with the
client on the other core; what counts is the median of the rounds. A polling reactor is put to sleep while a peer has its
core. Media are written before they are read. The client is `ringmill-perf` for every server (three descriptors per
request, no interrupts), but where another is named. A latency is what the client sees. Cycles per request are TSC ticks
in which the reactor found work, by its own count, divided by requests. The machine's other tenants decide part of
every figure: quote ratios.

```console
$ cargo xtask bench                        # everything, about ten minutes
$ cargo xtask bench --only depth,paper     # these sections again, the others stay
$ cargo xtask bench --render               # only this page, from the stored results
```

";

/// What is said of each section, in the order of the page: name, heading, text.
const TEXTS: &[(&str, &str, &str)] = &[
    (
        "depth",
        "Queue depth",
        "A null medium, 4 KiB random reads, one queue. *Bare loop* is the least that a disk can be: it \
        reads each descriptor and header, answers, checks nothing and records nothing (`ringmill-perf --floor`); it also \
        shows what the client itself can do.",
    ),
    (
        "size",
        "Request size",
        "Random reads at depth 32: a null medium, and a RAM disk whose data is copied.",
    ),
    ("disks", "Number of disks", "Null disks, all of them busy, on one reactor."),
    (
        "paper",
        "42 disks of one guest",
        "One client memory, 42 sockets, depth 32 each, half reads and half writes, on one \
        reactor core. RAM disks: 4.1 GiB in all, written before, used all over. *memcpy* copies pieces of that size between \
        as much memory of the same kind and as many buffers, half in each direction, on the same core, and does nothing else.",
    ),
    (
        "peers",
        "qemu-storage-daemon",
        "The same client for both, the `virtio-driver` crate (libblkio's core): 4 KiB random \
        reads.",
    ),
    (
        "uring",
        "Files and block devices",
        "4 KiB random reads through io_uring beside fio on the bare medium, with fixed \
        buffers and registered files. tmpfs and zram are memory: io_uring does them in worker threads, of which fio's \
        share its one core, and ringmilld reads them in place, so that pinning changes nothing; with `transfers = ring` it \
        uses those workers, too, off the reactor's core, which here is the client's and busy.",
    ),
    (
        "idle",
        "Idle disks",
        "A busy null disk alone, and while 1,000 others are connected with running rings and no \
        requests.",
    ),
    (
        "fairness",
        "Fairness",
        "One 4 KiB request at a time, alone and beside another disk's 1 MiB requests at depth 1024, on \
        one reactor; one client drives both.",
    ),
    (
        "cross",
        "Crossing to another core",
        "A null bdev driven directly, without a guest: through its own channel on the client's core, and through the rings \
        to a reactor on the other core that owns its only queue.",
    ),
    (
        "nvme",
        "The NVMe driver",
        "4 KiB random reads through the driver on a controller in software (`nvme-model`, null medium) that runs on the \
        other core and is reached over vfio-user: doorbells and queues are shared memory. Beside it the same generator on a \
        null bdev, which is what the generator costs, and a bare loop on the model, which is what the model can do. Cycles \
        are of the client's core, generator included.",
    ),
    (
        "quiet",
        "System calls",
        "System calls of the reactor's thread within a second under load, as strace counts them; a lock \
        that waits or wakes would be among them (futex). That nothing is allocated is proved by tests with a counting \
        allocator: `drivers/tests/no_alloc.rs`, `vmm-glue/tests/worker_alloc.rs`.",
    ),
    (
        "figures",
        "Counters and histograms",
        "A null disk, 4 KiB random reads, with everything recorded as it is by default, and with nothing recorded. The \
        instructions that recording takes are among the cases of `benches/instructions.toml`.",
    ),
];

/// Writes the page and its plots.
pub(crate) fn render(results: &Results, docs: &Path) -> anyhow::Result<()> {
    let plots = docs.join("performance");
    fs::create_dir_all(&plots).with_context(|| format!("cannot make {}", plots.display()))?;
    let mut page = INTRO.to_owned();
    page.push_str("## The machine\n\n| | |\n|---|---|\n");
    for (name, value) in &results.machine {
        line(&mut page, &format!("| {name} | {value} |"));
    }
    page.push_str("\n## Targets\n\n| Case | Wanted | Measured | |\n|---|---|---|---|\n");
    for verdict in verdicts(results) {
        let met = verdict.met.map_or("", |met| if met { "met" } else { "**missed**" });
        let (case, wanted, measured) = (verdict.case, verdict.wanted, verdict.measured);
        line(&mut page, &format!("| {case} | {wanted} | {measured} | {met} |"));
    }
    for (name, heading, text) in TEXTS {
        let Some(section) = results.section(name) else { continue };
        line(&mut page, &format!("\n## {heading}\n\n{text}\n"));
        for (file, svg) in charts(name, section).map_err(|error| anyhow!(error))? {
            let path = plots.join(&file);
            fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
            line(&mut page, &format!("![{heading}](performance/{file})\n"));
        }
        tables(&mut page, name, section);
        let Section { taken, rounds, seconds, .. } = section;
        line(&mut page, &format!("{taken}; {rounds} rounds of {seconds} s."));
        for note in &section.notes {
            line(&mut page, &format!("- {}", note.replace('\n', " ")));
        }
        if !section.commands.is_empty() {
            line(&mut page, &format!("\n```sh\n{}\n```", section.commands.join("\n")));
        }
    }
    let path = docs.join("PERFORMANCE.md");
    fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))
}

fn line(page: &mut String, text: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(page, "{text}");
}

/// `9.87 M`, `432 k`.
fn count(value: f64) -> String {
    match value {
        v if !v.is_finite() => "-".to_owned(),
        v if v >= 9.995e6 => format!("{:.1} M", v / 1e6),
        v if v >= 999_500.0 => format!("{:.2} M", v / 1e6),
        v if v >= 1e4 => format!("{:.0} k", v / 1e3),
        v if v >= 1e3 => format!("{:.1} k", v / 1e3),
        v => format!("{v:.0}"),
    }
}

fn time(ns: f64) -> String {
    if ns > 0.0 { ringmill_tools::hist::duration_text(ns) } else { "-".to_owned() }
}

fn table(page: &mut String, head: &[&str], rows: &[Vec<String>]) {
    line(page, &format!("| {} |", head.join(" | ")));
    line(page, &format!("|{}", "---|".repeat(head.len())));
    for row in rows {
        line(page, &format!("| {} |", row.join(" | ")));
    }
    page.push('\n');
}

fn place_text(section: &str, x: u64) -> String {
    match section {
        "size" | "paper" if x >= 1024 => format!("{} KiB", x / 1024),
        "size" | "paper" => format!("{x} B"),
        _ => x.to_string(),
    }
}

fn place_name(section: &str) -> &'static str {
    match section {
        "size" | "paper" => "size",
        "disks" => "disks",
        _ => "depth",
    }
}

fn spread(row: &Row) -> String {
    let (low, high) = row.range(|f| f.iops);
    format!("{} ({}…{})", count(row.median(|f| f.iops)), count(low), count(high))
}

/// IOPS by place and series, then latencies.
fn tables(page: &mut String, name: &str, section: &Section) {
    if name == "quiet" {
        let rows = section.rows.iter().map(|row| {
            let calls = format!("{:.0}", row.median(|f| f.other));
            let requests = format!("{:.2} M", row.median(|f| f.iops) / 1e6);
            vec![row.series.clone(), row.x.to_string(), calls, requests]
        });
        let head = ["medium", "depth", "system calls", "requests meanwhile"];
        return table(page, &head, &rows.collect::<Vec<_>>());
    }
    let measured: Vec<&Row> =
        section.rows.iter().filter(|row| row.median(|f| f.iops) > 0.0).collect();
    let series: Vec<&str> = section
        .series()
        .into_iter()
        .filter(|series| measured.iter().any(|row| row.series == *series))
        .collect();
    if series.len() <= 4 {
        let mut head = vec![place_name(name)];
        head.extend(&series);
        let places =
            section.places().into_iter().filter(|x| measured.iter().any(|row| row.x == *x));
        let rows = places.map(|x| {
            let mut cells = vec![place_text(name, x)];
            cells.extend(
                series.iter().map(|series| section.row(series, x).map_or("-".into(), spread)),
            );
            cells
        });
        page.push_str("IOPS, median (lowest…highest):\n\n");
        table(page, &head, &rows.collect::<Vec<_>>());
    }
    let head = ["", place_name(name), "IOPS", "mean", "p50", "p99", "p99.9", "cycles/request"];
    let mixed = measured.iter().any(|row| row.median(|f| f.write_mean_ns) > 0.0);
    let mut head = head.to_vec();
    if mixed {
        head[3] = "mean read";
        head.insert(4, "mean write");
    }
    let rows = measured.iter().map(|row| {
        let part = |part: fn(&Figure) -> f64| time(row.median(part));
        let mut cells = vec![
            row.series.clone(),
            place_text(name, row.x),
            count(row.median(|f| f.iops)),
            part(|f| f.mean_ns),
            part(|f| f.p50_ns),
            part(|f| f.p99_ns),
            part(|f| f.p999_ns),
        ];
        if mixed {
            cells.insert(4, part(|f| f.write_mean_ns));
        }
        let cycles = row.median(|f| f.cycles);
        cells.push(if cycles > 0.0 { format!("{cycles:.0}") } else { "-".into() });
        cells
    });
    table(page, &head, &rows.collect::<Vec<_>>());
    if name == "fairness" {
        for row in section.rows.iter().filter(|row| row.median(|f| f.other) > 0.0) {
            let gib = row.median(|f| f.other) / f64::from(1 << 30);
            line(
                page,
                &format!("{}: the large requests move {gib:.2} GiB/s meanwhile.\n", row.series),
            );
        }
    }
    if name == "idle" {
        for row in section.rows.iter().filter(|row| row.series.starts_with("private")) {
            let kib = row.median(|f| f.other) / 1024.0;
            line(page, &format!("Private memory per idle disk, of {}: {kib:.1} KiB.\n", row.x));
        }
    }
}

/// The plots of a section: file name and contents.
fn charts(name: &str, section: &Section) -> Result<Vec<(String, String)>, String> {
    if !["depth", "size", "paper"].contains(&name) || section.places().len() < 2 {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    let x_text = |x: f64| {
        let whole = (x - x.round()).abs() < 1e-6;
        if whole { place_text(name, power_of_two(x)) } else { String::new() }
    };
    let lines_of = |part: fn(&Figure) -> f64, wanted: &dyn Fn(&str) -> bool| -> Vec<Line> {
        let series = section.series().into_iter().filter(|series| wanted(series));
        let lines = series.map(|series| {
            let points = section.places().into_iter().filter_map(|x| {
                let y = section.median(series, x, part).filter(|y| *y > 0.0)?;
                Some((log2(x), y.log10()))
            });
            Line { label: series.to_owned(), points: points.collect() }
        });
        lines.filter(|line| !line.points.is_empty()).collect()
    };
    let mut add = |file: String,
                   title: String,
                   what: &str,
                   lines: &[Line],
                   y_text: &dyn Fn(f64) -> String| {
        let points = || lines.iter().flat_map(|line| &line.points);
        let low = points().map(|p| p.1).fold(f64::INFINITY, f64::min).floor();
        let high = points().map(|p| p.1).fold(low + 1.0, f64::max).ceil();
        let left = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
        let right = points().map(|p| p.0).fold(left + 1.0, f64::max);
        let axes = Axes {
            title,
            descriptions: (place_name(name), what),
            ranges: (left..right, low..high),
            labels_count: (decades(right - left), decades(high - low)),
            texts: (&x_text, y_text),
        };
        figure(&axes, lines).map(|svg| files.push((file, svg)))
    };
    let iops = lines_of(|f| f.iops, &|_| true);
    let iops_text = |y: f64| count(10_f64.powf(y)).replace(".00", "").replace(".0", "");
    let title = format!("IOPS over {}", place_name(name));
    add(format!("{name}-iops.svg"), title, "requests per second", &iops, &iops_text)?;
    if name == "depth" {
        for form in ["split", "packed"] {
            let mut lines = Vec::new();
            for (label, part) in [
                ("p50", (|f| f.p50_ns) as fn(&Figure) -> f64),
                ("p99", |f| f.p99_ns),
                ("p99.9", |f| f.p999_ns),
            ] {
                let found = lines_of(part, &|series| series == form);
                lines.extend(found.into_iter().map(|l| Line { label: label.into(), ..l }));
            }
            if !lines.is_empty() {
                let title = format!("Latency over depth, {form} ring");
                let file = format!("{name}-latency-{form}.svg");
                add(file, title, "latency", &lines, &decade_text)?;
            }
        }
    }
    Ok(files)
}

#[expect(clippy::cast_precision_loss, reason = "depths and sizes")]
fn log2(x: u64) -> f64 {
    (x.max(1) as f64).log2()
}

fn power_of_two(exponent: f64) -> u64 {
    (0..40)
        .map(|bits| 1u64 << bits)
        .find(|value| (log2(*value) - exponent).abs() < 0.5)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let mut results = Results::default();
        results.machine.insert("processor".into(), "one".into());
        for (name, _, _) in TEXTS {
            let row = |series: &str, x, iops| Row {
                series: series.into(),
                x,
                rounds: vec![Figure { iops, p50_ns: 600.0, p99_ns: 900.0, ..Figure::default() }],
            };
            let rows = vec![row("split", 1, 1.5e6), row("split", 128, 1.25e7), row("peer", 1, 2e5)];
            let section = Section { taken: "then".into(), rows, ..Section::default() };
            results.sections.insert((*name).to_owned(), section);
        }
        results
    }

    #[test]
    fn a_page_has_every_section_and_its_plots_exist() {
        let dir = tempfile::tempdir().expect("a directory");
        render(&results(), dir.path()).expect("a page");
        let page = fs::read_to_string(dir.path().join("PERFORMANCE.md")).expect("the page");
        for (_, heading, _) in TEXTS {
            assert!(page.contains(&format!("## {heading}")), "{heading}");
        }
        assert!(page.contains("| 128 | 12.5 M (12.5 M…12.5 M) | - |"), "{page}");
        assert!(page.contains("| 12.50 M IOPS | met |"), "{page}");
        let plots = page.split("](performance/").skip(1).filter_map(|rest| rest.split(')').next());
        let plots: Vec<&str> = plots.collect();
        assert!(plots.len() >= 3);
        for plot in plots {
            let svg =
                fs::read_to_string(dir.path().join("performance").join(plot)).expect("a plot");
            assert!(svg.contains("<svg") && svg.contains("split"), "{plot}");
        }
    }

    #[test]
    fn every_section_that_is_measured_has_a_text() {
        let measured: Vec<&str> = crate::sections::SECTIONS.iter().map(|(name, _)| *name).collect();
        let told: Vec<&str> = TEXTS.iter().map(|(name, _, _)| *name).collect();
        assert_eq!(measured, told);
    }

    #[test]
    fn counts_have_three_digits() {
        let texts = [123.0, 1234.0, 45_600.0, 999_400.0, 1_234_000.0, 12_340_000.0].map(count);
        assert_eq!(texts, ["123", "1.2 k", "46 k", "999 k", "1.23 M", "12.3 M"]);
    }
}
