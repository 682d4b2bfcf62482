//! One training of a study: a process of `finetune`, and two of `eval`.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::Args;
use super::entry::{Entry, Ranks};
use super::task::Task;
use crate::cli::Failure;

/// A training that a study asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Training<'a> {
    pub(super) args: &'a Args,
    pub(super) ranks: Ranks,
    pub(super) task: &'a Task,
    pub(super) entry: &'a Entry,
    pub(super) rate: f64,
    pub(super) seed: u64,
}

impl Training<'_> {
    /// All that its result follows from. Numbers that are not whole are texts: reading them back is exact.
    pub(super) fn settings(&self) -> Value {
        let Training { args, ranks, task, entry, rate, seed } = self;
        json!({
            "task": task.name,
            "kind": task.kind,
            "metric": task.metric,
            "train_rows": task.train_rows,
            "held_out": task.held_out_rows,
            "data": task.fingerprint,
            "model": args.model.display().to_string(),
            "method": entry.to_string(),
            "targets": args.targets,
            "rank": ranks.rank(entry),
            "lr": format!("{rate:e}"),
            "seed": seed,
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "max_length": args.max_length,
            "group_by_length": args.group_by_length,
        })
    }

    /// Trains in `folder`, which is then gone, and evaluates.
    ///
    /// # Errors
    /// Where a process fails for another reason than that the training diverged, which is a result.
    pub(super) fn run(&self, folder: &Path) -> Result<Value, Failure> {
        let outcome = self.train(folder);
        // What an interruption left goes here too; that there is nothing is no error.
        drop(std::fs::remove_dir_all(folder));
        match outcome {
            Err(failure) if failure.to_string().contains("not finite") => {
                Ok(json!({ "diverged": failure.to_string() }))
            }
            outcome => outcome,
        }
    }

    fn train(&self, folder: &Path) -> Result<Value, Failure> {
        let Training { args, ranks, task, entry, rate, seed } = self;
        let text = |path: &Path| path.display().to_string();
        let mut words: Vec<String> =
            ["finetune", "--json", "--force", "--task", task.kind].map(String::from).to_vec();
        for (name, value) in [
            ("--model", text(&args.model)),
            ("--train", text(&task.train)),
            ("--out", text(folder)),
            ("--lr", rate.to_string()),
            ("--seed", seed.to_string()),
            ("--epochs", args.epochs.to_string()),
            ("--batch-size", args.batch_size.to_string()),
            ("--max-length", args.max_length.to_string()),
            ("--targets", args.targets.clone()),
            ("--threads", args.threads.to_string()),
        ] {
            words.extend([name.into(), value]);
        }
        words.extend(args.group_by_length.then(|| "--group-by-length".into()));
        words.extend(entry.arguments(ranks.rank(entry)));
        let trained = answer(&words)?;
        let last = folder.join("last");
        // Methods without an adapter leave whole models.
        let model = match last.join("config.json").exists() {
            true => vec!["--model".into(), text(&last)],
            false => vec!["--model".into(), text(&args.model), "--adapter".into(), text(&last)],
        };
        let score = |data: &Path| -> Result<f64, Failure> {
            let data = ["--data".into(), text(data), "--threads".into(), args.threads.to_string()];
            let words = [vec!["eval".into(), "--json".into()], model.clone(), data.to_vec()].concat();
            let scores = answer(&words)?;
            scores[&task.metric].as_f64().ok_or_else(|| {
                format!("{}: `eval` says no `{}`: name another with metric=", task.name, task.metric).into()
            })
        };
        Ok(json!({
            "held_out": score(&task.held_out)?,
            "validation": score(&task.validation)?,
            "trained_parameters": trained["trained_parameters"],
            "train_loss": trained["train_loss"],
            "seconds": trained["seconds"],
            "cpu_seconds": trained["cpu_seconds"],
            "peak_bytes": trained["peak_rss_bytes"],
        }))
    }
}

/// The object that this program prints for these arguments, in a process of its own.
fn answer(words: &[String]) -> Result<Value, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    let output = command.args(words).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout)?);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default().trim_start_matches("error: ");
    Err(format!("`randlora {}` ended with {}: {last}", words.join(" "), output.status).into())
}
