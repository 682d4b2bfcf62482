//! The demo's curves as pictures: SVG, which needs no fonts and stays sharp.

use std::path::{Path, PathBuf};

use plotters::prelude::*;
use serde_json::Value;

use super::report::whole;
use crate::cli::Failure;

/// One curve per method: the mean over its runs.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The mean over the runs of a list of numbers, element by element.
fn curves(results: &Value, field: &str, smooth: usize) -> Vec<Curve> {
    let methods = results["methods"].as_array().map(Vec::as_slice).unwrap_or_default();
    let numbers = |list: &Value| -> Vec<f64> {
        list.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
    };
    let of = |method: &Value| {
        let runs: Vec<Vec<f64>> =
            method["runs"].as_array().into_iter().flatten().map(|run| numbers(&run[field])).collect();
        let steps = runs.iter().map(Vec::len).min().unwrap_or(0);
        let mean = |i: usize| runs.iter().map(|run| run[i]).sum::<f64>() / runs.len() as f64;
        let means: Vec<f64> = (0..steps).map(mean).collect();
        let window = |i: usize| &means[i.saturating_sub(smooth - 1)..=i];
        let points =
            (0..steps).map(|i| (i as f64 + 1.0, window(i).iter().sum::<f64>() / window(i).len() as f64));
        Curve { name: method["method"].as_str().unwrap_or_default().into(), points: points.collect() }
    };
    methods.iter().map(of).collect()
}

/// Loss over steps.
pub(super) fn losses(results: &Value, path: &Path) -> Result<PathBuf, Failure> {
    let curves = curves(results, "losses", 15);
    draw(path, "training loss (mean of 15 steps and 3 seeds)", ("step", "cross entropy"), &curves)
}

/// Accuracy over epochs.
pub(super) fn accuracies(results: &Value, path: &Path) -> Result<PathBuf, Failure> {
    let mut curves = curves(results, "validation_accuracies", 1);
    curves.iter_mut().flat_map(|c| &mut c.points).for_each(|p| p.1 *= 100.0);
    draw(path, "accuracy on the validation split (mean of 3 seeds)", ("epoch", "% right"), &curves)
}

fn draw(
    path: &Path,
    title: &str,
    (x_label, y_label): (&str, &str),
    curves: &[Curve],
) -> Result<PathBuf, Failure> {
    let points = || curves.iter().flat_map(|c| &c.points);
    let right = points().map(|p| p.0).fold(2.0, f64::max);
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
            .build_cartesian_2d(1.0..right, low - margin..high + margin)?;
        chart.configure_mesh().light_line_style(WHITE).x_desc(x_label).y_desc(y_label).draw()?;
        for (i, curve) in curves.iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            chart
                .draw_series(LineSeries::new(curve.points.iter().copied(), color.stroke_width(2)))?
                .label(curve.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        root.present()?;
    }
    whole(path, text.as_bytes())
}
