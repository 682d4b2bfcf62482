//! JSON files, read field by field with errors that name the file and the field.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::io::files::io_error;

/// Configurations are small: what is larger is something else.
const MAX_BYTES: u64 = 16 << 20;

/// An object out of a file.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    what: String,
    fields: Map<String, Value>,
}

impl Object {
    /// Reads a file.
    pub(crate) fn read(path: &Path) -> Result<Object> {
        let error = |source| io_error(path, source);
        if fs::metadata(path).map_err(error)?.len() > MAX_BYTES {
            return Err(Error::data(path.display().to_string(), "too large for a configuration"));
        }
        Object::parse(path.display().to_string(), &fs::read_to_string(path).map_err(error)?)
    }

    /// Takes a text apart; errors call it `what`.
    pub(crate) fn parse(what: String, text: &str) -> Result<Object> {
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => Ok(Object::of(what, fields)),
            Ok(_) => Err(Error::data(what, "a JSON object is needed")),
            Err(error) => Err(Error::data(what, format!("no valid JSON: {error}"))),
        }
    }

    /// These fields; errors call them `what`.
    pub(crate) fn of(what: String, fields: Map<String, Value>) -> Object {
        Object { what, fields }
    }

    /// A field; None where it is missing or null.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// All fields.
    pub(crate) fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    fn typed<'a, T>(
        &'a self,
        name: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(format!("`{name}` is {value}, not {kind}"))),
        }
    }

    /// A number from 0 without fraction.
    pub(crate) fn size(&self, name: &str) -> Result<Option<usize>> {
        self.typed(name, "a number from 0 without fraction", |v| v.as_u64().and_then(|v| v.try_into().ok()))
    }

    /// A number.
    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, "a number", Value::as_f64)
    }

    /// A text.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>> {
        self.typed(name, "a text", Value::as_str)
    }

    /// True or false.
    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// A list of texts.
    pub(crate) fn texts(&self, name: &str) -> Result<Option<Vec<&str>>> {
        self.typed(name, "a list of texts", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }

    /// An object; errors about it name this file.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Object>> {
        let fields = self.typed(name, "an object", Value::as_object)?;
        Ok(fields.map(|fields| Object::of(self.what.clone(), fields.clone())))
    }

    /// An object of texts.
    pub(crate) fn table(&self, name: &str) -> Result<Option<Vec<(&str, &str)>>> {
        self.typed(name, "an object of texts", |v| {
            v.as_object()?.iter().map(|(key, value)| Some((key.as_str(), value.as_str()?))).collect()
        })
    }

    /// The value of a field that must be there.
    pub(crate) fn needed<T>(&self, name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(format!("`{name}` is missing")))
    }

    /// An error about this file.
    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        Error::data(self.what.clone(), message)
    }
}
