//! `randlora finetune`: from a model folder and a table of examples to an adapter.

mod args;
mod folder;
mod record;

use std::cell::Cell;
use std::time::Instant;

use randlora::adapters::Attached;
use randlora::data::Batches;
use randlora::io::{Adapter, Checkpoint};
use randlora::models::{Bert, BertConfig, BertLoad};
use randlora::nn::{Module, TokenIds};
use randlora::optim::{AdamW, Schedule};
use randlora::train::{Flow, Progress, Trainer};
use randlora::{Device, Error, Result};
use serde_json::json;

use super::about::About;
use super::device::note_use;
use super::encode::Encoder;
use super::labels::LabelSet;
use super::model::{self, batch};
use super::output::{check_folder, cpu_seconds, peak_memory, say};
use super::table::{self, Example, Label, Labels};
use super::task::{Answers, Kind, Scores, Task};
use super::{Failure, eval, precision};
pub(crate) use args::Args;
use folder::{Folder, Kept};
use record::Record;

/// Examples as the model reads them, and what it should say.
struct Data {
    texts: Vec<TokenIds>,
    answers: Answers,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> std::result::Result<(), Failure> {
    check_folder(&args.out, args.force)?;
    args.model.with_threads(|| finetune(args))?
}

fn finetune(args: &Args) -> std::result::Result<(), Failure> {
    // What is wrong with the arguments themselves is said before minutes are spent on files.
    args.check()?;
    let checkpoint = args.model.checkpoint()?;
    let config = BertConfig::of(&checkpoint)?;
    let adapter = args.model.open_adapter()?;
    let columns = args.columns.columns();
    let train = table::read(&args.train, &columns, Labels::Needed)?;
    let test = args.eval.as_deref().map(|path| table::read(path, &columns, Labels::Needed)).transpose()?;

    let (about, labels) = about(args, &checkpoint, &config, adapter.as_ref(), &train)?;
    let encoder = Encoder::open(&args.model.model, &config, about.max_length)?;
    let data = |path, examples: &[Example]| -> Result<Data> {
        let answers = about.task.answers(path, examples)?;
        Ok(Data { texts: encoder.examples(path, examples)?, answers })
    };
    let train = data(&args.train, &train)?;
    let test = match (&args.eval, test) {
        (Some(path), Some(test)) => Some(data(path, &test)?),
        _ => None,
    };

    let device = args.device.open(&args.model.precision)?;
    let model = match &adapter {
        Some(adapter) => model::adapted(&checkpoint, Some(adapter), &device)?,
        None => {
            let wanted = BertLoad { labels, seed: args.seed };
            let (mut model, loaded) = Bert::load(&checkpoint, wanted, &device)?;
            args.settings(train.texts.len()).attach(&mut model, &loaded.fresh, &checkpoint)?;
            model
        }
    };
    let folder = Folder::new(args, &checkpoint, adapter.as_ref(), about)?;
    eprintln!("{}: {}", folder.method(&model), Attached::of(&model));
    let run = Run { args, device, folder, train, test };
    run.train(model)
}

/// The task and the length of texts, and the outputs of a new classifier if one is needed.
fn about(
    args: &Args,
    checkpoint: &Checkpoint,
    config: &BertConfig,
    adapter: Option<&Adapter>,
    train: &[Example],
) -> Result<(About, Option<usize>)> {
    let longest = |wanted: usize| match wanted > config.positions {
        true => Err(Error::Config {
            what: "--max-length",
            message: format!("{wanted} is more than the model's {} positions", config.positions),
        }),
        false => Ok(wanted),
    };
    if let Some(adapter) = adapter {
        let about = model::about(&args.model, checkpoint, Some(adapter))?;
        let max_length = longest(args.max_length.unwrap_or(about.max_length))?;
        return Ok((About { max_length, ..about }, None));
    }
    let max_length = longest(args.max_length.unwrap_or(config.positions.min(128)))?;
    let several = train.iter().any(|e| matches!(e.label, Some(Label::Many(_))));
    let separator = args.separator.clone().or(several.then(|| ",".into()));
    let task = match (args.task, separator) {
        (Kind::Regress, _) => Task::Regress,
        (Kind::Classify, separator) => {
            let found = LabelSet::from_examples(&args.train, train, separator.as_deref())?;
            // A model that was trained for the same classes keeps their order and its classifier.
            let own = checkpoint.labels()?;
            let set = match config.labels == own.len() && found.same_names(&own) {
                true => LabelSet::from_names(own)?,
                false => found,
            };
            match separator {
                Some(separator) => Task::Several(set, separator),
                None => Task::Classify(set),
            }
        }
    };
    let own = checkpoint.labels()?;
    let keeps = match task.labels() {
        Some(labels) => config.labels > 0 && labels.names() == own,
        None => config.labels == 1,
    };
    let outputs = task.outputs();
    Ok((About { task, max_length }, (!keeps).then_some(outputs)))
}

/// A training that is ready to begin.
struct Run<'a> {
    args: &'a Args,
    device: Device,
    folder: Folder<'a>,
    train: Data,
    test: Option<Data>,
}

impl Run<'_> {
    fn train(self, mut model: Bert) -> std::result::Result<(), Failure> {
        let args = self.args;
        let method = self.folder.method(&model);
        let batches = Batches::new(self.train.texts.len(), args.batch_size, args.seed)?;
        let batches = match args.group_by_length {
            true => batches.grouped(self.train.texts.iter().map(|text| text.ids.len()).collect())?,
            false => batches,
        };
        let total = args.steps(self.train.texts.len());
        let mut trainer = Trainer {
            schedule: Schedule { warmup: args.warmup.steps(total), decay: args.schedule.decay() },
            accumulate: args.accumulate,
            clip: (args.clip > 0.0).then_some(args.clip),
            seed: args.seed,
            checkpoint_activations: args.checkpoint_activations,
            ..Trainer::new(
                AdamW::new().weight_decay(args.weight_decay),
                args.learning_rate(method),
                args.epochs,
            )
        };
        let tokens = Cell::new(0usize);
        let (start, mut kept) = (Instant::now(), Kept::of(&model));
        let mut record = Record::new(&self.folder, total as u64)?;
        let mut best: Option<(f64, usize)> = None;
        let loss = |model: &Bert, rows: &[usize], ctx: &_| {
            let batch = batch(&self.train.texts, rows, model)?;
            tokens.set(tokens.get() + batch.ids.as_slice().len());
            self.train.answers.loss(&model.forward(&batch, ctx)?, rows, &self.device)
        };
        let on_step = |model: &Bert, progress: &Progress| {
            kept.after(progress, model);
            let speed = tokens.get() as f64 / start.elapsed().as_secs_f64().max(1e-9);
            record.step(progress, speed)?;
            if progress.epoch_ends {
                let epoch = progress.epoch + 1;
                check_finite(model, progress.step)?;
                let scores = self.evaluate(model, progress.step)?;
                record.epoch(epoch, progress.step, scores.as_ref())?;
                self.folder.save(model, "last")?;
                let choose = scores.as_ref().map_or(epoch as f64, choice);
                if best.is_none_or(|(value, _)| choose > value) {
                    best = Some((choose, epoch));
                    self.folder.save(model, "best")?;
                }
            }
            Ok(Flow::Continue)
        };
        let trained = trainer.fit(&mut model, &batches, loss, on_step);
        record.finish();
        if let Err(error) = trained {
            let Error::NonFinite { what, step } = error else { return Err(error.into()) };
            // People count steps from 1, as metrics.jsonl does.
            let error = Error::NonFinite { what, step: step + 1 };
            let steps = kept.restore(&mut model)?;
            self.folder.save(&model, "last")?;
            if self.test.is_none() {
                // The last is the best then.
                self.folder.save(&model, "best")?;
            }
            let place = self.folder.path("last");
            return Err(format!("{error}; {} has the state after {steps} steps", place.display()).into());
        }
        note_use(&self.device);
        let curves = record.draw()?;
        self.report(&model, &record, best.map_or(0, |(_, epoch)| epoch), (start, tokens.get()))?;
        eprintln!(
            "written: {}",
            [self.folder.path("best"), self.folder.path("last"), curves]
                .map(|p| p.display().to_string())
                .join(", ")
        );
        Ok(())
    }

    /// The loss and the scores on the evaluation file, after step `step`.
    fn evaluate(&self, model: &Bert, step: usize) -> Result<Option<(f64, Scores)>> {
        let Some(test) = &self.test else { return Ok(None) };
        let outputs = model.config().labels;
        let logits = model::logits(model, &test.texts, outputs)?;
        if logits.iter().any(|x| !x.is_finite()) {
            return Err(Error::NonFinite { what: "the evaluation".into(), step });
        }
        let scores = test.answers.scores(&logits, outputs)?;
        let rows: Vec<usize> = (0..test.texts.len()).collect();
        let logits = randlora::Tensor::from_vec(logits, [rows.len(), outputs], &self.device)?;
        Ok(Some((test.answers.loss(&logits, &rows, &self.device)?.item()?, scores)))
    }

    fn report(
        &self,
        model: &Bert,
        record: &Record,
        best: usize,
        (start, tokens): (Instant, usize),
    ) -> Result<()> {
        let seconds = start.elapsed().as_secs_f64();
        let (of_best, of_last) = (record.scores(best), record.scores(self.args.epochs));
        let speed = tokens as f64 / seconds.max(1e-9);
        if self.args.json {
            let scores = |epoch, scores: Option<&Scores>| {
                json!(eval::object(scores.unwrap_or(&vec![]), &[("epoch", json!(epoch))]))
            };
            return say(json!({
                "method": self.folder.method(model),
                "precision": precision::done(&self.device).to_string(),
                "trained_parameters": model.trainable_count(),
                "best": scores(best, of_best),
                "last": scores(self.args.epochs, of_last),
                "train_loss": record.last_loss(),
                "seconds": seconds,
                "cpu_seconds": cpu_seconds(),
                "tokens_per_s": speed,
                "peak_rss_bytes": peak_memory(),
            }));
        }
        let line = |scores: Option<&Scores>| scores.map(eval::line).unwrap_or_default();
        say(format_args!("best: epoch {best}{}", line(of_best)))?;
        say(format_args!("last: epoch {}{}", self.args.epochs, line(of_last)))?;
        let memory = peak_memory().map_or(String::new(), |b| format!(", at most {} MiB", b >> 20));
        say(format_args!(
            "{} numbers trained in {seconds:.1} s, {speed:.0} tokens/s{memory}",
            model.trainable_count()
        ))
    }
}

/// What the best state has most of: the first score, or the least loss where that is undefined.
fn choice((loss, scores): &(f64, Scores)) -> f64 {
    scores.first().and_then(|(_, value)| *value).unwrap_or(-loss)
}

/// An error where what is trained is no longer finite after step `step`: no loss has seen it yet.
fn check_finite(model: &Bert, step: usize) -> Result<()> {
    for (name, parameter) in model.parameters() {
        if parameter.is_trainable() && !parameter.value().to_vec::<f32>()?.iter().all(|x| x.is_finite()) {
            return Err(Error::NonFinite { what: format!("`{name}`"), step });
        }
    }
    Ok(())
}
