//! `randlora predict`: what a model says of texts.

use std::io::{self, BufRead, IsTerminal};
use std::path::Path;

use randlora::Result;
use serde_json::{Value, json};

use super::Failure;
use super::device::DeviceArgs;
use super::model::{Classifier, InUse, ModelArgs};
use super::output::say;
use super::several::MixArgs;
use super::table::wrong_at;
use super::task::{Task, largest};

/// Say what a fine-tuned model makes of texts, a line for each.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora predict --model all-MiniLM-L6-v2 --adapter sst2/best 'a gripping film' 'two lost hours'
  randlora predict --model all-MiniLM-L6-v2 --adapter sst2/best --json < texts.txt
  randlora predict --model all-MiniLM-L6-v2 --adapter stsb/best --pair 'A man sings.' 'Someone sings.'
  randlora predict --model all-MiniLM-L6-v2 --adapter mood=sst2/best --adapter topic=news/best --json < texts.txt
  echo '{\"adapter\": \"mood\", \"text\": \"a gripping film\"}' |
    randlora predict --model all-MiniLM-L6-v2 --adapter mood=sst2/best --adapter topic=news/best --jsonl --json

Of several adapters each has a line for each text, which begins with its name; with `--weights` they are one
weighted sum.")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    mix: MixArgs,
    /// The texts; without any, the lines of standard input.
    texts: Vec<String>,
    /// Texts come in pairs: two arguments, or two parts of a line with a tab between them.
    #[arg(long)]
    pair: bool,
    /// The lines of standard input are JSON objects: a `text`, a second one as `pair`, and as `adapter` the name of
    /// the one that is asked, of several; without it each has its answer.
    #[arg(long, conflicts_with_all = ["texts", "pair"])]
    jsonl: bool,
    /// Print a JSON object for each text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> std::result::Result<(), Failure> {
    if args.pair && args.texts.len() % 2 == 1 {
        let message = format!("{} texts make no pairs: give an even number\n", args.texts.len());
        clap::Error::raw(clap::error::ErrorKind::WrongNumberOfValues, message).exit();
    }
    args.model.with_threads(|| predict(args))?.map_err(Failure::from)
}

/// Lines of standard input that are worked on together: enough to compute well, few enough that the
/// first results come before the last line.
const LINES: usize = 64;

/// One text or a pair, and whom it is for.
struct Asked {
    texts: Vec<String>,
    /// The place of the adapter among those there are; None for every one.
    of: Option<usize>,
}

fn predict(args: &Args) -> Result<()> {
    let device = args.device.open(&args.model.precision)?;
    let mut classifier = Classifier::open(&args.model, &args.mix, &device)?;
    if !args.texts.is_empty() {
        let texts = args.texts.chunks(1 + args.pair as usize);
        let asked: Vec<Asked> = texts.map(|texts| Asked { texts: texts.to_vec(), of: None }).collect();
        return answers(args, &mut classifier, &asked);
    }
    if io::stdin().is_terminal() {
        eprintln!("reading texts from standard input, one a line");
    }
    let mut lines = io::stdin().lock().lines();
    let mut first = 1;
    loop {
        let path = Path::new("standard input");
        let mut asked = Vec::with_capacity(LINES);
        for line in lines.by_ref().take(LINES) {
            let line = line.map_err(|error| match error.kind() {
                io::ErrorKind::InvalidData => "this is not UTF-8: convert the text".into(),
                _ => error.to_string(),
            });
            let one = line.and_then(|line| read(args, &classifier, line));
            asked.push(one.map_err(|message| wrong_at(path, first + asked.len(), message))?);
        }
        if asked.is_empty() {
            return Ok(());
        }
        answers(args, &mut classifier, &asked)?;
        first += asked.len();
    }
}

/// What a line of standard input asks, or what is wrong with it.
fn read(args: &Args, classifier: &Classifier, line: String) -> std::result::Result<Asked, String> {
    if !args.jsonl {
        let texts = match (args.pair, line.split_once('\t')) {
            (false, _) => vec![line],
            (true, Some((first, second))) => vec![first.into(), second.into()],
            (true, None) => return Err("there is no tab between two texts".into()),
        };
        return Ok(Asked { texts, of: None });
    }
    let value: Value = serde_json::from_str(&line).map_err(|error| format!("no valid JSON: {error}"))?;
    let text = |name: &str| match value.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("`{name}` is no text")),
    };
    let first = text("text")?.ok_or("there is no `text`: a line is an object with one")?;
    let names = classifier.names();
    let of = match text("adapter")? {
        Some(wanted) => match names.iter().position(|name| *name == wanted) {
            Some(place) => Some(place),
            None if names.is_empty() => {
                return Err(format!("there is no adapter `{wanted}` to be asked alone"));
            }
            None => return Err(format!("there is no adapter `{wanted}`; there are: {}", names.join(", "))),
        },
        None => None,
    };
    Ok(Asked { texts: [first].into_iter().chain(text("pair")?).collect(), of })
}

/// Prints what is said of each text, by the adapter that is asked or by every one in turn.
fn answers(args: &Args, classifier: &mut Classifier, asked: &[Asked]) -> Result<()> {
    let mut said: Vec<Vec<String>> = asked.iter().map(|_| vec![]).collect();
    for place in 0..classifier.count() {
        let mine = |one: &Asked| one.of.is_none_or(|of| of == place);
        let texts: Vec<&[String]> = asked.iter().filter(|one| mine(one)).map(|one| &one.texts[..]).collect();
        let lines = match texts.is_empty() {
            true => vec![],
            false => lines(args, &classifier.turn_to(place)?, &texts)?,
        };
        let of_mine = asked.iter().zip(&mut said).filter(|(one, _)| mine(one));
        of_mine.zip(lines).for_each(|((_, said), line)| said.push(line));
    }
    said.iter().flatten().try_for_each(say)
}

/// A line for each text.
fn lines(args: &Args, classifier: &InUse<'_>, texts: &[&[String]]) -> Result<Vec<String>> {
    let encode = |text: &&[String]| classifier.encoder.text(&text[0], text.get(1).map(String::as_str));
    let tokens = texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
    let (logits, task) = (classifier.logits(&tokens)?, &classifier.about.task);
    let line = |(text, row): (&&[String], &[f32])| match (args.json, classifier.name) {
        (true, Some(name)) => merge(json!({ "adapter": name }), said(task, text, row)).to_string(),
        (true, None) => said(task, text, row).to_string(),
        (false, name) => {
            let name = name.map_or(String::new(), |name| format!("{name}\t"));
            format!("{name}{}\t{}", short(task, row), text.join("\t"))
        }
    };
    Ok(texts.iter().zip(logits.chunks(task.outputs())).map(line).collect())
}

/// Probabilities that sum to 1.
fn softmax(row: &[f32]) -> Vec<f64> {
    let top = row.iter().copied().fold(f32::MIN, f32::max);
    let powers: Vec<f64> = row.iter().map(|&x| ((x - top) as f64).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-x as f64).exp())
}

fn said(task: &Task, text: &[String], row: &[f32]) -> Value {
    let text = if text.len() == 1 {
        json!({ "text": text[0] })
    } else {
        json!({ "text": text[0], "pair": text[1] })
    };
    let named = |names: &[String], values: Vec<f64>| -> Value {
        names
            .iter()
            .cloned()
            .zip(values.into_iter().map(|p| json!(p)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let answer = match task {
        Task::Classify(labels) => json!({
            "label": labels.names()[largest(row)],
            "probabilities": named(labels.names(), softmax(row)),
        }),
        Task::Several(labels, _) => json!({
            "labels": labels.names().iter().zip(row).filter(|(_, x)| **x > 0.0).map(|(n, _)| n).collect::<Vec<_>>(),
            "probabilities": named(labels.names(), row.iter().map(|&x| sigmoid(x)).collect()),
        }),
        Task::Regress => json!({ "value": row[0] }),
    };
    merge(text, answer)
}

fn merge(mut a: Value, b: Value) -> Value {
    if let (Some(a), Value::Object(b)) = (a.as_object_mut(), b) {
        a.extend(b);
    }
    a
}

fn short(task: &Task, row: &[f32]) -> String {
    match task {
        Task::Classify(labels) => {
            let best = largest(row);
            format!("{}\t{:.4}", labels.names()[best], softmax(row)[best])
        }
        Task::Several(labels, _) => {
            let found = labels.names().iter().zip(row).filter(|(_, x)| **x > 0.0);
            found.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(",")
        }
        Task::Regress => format!("{:.4}", row[0]),
    }
}
