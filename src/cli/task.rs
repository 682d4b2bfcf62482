//! What a model is trained for, and how well it does it.

use std::path::Path;

use randlora::{Device, Error, Result, Tensor, metrics};

use super::labels::{self, LabelSet};
use super::table::Example;

/// The kind of a task, as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Each example belongs to a class; to several with a separator or in JSON arrays.
    Classify,
    /// Each example has a number.
    Regress,
}

/// A task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// One class for each example.
    Classify(LabelSet),
    /// Any number of classes for each; the separator of several in one cell.
    Several(LabelSet, String),
    /// A number for each.
    Regress,
}

/// What the examples' labels say.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answers {
    /// One class each.
    Classes(Vec<usize>),
    /// For each example and class, whether it is one of its classes.
    Several(Vec<bool>),
    /// A number each.
    Numbers(Vec<f64>),
}

/// How well a model does: names and values, the one to choose by first. None where it is undefined.
pub(crate) type Scores = Vec<(&'static str, Option<f64>)>;

impl Task {
    /// The outputs of a model for this task.
    pub(crate) fn outputs(&self) -> usize {
        self.labels().map_or(1, |labels| labels.names().len())
    }

    /// The classes, if it has any.
    pub(crate) fn labels(&self) -> Option<&LabelSet> {
        match self {
            Task::Classify(labels) | Task::Several(labels, _) => Some(labels),
            Task::Regress => None,
        }
    }

    /// transformers' name for it.
    pub(crate) fn problem(&self) -> &'static str {
        match self {
            Task::Classify(_) => "single_label_classification",
            Task::Several(..) => "multi_label_classification",
            Task::Regress => "regression",
        }
    }

    /// What the examples' labels say.
    ///
    /// # Errors
    /// [`Error::Data`] with file and line for a label that is missing or not of this task.
    pub(crate) fn answers(&self, path: &Path, examples: &[Example]) -> Result<Answers> {
        let each = examples.iter();
        Ok(match self {
            Task::Classify(set) => Answers::Classes(each.map(|e| set.index(path, e)).collect::<Result<_>>()?),
            Task::Several(set, separator) => {
                let rows = each.map(|e| set.decisions(path, e, separator)).collect::<Result<Vec<_>>>()?;
                Answers::Several(rows.concat())
            }
            Task::Regress => Answers::Numbers(each.map(|e| labels::number(path, e)).collect::<Result<_>>()?),
        })
    }
}

impl Answers {
    /// The mean loss of these rows' logits (B, outputs).
    pub(crate) fn loss(&self, logits: &Tensor, rows: &[usize], device: &Device) -> Result<Tensor> {
        match self {
            Answers::Classes(classes) => {
                let classes: Vec<u32> = rows.iter().map(|&row| classes[row] as u32).collect();
                logits.cross_entropy(&classes, None, 0.0)
            }
            Answers::Several(decisions) => {
                let outputs = logits.dims()[1];
                let of = |row: usize| decisions[row * outputs..][..outputs].iter().map(|&d| d as u8 as f32);
                let target: Vec<f32> = rows.iter().flat_map(|&row| of(row)).collect();
                logits.binary_cross_entropy(&Tensor::from_vec(target, logits.shape(), device)?)
            }
            Answers::Numbers(numbers) => {
                let target: Vec<f32> = rows.iter().map(|&row| numbers[row] as f32).collect();
                logits.mse_loss(&Tensor::from_vec(target, logits.shape(), device)?)
            }
        }
    }

    /// How well all examples' logits, `outputs` each, fit.
    ///
    /// # Errors
    /// [`Error::Data`] for logits that are not finite.
    pub(crate) fn scores(&self, logits: &[f32], outputs: usize) -> Result<Scores> {
        if logits.iter().any(|x| !x.is_finite()) {
            let message = "some are not finite: the model has diverged".into();
            return Err(Error::Data { what: "the logits".into(), message });
        }
        Ok(match self {
            Answers::Classes(classes) => {
                let found: Vec<usize> = logits.chunks(outputs).map(largest).collect();
                let f1 = match outputs {
                    2 => ("f1", Some(metrics::f1(&found, classes)?)),
                    _ => ("macro_f1", Some(metrics::macro_f1(&found, classes)?)),
                };
                let accuracy = metrics::accuracy(&found, classes)?;
                vec![
                    ("accuracy", Some(accuracy)),
                    f1,
                    ("matthews", Some(metrics::matthews(&found, classes)?)),
                ]
            }
            Answers::Several(decisions) => {
                let found: Vec<bool> = logits.iter().map(|&x| x > 0.0).collect();
                let subset = metrics::subset_accuracy(&found, decisions, outputs)?;
                vec![
                    ("micro_f1", Some(metrics::micro_f1(&found, decisions)?)),
                    ("subset_accuracy", Some(subset)),
                ]
            }
            Answers::Numbers(numbers) => {
                let found: Vec<f64> = logits.iter().map(|&x| x as f64).collect();
                let squares = found.iter().zip(numbers).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
                vec![
                    ("pearson", metrics::pearson(&found, numbers)?),
                    ("spearman", metrics::spearman(&found, numbers)?),
                    ("mean_squared_error", Some(squares / numbers.len() as f64)),
                ]
            }
        })
    }
}

/// The place of the largest number, the first of several.
pub(crate) fn largest(row: &[f32]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
