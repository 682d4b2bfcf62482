//! The demo's curves.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cli::Failure;
use crate::cli::plot::{Axis, Curve, draw, smooth};

/// One curve per method: the mean over the runs of a list of numbers, element by element.
fn curves(results: &Value, field: &str, window: usize) -> Vec<Curve> {
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
        Curve { name: method["method"].as_str().unwrap_or_default().into(), points: smooth(&means, window) }
    };
    methods.iter().map(of).collect()
}

/// Loss over steps.
pub(super) fn losses(results: &Value, path: &Path) -> Result<PathBuf, Failure> {
    let curves = curves(results, "losses", 15);
    draw(
        path,
        "training loss (mean of 15 steps and 3 seeds)",
        ("step", "cross entropy"),
        Axis::Count,
        &curves,
    )
}

/// Accuracy over epochs.
pub(super) fn accuracies(results: &Value, path: &Path) -> Result<PathBuf, Failure> {
    let mut curves = curves(results, "validation_accuracies", 1);
    curves.iter_mut().flat_map(|c| &mut c.points).for_each(|p| p.1 *= 100.0);
    draw(
        path,
        "accuracy on the validation split (mean of 3 seeds)",
        ("epoch", "% right"),
        Axis::Count,
        &curves,
    )
}

/// A method's accuracy in % at each learning rate's power of ten, in rising order.
fn over_rates(method: &Value) -> Curve {
    let number = |tried: &Value, field: &str| tried[field].as_f64().unwrap_or(f64::NAN);
    let point = |tried: &Value| {
        (number(tried, "learning_rate").log10(), 100.0 * number(tried, "validation_accuracy"))
    };
    let mut points: Vec<_> = method["tried"].as_array().into_iter().flatten().map(point).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Curve { name: method["method"].as_str().unwrap_or_default().into(), points }
}

/// Accuracy over the learning rates that were tried.
pub(super) fn rates(results: &Value, path: &Path) -> Result<PathBuf, Failure> {
    let curves: Vec<Curve> = results["methods"].as_array().into_iter().flatten().map(over_rates).collect();
    draw(path, "accuracy on the validation split", ("learning rate", "% right"), Axis::Powers, &curves)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rates_rise_whatever_their_order() {
        let tried =
            |rate: f64, accuracy: f64| json!({ "learning_rate": rate, "validation_accuracy": accuracy });
        let method = json!({ "method": "lora", "tried": [tried(0.1, 0.25), tried(1e-3, 0.5)] });
        let curve = over_rates(&method);
        assert_eq!((curve.name.as_str(), &curve.points[..]), ("lora", &[(-3.0, 50.0), (-1.0, 25.0)][..]));
    }
}
