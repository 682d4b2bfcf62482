//! `randlora eval`: how well a model does on a file.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::Failure;
use super::columns::ColumnArgs;
use super::device::DeviceArgs;
use super::model::{Classifier, InUse, ModelArgs, save_logits};
use super::output::say;
use super::several::MixArgs;
use super::table::{self, Example, Labels};
use super::task::Scores;

/// Evaluate a fine-tuned model on a file of examples.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora eval --model all-MiniLM-L6-v2 --adapter sst2/best --data validation.tsv
  randlora eval --model sst2-full/best --data validation.tsv --json
  randlora eval --model all-MiniLM-L6-v2 --adapter sst2/best --data unlabelled.tsv --logits logits.safetensors
  randlora eval --model all-MiniLM-L6-v2 --adapter a=seed1/best --adapter b=seed2/best --data validation.tsv
  randlora eval --model all-MiniLM-L6-v2 --adapter a=seed1/best --adapter b=seed2/best --weights 0.5,0.5 --head sum \
    --data validation.tsv

Several adapters are evaluated one after the other on one base, or with `--weights` as one weighted sum.")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    mix: MixArgs,
    /// The examples: TSV, CSV or JSONL. With `--logits` they need no labels.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Write all logits to this file, as a tensor `logits` (examples, outputs).
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    /// Print one JSON object, for each of several adapters.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    args.model.with_threads(|| evaluate(args))?.map_err(Failure::from)
}

fn evaluate(args: &Args) -> randlora::Result<()> {
    let device = args.device.open(&args.model.precision)?;
    let mut classifier = Classifier::open(&args.model, &args.mix, &device)?;
    if args.logits.is_some() && classifier.count() > 1 {
        let message = "the file holds those of one adapter: name one, or sum them with `--weights`".into();
        return Err(randlora::Error::Config { what: "--logits", message });
    }
    let wanted = if args.logits.is_some() { Labels::IfThere } else { Labels::Needed };
    let examples = table::read(&args.data, &args.columns.columns(), wanted)?;
    (0..classifier.count()).try_for_each(|place| evaluate_one(args, &classifier.turn_to(place)?, &examples))
}

fn evaluate_one(args: &Args, classifier: &InUse<'_>, examples: &[Example]) -> randlora::Result<()> {
    let labelled = examples.iter().all(|example| example.label.is_some());
    let answers = if labelled { Some(classifier.about.task.answers(&args.data, examples)?) } else { None };
    let texts = classifier.encoder.examples(&args.data, examples)?;
    let (logits, outputs) = (classifier.logits(&texts)?, classifier.about.task.outputs());
    let scores = match answers {
        Some(answers) => answers.scores(&logits, outputs)?,
        None => vec![],
    };
    if let Some(path) = &args.logits {
        save_logits(path, logits, outputs)?;
    }
    let name = classifier.name.map(|name| ("adapter", json!(name)));
    let before: Vec<(&str, Value)> = name.into_iter().chain([("examples", json!(examples.len()))]).collect();
    match args.json {
        true => say(json!(object(&scores, &before))),
        false => {
            let name = classifier.name.map_or(String::new(), |name| format!("{name}: "));
            say(format_args!("{name}{} examples{}", examples.len(), line(&scores)))
        }
    }
}

/// Scores as the fields of an object, after these.
pub(crate) fn object(scores: &Scores, before: &[(&str, Value)]) -> Map<String, Value> {
    let before = before.iter().map(|(name, value)| (name.to_string(), value.clone()));
    before.chain(scores.iter().map(|(name, value)| (name.to_string(), json!(value)))).collect()
}

/// Scores in one line of text.
pub(crate) fn line(scores: &Scores) -> String {
    let one = |(name, value): &(&str, Option<f64>)| match value {
        Some(value) => format!(", {} {value:.4}", name.replace('_', " ")),
        None => format!(", {} undefined", name.replace('_', " ")),
    };
    scores.iter().map(one).collect()
}
