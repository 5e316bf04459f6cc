//! A drawing of figures: a row for each, with a dot for each round and a bar from the lower to the upper quartile.

use super::Figure;
use crate::report::Error;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

const WIDTH: u32 = 980;
const LABELS: i32 = 330;
const ROW: u32 = 18;
const SPREAD: RGBColor = RGBColor(120, 160, 210);
const ROUND: RGBColor = RGBColor(20, 60, 120);

/// Draws `figures`, which have one unit, as the text of an `svg` element of HTML. Ratios have a line where nothing differs.
///
/// # Errors
///
/// If they cannot be drawn.
pub(super) fn draw(figures: &[&Figure], unit: &str) -> Result<String, Error> {
    let values = || {
        figures
            .iter()
            .flat_map(|figure| figure.values.iter().copied())
    };
    let even = unit.starts_with("ratio").then_some(1.0);
    let low = values().chain(even).fold(f64::INFINITY, f64::min);
    let high = values().chain(even).fold(f64::NEG_INFINITY, f64::max);
    let mut text = String::new();
    if low > 0.0 {
        // What is a hundred times as much must not press all others against the edge.
        let range = (low / 1.3..high * 1.3).log_scale();
        rows(&mut text, figures, unit, even, range, low / 1.3)?;
    } else {
        let edge = ((high - low) / 20.0).max(f64::MIN_POSITIVE);
        rows(
            &mut text,
            figures,
            unit,
            even,
            low - edge..high + edge,
            low - edge,
        )?;
    }
    // HTML knows what an svg element is, and the file is to name no address.
    Ok(text.replace(" xmlns=\"http://www.w3.org/2000/svg\"", ""))
}

fn rows<X>(
    text: &mut String,
    figures: &[&Figure],
    unit: &str,
    even: Option<f64>,
    range: X,
    left: f64,
) -> Result<(), Error>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let failed = |e: DrawingAreaErrorKind<std::io::Error>| Error::run("plot", e.to_string());
    let count = figures.len() as f64;
    let height = ROW * figures.len() as u32 + 50;
    let area = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    let down: Range<f64> = count - 0.5..-0.5;
    let mut chart = ChartBuilder::on(&area)
        .set_label_area_size(LabelAreaPosition::Left, LABELS)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .margin_right(20)
        .build_cartesian_2d(range, down)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .light_line_style(WHITE)
        .x_desc(unit)
        .axis_desc_style(("sans-serif", 13))
        .label_style(("sans-serif", 12))
        .x_label_formatter(&|value| short(*value))
        .draw()
        .map_err(failed)?;
    if let Some(even) = even {
        let line = [(even, -0.5), (even, count - 0.5)];
        chart
            .draw_series(std::iter::once(PathElement::new(line, RED)))
            .map_err(failed)?;
    }
    let name = ("sans-serif", 12)
        .into_font()
        .color(&BLACK)
        .pos(Pos::new(HPos::Right, VPos::Center));
    for (row, figure) in figures.iter().enumerate() {
        let at = row as f64;
        let spread = [(figure.spread.lower, at), (figure.spread.upper, at)];
        let label =
            EmptyElement::at((left, at)) + Text::new(figure.name.clone(), (-8, 0), name.clone());
        chart.draw_series(std::iter::once(label)).map_err(failed)?;
        chart
            .draw_series(std::iter::once(PathElement::new(
                spread,
                SPREAD.stroke_width(8),
            )))
            .map_err(failed)?;
        let rounds = figure.values.iter().map(|value| (*value, at));
        chart
            .draw_series(rounds.map(|point| Circle::new(point, 2, ROUND.filled())))
            .map_err(failed)?;
    }
    area.present().map_err(failed)
}

/// A number in as few digits as tell it.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e9 => format!("{:.2}G", value / 1e9),
        size if size >= 1e6 => format!("{:.2}M", value / 1e6),
        size if size >= 1e4 => format!("{:.1}k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        size if size >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}
