//! `randlora inspect`: what is in a model, a file of tensors or an adapter, and what a method would
//! cost.
//!
//! With `--json` the result is one object. Sizes are in bytes, norms are Frobenius norms.
//!
//! | of | fields |
//! |---|---|
//! | a model | `kind` ("model"), `family`, `architecture` (of a BERT: `layers`, `width`, `heads`, `hidden`, `vocab`, `positions`, `segments`, `labels`; else null), `parameters`, `bytes`, `dtypes` {dtype: bytes}, `tensors` [{`name`, `dtype`, `shape`, `bytes`}] |
//! | a file | `kind` ("safetensors"), `metadata`, `parameters`, `bytes`, `dtypes`, `tensors` |
//! | an adapter | `kind` ("adapter"), `method`, its settings (as `rank`, `scale`, `dropout`), `base_model`, of atlas `vectors` (how many task vectors it combines) and `given_parameters` (how many numbers these have), `trained_parameters` = `adapter_parameters` + `whole_parameters`, `layers` [{`name`, `parameters`, the norms of its parameters by their names, as `lambda` and `gamma` or `a` and `b`}], `whole` [{`name`, `shape`, `parameters`}], `bases` (null where the file holds none) {`a`, `b`: shapes, `bytes`}; with `--model` each layer's `inputs`, `outputs`, `delta` = ‖ΔW‖ and `relative` = ‖ΔW‖/‖W‖ (null where the update depends on the input); with `--spectrum` also `singular_values` of ΔW, largest first, `update_rank` = how many are above max(in, out)·2⁻²³ of the largest, and `effective_rank` = e^H, H the entropy of their shares |
//! | a plan | `kind` ("plan"), `method`, `rank` (null for methods without one), `labels`, `batch_size`, `length`, `parameters`, `trained_parameters`, `adapter_parameters`, `classifier_parameters`, `layers` [{`name`, `inputs`, `outputs`, `parameters`}], `frozen_bytes`, `bases_bytes`, `given_bytes` (atlas's task vectors), `trained_bytes`, `gradient_bytes`, `moment_bytes`, `training_peak_bytes` |
//!
//! A model or an adapter with a randlora.json beside it has its `task` and `labels` as `task` and
//! `label_names`.

mod adapter;
mod checkpoint;
mod plan;
mod spectrum;

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::method::{BasesName, MethodName};
use super::model::{PeftDraw, is_adapter};
use super::{Failure, output, targets, task_vectors};

/// Show what is in a model folder, a safetensors file or an adapter folder; with --method, what
/// training a model would take.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora inspect all-MiniLM-L6-v2
  randlora inspect all-MiniLM-L6-v2/model.safetensors --json
  randlora inspect sst2-adapter --model all-MiniLM-L6-v2
  randlora inspect sst2-adapter --model all-MiniLM-L6-v2 --spectrum --plot spectrum.svg
  randlora inspect all-MiniLM-L6-v2 --method randlora --rank 16 --labels 2 --batch-size 32 --length 64
  randlora inspect all-MiniLM-L6-v2 --method lora --targets '.*layer\\.[0-2]\\..*(query|value)'")]
pub(crate) struct Args {
    /// A model folder (config.json, model.safetensors), a safetensors file, or an adapter folder
    /// (adapter_config.json and adapter_model.safetensors, or compact.safetensors).
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The model that the adapter in PATH is for: shows how large its updates are.
    #[arg(long, value_name = "DIR", conflicts_with = "method")]
    model: Option<PathBuf>,
    /// The singular values of the adapter's updates: their ranks, and with --json all of them. Takes half a second
    /// for a layer of 384 × 384, and eight times that for twice the sides.
    #[arg(long, requires = "model")]
    spectrum: bool,
    /// Draw the singular values into this SVG file.
    #[arg(long, value_name = "FILE", requires = "model")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    draw: PeftDraw,
    /// Plan the training of the model in PATH by this method.
    #[arg(long)]
    method: Option<MethodName>,
    /// The rank: of one basis of RandLoRA, of the update of LoRA [default: 32 for randlora, 8 for lora].
    #[arg(long, value_name = "R", requires = "method", value_parser = clap::value_parser!(u32).range(1..))]
    rank: Option<u32>,
    /// The numbers that a layer trains by nola (twice as many), pranc and intrinsic [default: 64, 64, 256].
    #[arg(long, value_name = "K", requires = "method", value_parser = clap::value_parser!(u32).range(1..))]
    coefficients: Option<u32>,
    /// RandLoRA's random bases [default: uniform].
    #[arg(long, value_name = "NAME", value_enum, requires = "method")]
    bases: Option<BasesName>,
    #[arg(long, value_name = "DIR,…", value_delimiter = ',', requires = "method", help = task_vectors::HELP)]
    task_vectors: Vec<PathBuf>,
    #[arg(long, requires = "method", default_value = targets::DEFAULT, help = targets::HELP)]
    targets: String,
    /// The outputs of the classifier [default: those of the model's classifier, or 2].
    #[arg(long, value_name = "N", requires = "method", value_parser = clap::value_parser!(u32).range(1..))]
    labels: Option<u32>,
    /// Texts in a batch.
    #[arg(long, value_name = "N", requires = "method", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Tokens in each text [default: 128, or as many as the model reads].
    #[arg(long, value_name = "N", requires = "method", value_parser = clap::value_parser!(u32).range(1..))]
    length: Option<u32>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Shows what PATH is.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let path = &args.path;
    let is_adapter = is_adapter(path);
    let fail = |message: &str| Err::<(), Failure>(format!("{}: {message}", path.display()).into());
    if !path.exists() {
        return fail("there is no such file or folder");
    }
    if args.method.is_some() && is_adapter {
        return fail("this is an adapter: --method plans the training of a model folder");
    }
    if args.model.is_some() && !is_adapter {
        return fail("this is no adapter folder: --model goes with one, which has adapter_config.json");
    }
    let (value, text) = if let Some(method) = args.method {
        let value = plan::describe(args, method)?;
        let text = plan::text(&value);
        (value, text)
    } else if is_adapter {
        let value = with_labels(path, adapter::describe(args)?)?;
        if let Some(file) = &args.plot {
            spectrum::draw(&value, file)?;
        }
        let text = adapter::text(&value);
        (value, text)
    } else if path.is_dir() {
        if !path.join("config.json").is_file() {
            return fail(
                "neither a model (config.json) nor an adapter (adapter_config.json) is in this folder",
            );
        }
        let value = with_labels(path, checkpoint::model(path)?)?;
        let text = checkpoint::text(&value);
        (value, text)
    } else {
        let value = checkpoint::file(path)?;
        let text = checkpoint::text(&value);
        (value, text)
    };
    Ok(output::say(if args.json { value.to_string() } else { text.trim_end().to_string() })?)
}

/// Adds the task and the labels that randlora.json tells of, if there is one.
fn with_labels(folder: &Path, mut value: Value) -> Result<Value, Failure> {
    let path = folder.join("randlora.json");
    if !path.is_file() {
        return Ok(value);
    }
    let fail = |message: String| format!("{}: {message}", path.display());
    let text = std::fs::read_to_string(&path).map_err(|error| fail(error.to_string()))?;
    let about: Value =
        serde_json::from_str(&text).map_err(|error| fail(format!("no valid JSON: {error}")))?;
    for (field, name) in [("task", "task"), ("labels", "label_names")] {
        if let Some(found) = about.get(field) {
            value[name] = found.clone();
        }
    }
    Ok(value)
}

/// The lines of a text that name the task and the labels, if they are known.
fn labels_lines(value: &Value) -> Vec<Vec<String>> {
    let label = |label: &Value| label.as_str().map_or_else(|| label.to_string(), String::from);
    let task = value.get("task").map(|task| line("task", label(task)));
    let labels = value.get("label_names").and_then(Value::as_array);
    let labels = labels.map(|labels| line("labels", labels.iter().map(label).collect::<Vec<_>>().join(", ")));
    task.into_iter().chain(labels).collect()
}

/// A line of a table with a name and a value.
fn line(name: &str, value: impl Into<String>) -> Vec<String> {
    vec![name.into(), value.into()]
}

/// The head of a table, whose cells that begin with `>` are put to the right.
fn head(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| cell.to_string()).collect()
}

/// The objects of a list in a result.
fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

/// A number of a result.
fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or(0)
}

/// A text of a result.
fn string(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or("–").to_string()
}

/// A shape of a result, as in `384×384`.
fn shape(value: &Value, field: &str) -> String {
    let sizes: Vec<String> = list(value, field).iter().map(Value::to_string).collect();
    if sizes.is_empty() { "scalar".into() } else { sizes.join("×") }
}
