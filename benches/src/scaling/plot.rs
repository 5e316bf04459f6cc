//! The plot of `scaling`: rates over vCPUs, both by powers of two; what is projected as lines, what was measured as points.

use super::{Body, VCPUS};
use crate::report::Error;
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (900, 600);

/// Writes it as SVG.
pub(super) fn write(path: &Path, body: &Body) -> Result<(), Error> {
    let mut text = String::new();
    draw(&mut text, body).map_err(|e| Error::run("plot", e.to_string()))?;
    std::fs::write(path, text).map_err(|e| Error::io(path, e))
}

fn draw(text: &mut String, body: &Body) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let rates = || {
        body.curves
            .iter()
            .flat_map(|curve| curve.points.iter().map(|it| it.projected_rate / 1e6))
    };
    let most = rates().fold(1.0, f64::max) * 1.5;
    let least = rates().fold(most, f64::min) / 1.5;
    let last = VCPUS.last().copied().unwrap_or(1) as f64;
    let caption = format!(
        "Faults a second, projected at {} ns a cache-line transfer; points are measured",
        body.transfer_cost_ns
    );
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (1.0..last * 1.1).log_scale().base(2.0),
            (least..most).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("vCPUs (beyond 2: projected)")
        .y_desc("million faults a second")
        .draw()?;
    for (n, curve) in body.curves.iter().enumerate() {
        let color = Palette99::pick(n).to_rgba();
        let line = curve
            .points
            .iter()
            .map(|it| (it.vcpus as f64, it.projected_rate / 1e6));
        chart
            .draw_series(LineSeries::new(line, color.stroke_width(2)))?
            .label(format!("{}, projected", curve.contender))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        let points = [1.0, 2.0].into_iter().zip(curve.measured_rate);
        chart
            .draw_series(points.map(|(x, rate)| Circle::new((x, rate / 1e6), 4, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}
