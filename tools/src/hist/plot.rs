//! Latency distributions as text, 80 columns wide: time runs to the right on a logarithmic scale.
//!
//! One strip per stage. The height of a column is the logarithm of its number of requests, so that one slow request
//! in a million is still a visible dot: tails are what one looks for here. Below each strip stand the percentiles.

use super::{Row, as_f64, duration_text, groups, table::title};

const WIDTH: usize = 80;
const LABEL_WIDTH: usize = 10;
const COLUMNS: usize = WIDTH - LABEL_WIDTH;
/// Lines per strip; each line has eight levels.
const STRIP_LINES: usize = 3;
const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const MARKS: [(&str, f64); 4] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];

/// The plots of all rows; empty when there are none.
pub fn render(rows: &[Row]) -> String {
    let mut text = String::new();
    for group in groups(rows) {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&title(&group));
        text.push_str(" · height: log of requests\n");
        let scale = Scale::of(&group);
        for row in &group {
            strip(&mut text, row, &scale);
        }
        scale.axis(&mut text);
    }
    text
}

/// Maps times to columns: whole decades, at least two.
struct Scale {
    decade_first: i32,
    decades_count: i32,
}

impl Scale {
    fn of(group: &[&Row]) -> Self {
        let low = group.iter().map(|row| row.histogram.min().max(1)).min().unwrap_or(1);
        let high = group.iter().map(|row| row.histogram.max().max(1)).max().unwrap_or(1);
        let decade = |value: u64| i32::try_from(value.max(1).ilog10()).unwrap_or(0);
        let decade_first = decade(low);
        Self { decade_first, decades_count: (decade(high) + 1 - decade_first).max(2) }
    }

    /// The column of a time, 0 to `COLUMNS - 1`.
    fn column(&self, ns: u64) -> usize {
        let position = (as_f64(ns.max(1)).log10() - f64::from(self.decade_first))
            / f64::from(self.decades_count);
        let last = COLUMNS - 1;
        // Binary search instead of a float-to-integer cast.
        (0..=last).rev().find(|column| column_start(*column) <= position).unwrap_or(0)
    }

    fn axis(&self, text: &mut String) {
        let mut line = vec!['─'; COLUMNS];
        let mut labels = vec![' '; COLUMNS];
        for decade in 0..=self.decades_count {
            let ns = 10_f64.powi(self.decade_first + decade);
            let column = (0..COLUMNS)
                .find(|column| {
                    column_start(*column) >= f64::from(decade) / f64::from(self.decades_count)
                })
                .unwrap_or(COLUMNS - 1);
            line[column] = if decade == 0 { '└' } else { '┴' };
            let label = axis_text(ns);
            let width = label.chars().count();
            for (cell, c) in labels.iter_mut().skip(column.min(COLUMNS - width)).zip(label.chars())
            {
                *cell = c;
            }
        }
        push_line(text, "", &line);
        push_line(text, "", &labels);
    }
}

fn column_start(column: usize) -> f64 {
    let column = u32::try_from(column).unwrap_or(u32::MAX);
    let columns = u32::try_from(COLUMNS).unwrap_or(1);
    f64::from(column) / f64::from(columns)
}

fn axis_text(ns: f64) -> String {
    duration_text(ns).replace(".00", "").replace(".0 ", " ")
}

fn strip(text: &mut String, row: &Row, scale: &Scale) {
    let mut counts = [0_u64; COLUMNS];
    for entry in row.histogram.iter_recorded() {
        counts[scale.column(entry.value_iterated_to())] += entry.count_since_last_iteration();
    }
    let highest = counts.iter().copied().max().unwrap_or(1);
    let steps = STRIP_LINES * (LEVELS.len() - 1);
    let heights = counts.map(|count| height(count, highest, steps));
    for line in (0..STRIP_LINES).rev() {
        let full = LEVELS.len() - 1;
        let glyphs: Vec<char> = heights
            .iter()
            .map(|height| LEVELS[height.saturating_sub(line * full).min(full)])
            .collect();
        let label = if line == 0 { row.stage.as_str() } else { "" };
        push_line(text, label, &glyphs);
    }
    let marks = MARKS.map(|(name, quantile)| {
        format!("{name} {}", duration_text(as_f64(row.histogram.value_at_quantile(quantile))))
    });
    push_line(text, "", &marks.join("   ").chars().collect::<Vec<char>>());
}

/// From 1 for a single request up to `steps` for the highest column; 0 for none.
fn height(count: u64, highest: u64, steps: usize) -> usize {
    if count == 0 {
        return 0;
    }
    let share = as_f64(count).ln_1p() / as_f64(highest).ln_1p();
    (1..=steps)
        .rev()
        .find(|step| {
            f64::from(u32::try_from(*step).unwrap_or(1))
                <= share * f64::from(u32::try_from(steps).unwrap_or(1))
        })
        .unwrap_or(1)
}

fn push_line(text: &mut String, label: &str, glyphs: &[char]) {
    let line: String = glyphs.iter().take(COLUMNS).collect();
    let label: String = label.chars().take(LABEL_WIDTH - 1).collect();
    text.push_str(format!("{label:LABEL_WIDTH$}{line}").trim_end());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::*;
    use crate::hist::{merge_queues, tests::samples};

    #[test]
    fn plots_fit_eighty_columns() {
        let text = render(&merge_queues(samples()));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        insta::assert_snapshot!(text);
        assert_eq!(render(&[]), "");
    }

    #[test]
    fn extreme_values_stay_inside() {
        for values in [vec![0], vec![1], vec![u64::MAX / 4], vec![1, u64::MAX / 4]] {
            let mut histogram = Histogram::new(3).unwrap();
            for value in values {
                histogram.record(value).unwrap();
            }
            let row = Row {
                controller: "c".to_owned(),
                queue: None,
                op: "write".to_owned(),
                stage: "total".to_owned(),
                histogram,
            };
            let text = render(&[row]);
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        }
    }
}
