//! What a training says on its way: the progress, metrics.jsonl, the curves.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use randlora::train::Progress;
use randlora::{Error, Result};
use serde_json::{Value, json};

use super::folder::Folder;
use crate::cli::Failure;
use crate::cli::eval;
use crate::cli::plot::{Axis, Curve, draw, smooth};
use crate::cli::progress::TrainingProgress;
use crate::cli::task::Scores;

/// The record of a training.
pub(super) struct Record {
    metrics: File,
    path: PathBuf,
    picture: PathBuf,
    progress: TrainingProgress,
    losses: Vec<f64>,
    /// The step, loss and scores at the end of each epoch that was evaluated.
    epochs: Vec<(usize, f64, Scores)>,
}

impl Record {
    pub(super) fn new(folder: &Folder, total: u64) -> Result<Record> {
        let path = folder.path("metrics.jsonl");
        let metrics = File::create(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        Ok(Record {
            metrics,
            path,
            picture: folder.path("curves.svg"),
            progress: TrainingProgress::new(total),
            losses: vec![],
            epochs: vec![],
        })
    }

    /// A step was made.
    pub(super) fn step(&mut self, progress: &Progress, tokens_per_second: f64) -> Result<()> {
        self.losses.push(progress.loss);
        self.progress.step(progress, tokens_per_second);
        self.write(json!({
            "step": progress.step + 1,
            "epoch": progress.epoch + 1,
            "loss": progress.loss,
            "learning_rate": progress.learning_rate,
            "gradient_norm": progress.gradient_norm,
            "tokens_per_s": tokens_per_second,
        }))
    }

    /// An epoch ended, after step `step`.
    pub(super) fn epoch(
        &mut self,
        epoch: usize,
        step: usize,
        evaluated: Option<&(f64, Scores)>,
    ) -> Result<()> {
        let Some((loss, scores)) = evaluated else { return Ok(()) };
        self.progress.say(&format!("epoch {epoch}: evaluation loss {loss:.4}{}", eval::line(scores)));
        self.epochs.push((step + 1, *loss, scores.clone()));
        let before = [("step", json!(step + 1)), ("epoch", json!(epoch)), ("eval_loss", json!(loss))];
        self.write(json!(eval::object(scores, &before)))
    }

    fn write(&mut self, line: Value) -> Result<()> {
        writeln!(self.metrics, "{line}").map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    /// The scores at the end of an epoch, counted from 1.
    pub(super) fn scores(&self, epoch: usize) -> Option<&Scores> {
        self.epochs.get(epoch.checked_sub(1)?).map(|(_, _, scores)| scores)
    }

    /// The mean loss of the last steps.
    pub(super) fn last_loss(&self) -> Option<f64> {
        let last = &self.losses[self.losses.len().saturating_sub(SMOOTH)..];
        (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64)
    }

    /// The progress makes room for the results.
    pub(super) fn finish(&self) {
        self.progress.finish();
    }

    /// Draws the losses over the steps.
    pub(super) fn draw(&self) -> std::result::Result<PathBuf, Failure> {
        let train = smooth(&self.losses, SMOOTH);
        let mut curves = vec![Curve { name: format!("training (mean of {SMOOTH} steps)"), points: train }];
        if !self.epochs.is_empty() {
            let points = self.epochs.iter().map(|(step, loss, _)| (*step as f64, *loss)).collect();
            curves.push(Curve { name: "evaluation".into(), points });
        }
        draw(&self.picture, "loss", ("step", "loss"), Axis::Count, &curves)
    }
}

/// Steps over which the drawn and the reported loss are averaged.
const SMOOTH: usize = 15;
