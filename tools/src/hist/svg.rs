//! Percentile curves as SVG, as HdrHistogram's plotter draws them: the further right, the rarer.
//!
//! The x axis is logarithmic in 1/(1−percentile), so that each further nine takes the same room; the y axis is the
//! latency, logarithmic too, because stages differ by orders of magnitude. One chart per controller, queue and
//! operation; one line per stage. Coordinates are decadic logarithms; only the labels undo them.

use plotters::{
    chart::{ChartBuilder, SeriesLabelPosition},
    drawing::{DrawingArea, IntoDrawingArea},
    element::PathElement,
    prelude::SVGBackend,
    series::LineSeries,
    style::{BLACK, Color, RGBColor, ShapeStyle, WHITE},
};

use super::{Row, as_f64, duration_text, groups, table::title};

const CHART_SIZE: (u32, u32) = (960, 480);
/// Most charts in one file; more would be a page nobody reads.
const CHARTS_MAX: usize = 16;
const FONT: &str = "sans-serif";
/// Told apart by people with any colour vision (Okabe and Ito's palette).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(40, 40, 40),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
];
const GRID: RGBColor = RGBColor(225, 225, 225);

/// The charts of all rows, one below the other.
pub fn render(rows: &[Row]) -> Result<String, String> {
    let mut groups = groups(rows);
    if groups.is_empty() {
        return Err("there are no requests yet".to_owned());
    }
    groups.truncate(CHARTS_MAX);
    let charts_count = u32::try_from(groups.len()).unwrap_or(1);
    let mut text = String::new();
    {
        let size = (CHART_SIZE.0, CHART_SIZE.1 * charts_count);
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE).map_err(|error| error.to_string())?;
        for (area, group) in root.split_evenly((groups.len(), 1)).iter().zip(&groups) {
            chart(area, group)?;
        }
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(text)
}

fn chart(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    group: &[&Row],
) -> Result<(), String> {
    let failed = |error: plotters::drawing::DrawingAreaErrorKind<std::io::Error>| error.to_string();
    let lines: Vec<Vec<(f64, f64)>> = group.iter().map(|row| curve(row)).collect();
    let points = || lines.iter().flatten();
    let rarest = points().map(|point| point.0).fold(1.0, f64::max).ceil();
    let lowest = points().map(|point| point.1).fold(f64::INFINITY, f64::min).floor();
    let highest = points().map(|point| point.1).fold(lowest + 1.0, f64::max).ceil();
    let mut chart = ChartBuilder::on(area)
        .caption(title(group), (FONT, 20))
        .margin(12)
        .margin_right(40)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..rarest, lowest..highest)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_labels(decades(rarest))
        .y_labels(decades(highest - lowest))
        .x_label_formatter(&|x| percentile_text(*x))
        .y_label_formatter(&|y| decade_text(*y))
        .x_desc("percentile")
        .y_desc("latency")
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for ((row, line), colour) in group.iter().zip(lines).zip(COLOURS.iter().cycle()) {
        let style = ShapeStyle::from(colour).stroke_width(2);
        chart
            .draw_series(LineSeries::new(line, style))
            .map_err(failed)?
            .label(format!("{} ({} requests)", row.stage, row.histogram.len()))
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .label_font((FONT, 14))
        .draw()
        .map_err(failed)
}

/// (nines, logarithm of ns) along a histogram.
fn curve(row: &Row) -> Vec<(f64, f64)> {
    let h = &row.histogram;
    // The rarest thing seen is one request among all.
    let rarest = as_f64(h.len().max(2)).log10();
    h.iter_quantiles(10)
        .map(|step| {
            let left = 1.0 - step.quantile_iterated_to();
            let nines = if left > 0.0 { (-left.log10()).min(rarest) } else { rarest };
            (nines, as_f64(step.value_iterated_to().max(1)).log10())
        })
        .collect()
}

fn decades(span: f64) -> usize {
    (1..=20_u32)
        .find(|count| f64::from(*count) > span)
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(20)
}

/// `0%`, `90%`, `99%`, `99.9%` … at whole decades.
fn percentile_text(nines: f64) -> String {
    if (nines - nines.round()).abs() > 1e-6 {
        return String::new();
    }
    let whole = (0..=18_usize)
        .find(|n| u32::try_from(*n).is_ok_and(|n| f64::from(n) > nines - 0.5))
        .unwrap_or(18);
    match whole {
        0 => "0%".to_owned(),
        1 => "90%".to_owned(),
        2 => "99%".to_owned(),
        more => format!("99.{}%", "9".repeat(more - 2)),
    }
}

fn decade_text(logarithm: f64) -> String {
    duration_text(10_f64.powf(logarithm)).replace(".00", "").replace(".0 ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hist::{merge_queues, tests::samples};

    #[test]
    fn a_chart_names_its_stages_percentiles_and_times() {
        let text = render(&merge_queues(samples())).unwrap();
        for word in [
            "<svg",
            "vm1 · read · all queues",
            "device (40000 requests)",
            "99.9%",
            "10 µs",
            "latency",
        ] {
            assert!(text.contains(word), "{word}");
        }
        assert!(render(&[]).is_err());
        if let Ok(path) = std::env::var("RINGMILL_SVG_SAMPLE") {
            std::fs::write(path, text).unwrap();
        }
    }
}
