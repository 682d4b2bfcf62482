//! A task of a study: its folder, and the files that its trainings read.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use randlora::data::permutation;
use randlora::io::write_whole;
use randlora::{Error, Result};
use serde_json::{Value, json};

use crate::cli::table::{self, Column, Columns, Example, Input, Label, Labels, wrong};

/// A folder of examples as `--task` names it.
#[derive(Clone, Debug)]
pub(super) struct TaskSpec {
    folder: PathBuf,
    pub(super) name: String,
    columns: Columns,
    /// What `--task` of `finetune` is called.
    kind: &'static str,
    metric: String,
}

impl FromStr for TaskSpec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<TaskSpec, String> {
        let mut parts = text.split(',');
        let folder = PathBuf::from(parts.next().unwrap_or_default());
        let name = folder.file_name().and_then(|name| name.to_str()).ok_or("give the folder's name")?;
        let mut task = TaskSpec {
            name: name.into(),
            folder: folder.clone(),
            columns: Columns::default(),
            kind: "classify",
            metric: String::new(),
        };
        for part in parts {
            match part.split_once('=').unwrap_or((part, "")) {
                ("text", column) => task.columns.text = Some(column.parse::<Column>()?),
                ("pair", column) => task.columns.pair = Some(column.parse::<Column>()?),
                ("label", column) => task.columns.label = Some(column.parse::<Column>()?),
                ("no-header", "") => task.columns.header = Some(false),
                ("regress", "") => task.kind = "regress",
                ("metric", metric) if !metric.is_empty() => task.metric = metric.into(),
                _ => {
                    let known = "text=, pair=, label=, no-header, regress, metric=";
                    return Err(format!("`{part}` is not among: {known}"));
                }
            }
        }
        if task.metric.is_empty() {
            task.metric = if task.kind == "regress" { "pearson" } else { "accuracy" }.into();
        }
        Ok(task)
    }
}

/// A task that is ready to be trained.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) name: String,
    pub(super) kind: &'static str,
    /// The score that counts, as `eval --json` calls it.
    pub(super) metric: String,
    /// The files: to learn from, to choose by, to judge by.
    pub(super) train: PathBuf,
    pub(super) held_out: PathBuf,
    pub(super) validation: PathBuf,
    pub(super) train_rows: usize,
    pub(super) held_out_rows: usize,
    /// Of all rows of the three files, as their columns were read: other data are another study.
    pub(super) fingerprint: String,
}

impl TaskSpec {
    /// Reads the folder and writes the three files. Rows are held out and chosen by one order, whatever
    /// their numbers are.
    ///
    /// # Errors
    /// [`Error::Data`] where a file is missing or too short, and as reading and writing.
    pub(super) fn prepare(&self, data: &Path, held_out: usize, most: Option<usize>) -> Result<Task> {
        let read = |path: &Path| table::read(path, &self.columns, Labels::Needed);
        let source = find(&self.folder, &["train"])?;
        let (examples, judged) = (read(&source)?, read(&find(&self.folder, &["validation", "dev"])?)?);
        if examples.len() <= held_out {
            let message = format!("there are {} rows, and {held_out} are held out", examples.len());
            return Err(wrong(&source, format!("{message}: ask for fewer with `--held-out`")));
        }
        let order = permutation(examples.len(), 0);
        let (aside, rest) = order.split_at(held_out);
        let rest = &rest[..rest.len().min(most.unwrap_or(usize::MAX))];
        let path = |part: &str| data.join(format!("{}-{part}.jsonl", self.name));
        let all: Vec<usize> = (0..judged.len()).collect();
        let files =
            [("train", &examples, rest), ("held-out", &examples, aside), ("validation", &judged, &all)];
        let mut fingerprint = Fingerprint::new();
        for (part, examples, rows) in files {
            let lines: String = rows.iter().map(|&row| format!("{}\n", object(&examples[row]))).collect();
            fingerprint.add(lines.as_bytes());
            write_whole(&path(part), |out| out.write_all(lines.as_bytes()))?;
        }
        Ok(Task {
            name: self.name.clone(),
            kind: self.kind,
            metric: self.metric.clone(),
            train: path("train"),
            held_out: path("held-out"),
            validation: path("validation"),
            train_rows: rest.len(),
            held_out_rows: aside.len(),
            fingerprint: fingerprint.text(),
        })
    }
}

/// The file of one of these names, whatever its format.
fn find(folder: &Path, names: &[&str]) -> Result<PathBuf> {
    let paths = names
        .iter()
        .flat_map(|name| ["tsv", "csv", "jsonl"].map(|extension| folder.join(format!("{name}.{extension}"))));
    let paths: Vec<PathBuf> = paths.collect();
    paths.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        let names: Vec<String> =
            paths.iter().filter_map(|path| Some(path.file_name()?.to_str()?.into())).collect();
        Error::Data {
            what: folder.display().to_string(),
            message: format!("there is none of: {}", names.join(", ")),
        }
    })
}

/// FNV-1a with 64 bits: the standard library's hash may differ between its versions.
struct Fingerprint(u64);

impl Fingerprint {
    fn new() -> Fingerprint {
        Fingerprint(0xcbf2_9ce4_8422_2325)
    }

    /// Adds a file, which its length keeps apart from the next.
    fn add(&mut self, file: &[u8]) {
        for byte in file.iter().chain(&(file.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn text(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// An example as `finetune` and `eval` find its parts by themselves.
fn object(example: &Example) -> Value {
    let mut object = match &example.input {
        Input::Text { first, second: None } => json!({ "text": first }),
        Input::Text { first, second: Some(second) } => json!({ "sentence1": first, "sentence2": second }),
        Input::Ids { input_ids, attention_mask, token_type_ids } => {
            json!({ "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids })
        }
    };
    object["label"] = match &example.label {
        Some(Label::Text(text)) => json!(text),
        Some(Label::Number(number)) => json!(number),
        Some(Label::Many(labels)) => json!(labels),
        None => Value::Null,
    };
    object
}
