//! What is known of a study's trainings: one line of JSON for each that has ended.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use randlora::{Error, Result};
use serde_json::{Value, json};

use crate::cli::table::wrong_at;

/// The file and what it says.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    lines: Mutex<Vec<Value>>,
}

impl Record {
    /// Reads the file, if it is there. A last line without its end is what an interruption has left, and goes.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Data`] with the line of what is no record.
    pub(super) fn open(path: &Path) -> Result<Record> {
        let error = |source| Error::Io { path: path.to_path_buf(), source };
        let mut bytes = match fs::read(path) {
            Err(missing) if missing.kind() == ErrorKind::NotFound => vec![],
            read => read.map_err(error)?,
        };
        // Cut as bytes: a line may be torn within a character.
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        if whole < bytes.len() {
            let file = OpenOptions::new().write(true).open(path).map_err(error)?;
            file.set_len(whole as u64).map_err(error)?;
            bytes.truncate(whole);
        }
        let text = String::from_utf8_lossy(&bytes);
        let line = |(line, at): (&str, usize)| {
            let value: Option<Value> = serde_json::from_str(line).ok();
            let is_record = |value: &Value| value["settings"].is_object() && value["result"].is_object();
            value.filter(is_record).ok_or_else(|| wrong_at(path, at, "this is no record of a training"))
        };
        let lines = text.lines().zip(1..).map(line).collect::<Result<_>>()?;
        Ok(Record { path: path.to_path_buf(), lines: Mutex::new(lines) })
    }

    /// What came of the training with these settings, if it has ended.
    pub(super) fn result(&self, settings: &Value) -> Option<Value> {
        let lines = self.lines.lock().ok()?;
        lines.iter().find(|line| line["settings"] == *settings).map(|line| line["result"].clone())
    }

    /// Notes what came of a training.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written.
    pub(super) fn add(&self, settings: &Value, result: Value) -> Result<()> {
        let line = json!({ "settings": settings, "result": result });
        let error = |source| Error::Io { path: self.path.clone(), source };
        // The lock keeps lines of several workers apart.
        let Ok(mut lines) = self.lines.lock() else { return Ok(()) };
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path).map_err(error)?;
        file.write_all(format!("{line}\n").as_bytes()).map_err(error)?;
        lines.push(line);
        Ok(())
    }
}
