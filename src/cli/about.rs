//! randlora.json: what an adapter or model folder says of its task beside what PEFT and transformers
//! have files for.

use std::path::Path;

use randlora::{Error, Result, io};
use serde_json::{Value, json};

use super::labels::LabelSet;
use super::task::Task;

const NAME: &str = "randlora.json";

/// What a fine-tuned model needs to be used as it was trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct About {
    /// The task.
    pub(crate) task: Task,
    /// The most tokens of a text.
    pub(crate) max_length: usize,
}

impl About {
    /// Reads a folder's file, if it has one.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Data`] that name the file.
    pub(crate) fn read(folder: &Path) -> Result<Option<About>> {
        let path = folder.join(NAME);
        if !path.exists() {
            return Ok(None);
        }
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let wrong = |message: &str| Error::Data { what: path.display().to_string(), message: message.into() };
        let value: Value = serde_json::from_str(&text).map_err(|e| wrong(&format!("no valid JSON: {e}")))?;
        let max_length = value["max_length"].as_u64().and_then(|n| n.try_into().ok()).filter(|&n| n > 0);
        let labels = || -> Result<LabelSet> {
            let names: Option<Vec<String>> = value["labels"]
                .as_array()
                .and_then(|list| list.iter().map(|n| Some(n.as_str()?.into())).collect());
            LabelSet::from_names(names.ok_or_else(|| wrong("`labels` is not a list of texts"))?)
        };
        let task = match (value["task"].as_str(), value["separator"].as_str()) {
            (Some("classify"), None) => Task::Classify(labels()?),
            (Some("classify"), Some(separator)) => Task::Several(labels()?, separator.into()),
            (Some("regress"), _) => Task::Regress,
            _ => return Err(wrong("`task` is neither classify nor regress")),
        };
        let max_length = max_length.ok_or_else(|| wrong("`max_length` is not a number from 1"))?;
        Ok(Some(About { task, max_length }))
    }

    /// Writes the file.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let task = match self.task {
            Task::Regress => "regress",
            _ => "classify",
        };
        let mut value = json!({ "task": task, "max_length": self.max_length });
        if let Some(labels) = self.task.labels() {
            value["labels"] = json!(labels.names());
        }
        if let Task::Several(_, separator) = &self.task {
            value["separator"] = json!(separator);
        }
        io::write_whole(&folder.join(NAME), |out| writeln!(out, "{value:#}"))
    }
}
