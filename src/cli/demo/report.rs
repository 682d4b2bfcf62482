//! The demo's numbers as JSON and as a table.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use randlora::io::write_whole;
use serde_json::{Value, json};

use super::experiment::{ATLAS, Outcome};
use crate::cli::Failure;
use crate::cli::numbers::{mean, spread};

/// What came of a method, with everything that the table and the pictures are made from.
pub(super) fn outcome(name: &str, outcome: &Outcome, peak_bytes: Option<u64>) -> Value {
    let tried: Vec<Value> = outcome
        .tried
        .iter()
        .map(|(learning_rate, accuracy)| json!({ "learning_rate": learning_rate, "validation_accuracy": accuracy }))
        .collect();
    let runs: Vec<Value> = outcome
        .runs
        .iter()
        .map(|run| {
            json!({
                "losses": run.losses,
                "validation_accuracies": run.validation,
                "test_accuracy": run.test,
                "seconds": run.seconds,
            })
        })
        .collect();
    json!({
        "method": name,
        "trained_parameters": outcome.trained,
        "update_ranks": outcome.ranks.map(|(low, high)| [low, high]),
        "tried": tried,
        "learning_rate": outcome.learning_rate,
        "runs": runs,
        "peak_bytes": peak_bytes,
    })
}

/// Writes the numbers, whole or not at all.
pub(super) fn write(results: &Value, path: &Path) -> Result<PathBuf, Failure> {
    let text = serde_json::to_string_pretty(results)?;
    write_whole(path, |out| out.write_all(text.as_bytes()))?;
    Ok(path.to_path_buf())
}

/// The numbers of a field in all runs of a method.
pub(super) fn of_runs(method: &Value, field: &str) -> Vec<f64> {
    let runs = method["runs"].as_array().map(Vec::as_slice).unwrap_or_default();
    runs.iter().filter_map(|run| run[field].as_f64()).collect()
}

/// The table that the demo prints.
pub(super) fn table(results: &Value) -> Result<String, Failure> {
    let mut text = String::new();
    let base = &results["base"];
    let percent = |v: &Value| format!("{:.1} %", 100.0 * v.as_f64().unwrap_or(f64::NAN));
    writeln!(
        text,
        "A vision transformer of {} parameters, trained from scratch on upright digits: {} right.",
        base["parameters"],
        percent(&base["accuracy"])
    )?;
    writeln!(
        text,
        "On mirrored negatives of the same digits, before any adaptation: {}.\n",
        percent(&base["accuracy_on_new_task"])
    )?;
    writeln!(
        text,
        "{:<10} {:>9} {:>13} {:>8} {:>18} {:>9} {:>9}",
        "method", "trained", "update rank", "lr", "accuracy, 3 seeds", "seconds", "peak MiB"
    )?;
    for method in results["methods"].as_array().ok_or("no methods")? {
        let accuracies: Vec<f64> = of_runs(method, "test_accuracy").iter().map(|a| 100.0 * a).collect();
        let ranks = match method["update_ranks"].as_array().map(Vec::as_slice) {
            Some([low, high]) if low == high => format!("{low} of 48"),
            Some([low, high]) => format!("{low}–{high} of 48"),
            _ => "–".into(),
        };
        let peak =
            method["peak_bytes"].as_u64().map_or("–".into(), |b| format!("{:.1}", b as f64 / 1048576.0));
        writeln!(
            text,
            "{:<10} {:>9} {:>13} {:>8} {:>18} {:>9.2} {:>9}",
            method["method"].as_str().unwrap_or_default(),
            method["trained_parameters"],
            ranks,
            format!("{:e}", method["learning_rate"].as_f64().unwrap_or(f64::NAN)),
            format!("{:.1} ± {:.1} %", mean(&accuracies), spread(&accuracies)),
            mean(&of_runs(method, "seconds")),
            peak,
        )?;
    }
    writeln!(
        text,
        "\naccuracy on 360 test images that nothing was chosen by, mean ± standard deviation; seconds of one training on one thread;"
    )?;
    writeln!(
        text,
        "peak: resident memory of the method's own process; the classifier is trained by every method"
    )?;
    let methods = results["methods"].as_array().map(Vec::as_slice).unwrap_or_default();
    if methods.iter().any(|method| method["method"] == ATLAS) {
        writeln!(
            text,
            "{ATLAS}: sums of two models that were fine-tuned on mirrored digits and on negatives; its seconds are without theirs, its peak is with them"
        )?;
    }
    writeln!(text, "{:.0} s in all", results["seconds"].as_f64().unwrap_or(f64::NAN))?;
    Ok(text)
}
