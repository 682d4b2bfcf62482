//! Curves as pictures: SVG, which needs no fonts and stays sharp.

use std::path::{Path, PathBuf};

use plotters::prelude::*;
use randlora::io::write_whole;

use super::Failure;

/// A line through points.
pub(crate) struct Curve {
    /// What the legend calls it.
    pub(crate) name: String,
    /// The points from left to right.
    pub(crate) points: Vec<(f64, f64)>,
}

/// What the horizontal axis shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axis {
    /// Numbers from 1.
    Count,
    /// Powers of ten: a point is at its exponent, and is drawn as one.
    Powers,
}

/// Each value's place, from 1, with the mean of it and those before it, `window` in all.
pub(crate) fn smooth(values: &[f64], window: usize) -> Vec<(f64, f64)> {
    let mean = |i: usize| {
        let last = &values[(i + 1).saturating_sub(window)..=i];
        last.iter().sum::<f64>() / last.len() as f64
    };
    (0..values.len()).map(|i| (i as f64 + 1.0, mean(i))).collect()
}

/// Draws curves into a file, which is its result.
pub(crate) fn draw(
    path: &Path,
    title: &str,
    (x_label, y_label): (&str, &str),
    axis: Axis,
    curves: &[Curve],
) -> Result<PathBuf, Failure> {
    let points = || curves.iter().flat_map(|c| &c.points);
    let (left, right) = match axis {
        Axis::Count => (1.0, points().map(|p| p.0).fold(2.0, f64::max)),
        Axis::Powers => points().fold((f64::MAX, f64::MIN), |(l, r), p| (l.min(p.0 - 0.1), r.max(p.0 + 0.1))),
    };
    // Marks lie between whole powers too: at 2.5e-3, not at 3e-3.
    let power = |x: &f64| format!("{:.1e}", 10f64.powf(*x));
    let (low, high) = points().map(|p| p.1).fold((f64::MAX, f64::MIN), |(l, h), y| (l.min(y), h.max(y)));
    let margin = (high - low).max(1e-6) * 0.05;
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (800, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(left..right, low - margin..high + margin)?;
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(WHITE).x_desc(x_label).y_desc(y_label);
        if axis == Axis::Powers {
            mesh.x_label_formatter(&power);
        }
        mesh.draw()?;
        for (i, curve) in curves.iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            chart
                .draw_series(LineSeries::new(curve.points.iter().copied(), color.stroke_width(2)))?
                .label(curve.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
            if axis == Axis::Powers {
                chart.draw_series(curve.points.iter().map(|&point| Circle::new(point, 3, color.filled())))?;
            }
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        root.present()?;
    }
    write_whole(path, |out| out.write_all(text.as_bytes()))?;
    Ok(path.to_path_buf())
}
