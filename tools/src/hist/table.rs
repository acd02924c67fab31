//! Percentile tables, 80 columns wide: one per controller, queue and operation, one line per stage.

use comfy_table::{CellAlignment, Table, presets};

use super::{Row, as_f64, duration_text, groups};

const QUANTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("p99.99", 0.9999)];

/// The tables of all rows, or a sentence when there are none.
pub fn render(rows: &[Row]) -> String {
    let groups = groups(rows);
    if groups.is_empty() {
        return "no requests yet\n".to_owned();
    }
    let mut text = String::new();
    for group in groups {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&title(&group));
        text.push('\n');
        text.push_str(&render_group(&group));
        text.push('\n');
    }
    text
}

/// `vm1 · read · queue 0`
pub(super) fn title(group: &[&Row]) -> String {
    group.first().map_or_else(String::new, |row| {
        format!("{} · {} · {}", row.controller, row.op, row.queue_name())
    })
}

fn render_group(group: &[&Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let mut header = vec!["stage", "count", "mean"];
    header.extend(QUANTILES.map(|(name, _)| name));
    header.push("max");
    table.set_header(header);
    for row in group {
        let h = &row.histogram;
        let mut cells = vec![row.stage.clone(), count_text(h.len()), duration_text(h.mean())];
        cells.extend(QUANTILES.map(|(_, q)| duration_text(as_f64(h.value_at_quantile(q)))));
        cells.push(duration_text(as_f64(h.max())));
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
        column.set_padding((1, 0));
    }
    if let Some(column) = table.column_mut(0) {
        column.set_padding((1, 0));
    }
    table.trim_fmt()
}

/// A count in at most seven characters.
fn count_text(count: u64) -> String {
    match count {
        0..=999_999 => count.to_string(),
        1_000_000..=999_999_999 => format!("{:.2} M", as_f64(count) / 1e6),
        _ => format!("{:.2} G", as_f64(count) / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hist::{merge_queues, tests::samples};

    #[test]
    fn tables_fit_eighty_columns() {
        let text = render(&merge_queues(samples()));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        insta::assert_snapshot!(text);
        assert_eq!(render(&[]), "no requests yet\n");
    }
}
