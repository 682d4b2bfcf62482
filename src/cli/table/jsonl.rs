//! JSONL: one JSON object on each line. A field that is null counts as missing.

use std::path::Path;

use randlora::Result;
use serde_json::{Map, Value};

use super::{
    Column, Columns, Example, Input, Label, Labels, list, usual_label, usual_text, usual_texts, wrong,
    wrong_at,
};

type Object = Map<String, Value>;

/// Reads a file that is not blank.
pub(super) fn read(path: &Path, text: &str, columns: &Columns, labels: Labels) -> Result<Vec<Example>> {
    let lines = text.lines().zip(1..).filter(|(text, _)| !text.trim().is_empty());
    let rows = lines
        .map(|(text, line)| Ok((line, object(text).map_err(|message| wrong_at(path, line, message))?)))
        .collect::<Result<Vec<_>>>()?;
    let fields = Fields::find(path, columns, &rows, labels)?;
    let example = |(line, row): &(usize, Object)| {
        fields.example(*line, row).map_err(|message| wrong_at(path, *line, message))
    };
    rows.iter().map(example).collect()
}

fn object(text: &str) -> std::result::Result<Object, String> {
    serde_json::from_str(text).map_err(|error| {
        let message = error.to_string();
        // Its line is always 1: we give it one.
        let (message, _) = message.split_once(" at line").unwrap_or((&message, ""));
        format!("column {}: {message}; give one JSON object on each line", error.column())
    })
}

/// The fields that count.
struct Fields {
    /// `None` where all rows have `input_ids`.
    texts: Option<(String, Option<String>)>,
    /// Whether `input_ids` are taken where they are: not if a text was asked for.
    ids: bool,
    label: Option<String>,
}

impl Fields {
    /// What is not given by name is found in the first row (the first without `input_ids`, for a text).
    fn find(path: &Path, columns: &Columns, rows: &[(usize, Object)], labels: Labels) -> Result<Fields> {
        let name = |column: &Option<Column>| match column {
            Some(Column::Number(number)) => {
                Err(wrong(path, format!("the fields of JSONL have no numbers: give a name for {number}")))
            }
            Some(Column::Name(name)) => Ok(Some(name.clone())),
            None => Ok(None),
        };
        let (text, pair, mut label) = (name(&columns.text)?, name(&columns.pair)?, name(&columns.label)?);
        let none = |line, what, option, names: &[&str]| {
            wrong_at(
                path,
                line,
                format!("no field is called {what}; give `{option}` one of: {}", list(names)),
            )
        };
        if let (None, Some((line, row))) = (&label, rows.first()) {
            let names = names(row);
            label = usual_label(&names).map(|at| names[at].to_string());
            if label.is_none() && labels == Labels::Needed {
                return Err(none(*line, "like a label", "--label", &names));
            }
        }
        let ids = text.is_none();
        let texts = match (text, rows.iter().find(|(_, row)| !has_ids(row))) {
            (Some(text), _) => Some((text, pair)),
            (None, None) => None,
            (None, Some((line, row))) => {
                let names = names(row);
                let found = match &pair {
                    Some(_) => usual_text(&names).map(|first| (first, None)),
                    None => usual_texts(&names),
                };
                let (first, second) = found.ok_or_else(|| none(*line, "like a text", "--text", &names))?;
                Some((names[first].to_string(), pair.or_else(|| second.map(|at| names[at].to_string()))))
            }
        };
        Ok(Fields { texts, ids, label })
    }

    fn example(&self, line: usize, row: &Object) -> std::result::Result<Example, String> {
        let input = match &self.texts {
            Some((first, second)) if !(self.ids && has_ids(row)) => Input::Text {
                first: text(row, first)?,
                second: second.as_ref().map(|second| text(row, second)).transpose()?,
            },
            _ => ids(row)?,
        };
        let label = self.label.as_ref().map(|name| label(name, field(row, name)?)).transpose()?;
        Ok(Example { line, input, label })
    }
}

fn names(row: &Object) -> Vec<&str> {
    row.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str()).collect()
}

fn has_ids(row: &Object) -> bool {
    row.get("input_ids").is_some_and(|value| !value.is_null())
}

fn field<'a>(row: &'a Object, name: &str) -> std::result::Result<&'a Value, String> {
    let value = row.get(name).filter(|value| !value.is_null());
    value.ok_or_else(|| format!("there is no field `{name}`; the row has: {}", list(&names(row))))
}

fn text(row: &Object, name: &str) -> std::result::Result<String, String> {
    let value = field(row, name)?;
    value.as_str().map(str::to_string).ok_or_else(|| format!("`{name}` is {}, not a string", kind(value)))
}

fn label(name: &str, value: &Value) -> std::result::Result<Label, String> {
    match (value, value.as_f64()) {
        (_, Some(number)) => Ok(Label::Number(number)),
        (Value::Array(several), _) => {
            let texts = several.iter().map(|one| label_text(name, one));
            Ok(Label::Many(texts.collect::<std::result::Result<_, _>>()?))
        }
        _ => Ok(Label::Text(label_text(name, value)?)),
    }
}

fn label_text(name: &str, value: &Value) -> std::result::Result<String, String> {
    match value {
        Value::String(text) if text.trim().is_empty() => Err(format!("`{name}`: the label is empty")),
        Value::String(text) => Ok(text.trim().to_string()),
        Value::Bool(truth) => Ok(truth.to_string()),
        // As `Label::Number` is written: without the zero of "2.0".
        Value::Number(number) => Ok(number.as_f64().map_or(number.to_string(), |n| n.to_string())),
        _ => Err(format!("`{name}` is {}, not a label", kind(value))),
    }
}

fn ids(row: &Object) -> std::result::Result<Input, String> {
    let input_ids = numbers(field(row, "input_ids")?, "input_ids", u32::MAX)?;
    if input_ids.is_empty() {
        return Err("`input_ids` is empty".into());
    }
    let beside = |name, largest| match row.get(name).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => match numbers(value, name, largest)? {
            values if values.len() == input_ids.len() => Ok(Some(values)),
            values => {
                Err(format!("`{name}` has {} values, `input_ids` has {}", values.len(), input_ids.len()))
            }
        },
    };
    let attention_mask = beside("attention_mask", 1)?.map(|mask| mask.iter().map(|&m| m == 1).collect());
    let token_type_ids = beside("token_type_ids", u32::MAX)?;
    Ok(Input::Ids { input_ids, attention_mask, token_type_ids })
}

fn numbers(value: &Value, name: &str, largest: u32) -> std::result::Result<Vec<u32>, String> {
    let Value::Array(values) = value else {
        return Err(format!("`{name}` is {}, not an array", kind(value)));
    };
    let number = |value: &Value| {
        let number = value.as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v <= largest);
        number.ok_or_else(|| format!("`{name}` holds {value}, not a whole number from 0 to {largest}"))
    };
    values.iter().map(number).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
