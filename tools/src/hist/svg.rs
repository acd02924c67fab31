//! Percentile curves as SVG, as HdrHistogram's plotter draws them: the further right, the rarer.
//!
//! The x axis is logarithmic in 1/(1−percentile), so that each further nine takes the same room; the y axis is the
//! latency, logarithmic too, because stages differ by orders of magnitude. One chart per controller, queue and
//! operation; one line per stage. Coordinates are decadic logarithms; only the labels undo them.

use std::ops::Range;

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

/// A line of a chart, in its coordinates.
#[derive(Debug, Clone)]
pub struct Line {
    /// Its name in the legend.
    pub label: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// What surrounds the lines. Coordinates are what the caller likes, logarithms mostly; the texts undo them.
pub struct Axes<'a> {
    /// Above the chart.
    pub title: String,
    /// Beside the axes.
    pub descriptions: (&'a str, &'a str),
    /// Where they end.
    pub ranges: (Range<f64>, Range<f64>),
    /// Labels on each, at most.
    pub labels_count: (usize, usize),
    /// A label's text; empty: none there.
    pub texts: (&'a dyn Fn(f64) -> String, &'a dyn Fn(f64) -> String),
}

/// One chart as a file.
///
/// # Errors
/// What the drawing library says.
pub fn figure(axes: &Axes<'_>, lines: &[Line]) -> Result<String, String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, CHART_SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(|error| error.to_string())?;
        draw(&root, axes, lines)?;
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(text)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(area: &Area<'_>, axes: &Axes<'_>, lines: &[Line]) -> Result<(), String> {
    let failed = |error: plotters::drawing::DrawingAreaErrorKind<std::io::Error>| error.to_string();
    let mut chart = ChartBuilder::on(area)
        .caption(&axes.title, (FONT, 20))
        .margin(12)
        .margin_right(40)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(axes.ranges.0.clone(), axes.ranges.1.clone())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_labels(axes.labels_count.0)
        .y_labels(axes.labels_count.1)
        .x_label_formatter(&|x| (axes.texts.0)(*x))
        .y_label_formatter(&|y| (axes.texts.1)(*y))
        .x_desc(axes.descriptions.0)
        .y_desc(axes.descriptions.1)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let style = ShapeStyle::from(colour).stroke_width(2);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))
            .map_err(failed)?
            .label(&line.label)
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

fn chart(area: &Area<'_>, group: &[&Row]) -> Result<(), String> {
    let line = |row: &&Row| Line {
        label: format!("{} ({} requests)", row.stage, row.histogram.len()),
        points: curve(row),
    };
    let lines: Vec<Line> = group.iter().map(line).collect();
    let points = || lines.iter().flat_map(|line| &line.points);
    let rarest = points().map(|point| point.0).fold(1.0, f64::max).ceil();
    let lowest = points().map(|point| point.1).fold(f64::INFINITY, f64::min).floor();
    let highest = points().map(|point| point.1).fold(lowest + 1.0, f64::max).ceil();
    let axes = Axes {
        title: title(group),
        descriptions: ("percentile", "latency"),
        ranges: (0.0..rarest, lowest..highest),
        labels_count: (decades(rarest), decades(highest - lowest)),
        texts: (&percentile_text, &decade_text),
    };
    draw(area, &axes, &lines)
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

/// Labels for whole numbers in a range of this length.
#[must_use]
pub fn decades(span: f64) -> usize {
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

/// A time from its decadic logarithm in ns.
#[must_use]
pub fn decade_text(logarithm: f64) -> String {
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
