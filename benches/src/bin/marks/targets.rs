//! What the project wants to reach, and whether these figures do.

use crate::results::{Figure, Results, Row, Section};

/// One line of the list.
pub(crate) struct Verdict {
    pub(crate) case: String,
    pub(crate) wanted: String,
    pub(crate) measured: String,
    /// `None`: not measured.
    pub(crate) met: Option<bool>,
}

/// Which way is better.
#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

fn verdict(case: &str, bound: Bound, value: Option<f64>, text: fn(f64) -> String) -> Verdict {
    let (wanted, met) = match bound {
        Bound::AtLeast(limit) => (format!("≥ {}", text(limit)), value.map(|v| v >= limit)),
        Bound::AtMost(limit) => (format!("≤ {}", text(limit)), value.map(|v| v <= limit)),
    };
    let measured = value.map_or_else(|| "not measured".to_owned(), text);
    Verdict { case: case.to_owned(), wanted, measured, met }
}

fn million(value: f64) -> String {
    format!("{:.2} M IOPS", value / 1e6)
}

fn times(value: f64) -> String {
    format!("{value:.2} ×")
}

fn us(value: f64) -> String {
    format!("{:.2} µs", value / 1e3)
}

fn cycles(value: f64) -> String {
    format!("{value:.0} cycles")
}

fn percent(value: f64) -> String {
    format!("{value:.1} %")
}

fn kib(value: f64) -> String {
    format!("{:.1} KiB", value / 1024.0)
}

fn calls(value: f64) -> String {
    format!("{value:.2}")
}

/// One series' median over another's, at the same place.
fn ratio(
    section: Option<&Section>,
    x: u64,
    ours: &str,
    theirs: &str,
    part: fn(&Figure) -> f64,
) -> Option<f64> {
    let section = section?;
    Some(section.median(ours, x, part)? / section.median(theirs, x, part)?)
}

fn lowest(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.flatten().reduce(f64::min)
}

/// The whole list.
pub(crate) fn verdicts(results: &Results) -> Vec<Verdict> {
    let mut list = Vec::new();
    let iops = |f: &Figure| f.iops;
    let at = |name: &str, series: &str, x: u64, part: fn(&Figure) -> f64| {
        results.section(name)?.median(series, x, part)
    };
    let mut add = |case: &str, bound, value, text| list.push(verdict(case, bound, value, text));
    use Bound::{AtLeast, AtMost};
    add(
        "null, 4 KiB random reads, depth 128: busy cycles per request",
        AtMost(220.0),
        at("depth", "split", 128, |f| f.cycles),
        cycles,
    );
    add("the same: IOPS", AtLeast(8e6), at("depth", "split", 128, iops), million);
    add("depth 32: IOPS", AtLeast(6e6), at("depth", "split", 32, iops), million);
    add("depth 1, split: p50", AtMost(750.0), at("depth", "split", 1, |f| f.p50_ns), us);
    add("depth 1, packed: p50", AtMost(650.0), at("depth", "packed", 1, |f| f.p50_ns), us);
    let peers = results.section("peers");
    add(
        "null, depth 32, against qemu-storage-daemon, the same virtio-driver client",
        AtLeast(8.0),
        ratio(peers, 32, "ringmilld, null", "qemu-storage-daemon, null", iops),
        times,
    );
    let sizes = [512, 1024, 2048, 4096, 8192];
    add(
        "42 disks, null medium, the slowest size",
        AtLeast(4e6),
        lowest(sizes.iter().map(|size| at("paper", "null", *size, iops))),
        million,
    );
    add(
        "42 RAM disks, the slowest size up to 2 KiB",
        AtLeast(1.6e6),
        lowest(sizes[..3].iter().map(|size| at("paper", "RAM disks", *size, iops))),
        million,
    );
    let paper = results.section("paper");
    for (size, text) in [(4096, "4 KiB"), (8192, "8 KiB")] {
        let value = ratio(paper, size, "RAM disks", "memcpy", iops);
        add(&format!("42 RAM disks, {text}, against bare memcpy"), AtLeast(0.8), value, times);
    }
    let idle = results.section("idle");
    for depth in [1, 32, 128] {
        let loss = ratio(idle, depth, "among idle disks", "alone", iops).map(|r| 100.0 * (1.0 - r));
        let case = format!("a busy disk at depth {depth} among 1,000 idle ones loses");
        add(&case, AtMost(5.0), loss, percent);
    }
    let private = idle.and_then(|section| {
        section
            .rows
            .iter()
            .find(|row| row.series.starts_with("private"))
            .map(|r| r.median(|f| f.other))
    });
    add("private memory per idle disk", AtMost(65536.0), private, kib);
    let uring = results.section("uring");
    for medium in ["tmpfs", "zram", "disk"] {
        let fio = format!("{medium}, fio");
        for (pin, limit) in [("on", 0.97), ("off", if medium == "disk" { 0.97 } else { 0.92 })] {
            let ours = format!("{medium}, pin = {pin}");
            let value = ratio(uring, 32, &ours, &fio, iops);
            let case = format!("uring on {medium}, depth 32, pin = {pin}, against bare fio");
            add(&case, AtLeast(limit), value, times);
            let p50 = |series: &str| uring?.median(series, 1, |f| f.p50_ns);
            let added = p50(&ours).and_then(|ours| Some(ours - p50(&fio)?));
            let case = format!("uring on {medium}, depth 1, pin = {pin}: added p50");
            add(&case, AtMost(2000.0), added, us);
        }
    }
    let fairness = results.section("fairness");
    for medium in ["null", "RAM disks", "RAM disk beside tmpfs"] {
        let p99 = |series: &str| fairness?.median(&format!("{medium}, {series}"), 1, |f| f.p99_ns);
        let value = p99("beside").and_then(|beside| Some(beside / p99("alone")?));
        let case =
            format!("4 KiB at depth 1 beside 1 MiB at depth 1024, {medium}: p99 against alone");
        add(&case, AtMost(5.0), value, times);
    }
    let quiet = results.section("quiet").map(|section| {
        let share = |row: &Row| row.median(|f| f.other) / row.median(|f| f.iops) * 1e6;
        section.rows.iter().map(share).fold(0.0, f64::max)
    });
    add("system calls of a busy reactor per million requests", AtMost(1.0), quiet, calls);
    let figures = results.section("figures");
    for depth in [1, 32, 128] {
        let loss = ratio(figures, depth, "recorded", "not recorded", iops);
        let case = format!("counters and histograms at depth {depth} cost, of IOPS");
        add(&case, AtMost(5.0), loss.map(|r| 100.0 * (1.0 - r)), percent);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_missed_or_not_measured() {
        let mut results = Results::default();
        let row = |x, iops| Row {
            series: "split".into(),
            x,
            rounds: vec![Figure { iops, cycles: 300.0, p50_ns: 700.0, ..Figure::default() }],
        };
        let section = Section { rows: vec![row(128, 9e6), row(32, 5e6)], ..Section::default() };
        results.sections.insert("depth".into(), section);
        let list = verdicts(&results);
        let met = |case: &str| list.iter().find(|v| v.case.contains(case)).map(|v| v.met);
        assert_eq!(met("busy cycles"), Some(Some(false)));
        assert_eq!(met("the same: IOPS"), Some(Some(true)));
        assert_eq!(met("depth 32: IOPS"), Some(Some(false)));
        assert_eq!(met("packed: p50"), Some(None));
        assert_eq!(met("memcpy"), Some(None));
    }
}
