//! Examples read from a table of texts: TSV, CSV or JSONL.
//!
//! Which columns (fields, in JSONL) hold what is either said or found by the usual names: a pair of
//! [`PAIRS`], else one of [`TEXTS`] alone; one of [`LABELS`]. In TSV quotes are plain characters; in
//! CSV a quoted field may hold commas and line ends. A byte order mark, CRLF and blank lines do no
//! harm. Labels lose the white space around them, texts keep it.

mod delimited;
mod jsonl;

use std::fs;
use std::path::Path;
use std::str::FromStr;

use clap::ValueEnum;
use randlora::{Error, Result};

/// Usual names of the two texts of a pair, the likeliest first.
const PAIRS: &[(&str, &str)] = &[
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
];
/// Usual names of a text alone, the likeliest first.
const TEXTS: &[&str] = &["sentence", "text", "sentence1", "premise", "question"];
/// Usual names of a label, the likeliest first.
const LABELS: &[&str] = &["label", "score", "labels", "category"];

/// A column as an option names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// By what the header, or the field of a JSON object, is called.
    Name(String),
    /// By its place, counted from 1.
    Number(usize),
}

impl FromStr for Column {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Column, String> {
        if text.is_empty() {
            return Err("give a column's name or number".into());
        }
        if !text.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Column::Name(text.into()));
        }
        match text.parse() {
            Ok(number) if number > 0 => Ok(Column::Number(number)),
            _ => Err(format!("there is no column {text}: they are counted from 1")),
        }
    }
}

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns between tabs, without quoting.
    Tsv,
    /// Columns between commas, quoted where needed.
    Csv,
    /// A JSON object on each line.
    Jsonl,
}

impl Format {
    fn of(path: &Path) -> Result<Format> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "tsv" | "txt" => Ok(Format::Tsv),
            "csv" => Ok(Format::Csv),
            "jsonl" | "json" | "ndjson" => Ok(Format::Jsonl),
            _ => Err(wrong(path, "the name does not tell the format: give `--format tsv|csv|jsonl`")),
        }
    }
}

/// Where the parts of an example are. What is `None` is found as this module's documentation says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Columns {
    /// The text, or the first of a pair.
    pub(crate) text: Option<Column>,
    /// The second text of a pair. With a given `text` there is none unless this is given too.
    pub(crate) pair: Option<Column>,
    /// The label.
    pub(crate) label: Option<Column>,
    /// Whether the first row of a TSV or CSV file names the columns. Unsaid, it does where a column
    /// is given by name; else where one of the cells in question (all, if no column is given) is a
    /// usual name, or the label's alone of its column is no number. Without meaning in JSONL.
    pub(crate) header: Option<bool>,
    /// How the file is written; unsaid, its extension says it.
    pub(crate) format: Option<Format>,
}

/// Whether every example must have a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Labels {
    /// Every one.
    Needed,
    /// Every one if there is such a column, else none. A column that was asked for must be there.
    IfThere,
}

/// What a model reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// A text or a pair of them.
    Text { first: String, second: Option<String> },
    /// Tokens (JSONL only). The optional parts are as long as `input_ids`, which is not empty.
    Ids { input_ids: Vec<u32>, attention_mask: Option<Vec<bool>>, token_type_ids: Option<Vec<u32>> },
}

/// A label as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Label {
    /// A cell, a JSON string or truth value.
    Text(String),
    /// A JSON number.
    Number(f64),
    /// A JSON array.
    Many(Vec<String>),
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Example {
    /// The line that it begins on, counted from 1.
    pub(crate) line: usize,
    /// What the model reads.
    pub(crate) input: Input,
    /// What it should say.
    pub(crate) label: Option<Label>,
}

/// Reads all examples of a file, of which there is at least one.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read, [`Error::Data`] with file and line for all else.
pub(crate) fn read(path: &Path, columns: &Columns, labels: Labels) -> Result<Vec<Example>> {
    let io = |source| Error::Io { path: path.into(), source };
    if fs::metadata(path).map_err(io)?.is_dir() {
        return Err(wrong(path, "this is a directory: give a file of examples"));
    }
    let format = columns.format.map_or_else(|| Format::of(path), Ok)?;
    let bytes = fs::read(path).map_err(io)?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&b| b == b'\n').count();
        wrong_at(path, line, "this is not UTF-8: convert the file")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(wrong(path, "the file is empty: give one example in each row"));
    }
    match format {
        Format::Tsv => delimited::read(path, text, b'\t', columns, labels),
        Format::Csv => delimited::read(path, text, b',', columns, labels),
        Format::Jsonl => jsonl::read(path, text, columns, labels),
    }
}

/// The error for a file as a whole.
pub(super) fn wrong(path: &Path, message: impl Into<String>) -> Error {
    Error::Data { what: path.display().to_string(), message: message.into() }
}

/// The error for a line of a file.
pub(super) fn wrong_at(path: &Path, line: usize, message: impl AsRef<str>) -> Error {
    wrong(path, format!("line {line}: {}", message.as_ref()))
}

/// The places of the usual names of a text, and of the second of a pair, among these.
fn usual_texts(names: &[&str]) -> Option<(usize, Option<usize>)> {
    let pair = PAIRS.iter().find_map(|(first, second)| Some((usual(names, first)?, usual(names, second)?)));
    pair.map(|(first, second)| (first, Some(second))).or_else(|| Some((usual_text(names)?, None)))
}

fn usual_text(names: &[&str]) -> Option<usize> {
    TEXTS.iter().find_map(|name| usual(names, name))
}

fn usual_label(names: &[&str]) -> Option<usize> {
    LABELS.iter().find_map(|name| usual(names, name))
}

fn usual(names: &[&str], name: &str) -> Option<usize> {
    names.iter().position(|n| n.trim().eq_ignore_ascii_case(name))
}

/// Names, in quotation marks, for an error.
fn list(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(20).map(|name| format!("`{}`", short(name))).collect();
    shown.join(", ") + if names.len() > 20 { ", …" } else { "" }
}

/// A name for an error's one line, where it may turn out to be a whole text.
pub(super) fn short(name: &str) -> String {
    let name = name.replace(char::is_control, " ");
    match name.char_indices().nth(30) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name,
    }
}

#[cfg(test)]
mod tests;
