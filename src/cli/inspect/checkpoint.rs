//! Model folders and files of tensors.

use std::collections::BTreeMap;
use std::path::Path;

use randlora::io::{Access, Checkpoint, Entry, FileType, SafeTensors};
use randlora::models::BertConfig;
use serde_json::{Value, json};

use super::{head, labels_lines, line, list, number, shape, string};
use crate::cli::{Failure, output};

/// A model folder.
pub(super) fn model(folder: &Path) -> Result<Value, Failure> {
    let checkpoint = Checkpoint::open(folder, Access::Read)?;
    let family = checkpoint.family()?;
    let config = match BertConfig::of(&checkpoint) {
        // The tensors of another family can be shown all the same.
        Err(_) if family.is_some_and(|family| family != "bert") => None,
        other => Some(other?),
    };
    let mut value = tensors(checkpoint.entries());
    value["kind"] = json!("model");
    value["family"] = json!(family.unwrap_or("bert"));
    value["architecture"] = config.map_or(Value::Null, |config| {
        json!({
            "layers": config.layers,
            "width": config.width,
            "heads": config.heads,
            "hidden": config.hidden,
            "vocab": config.vocab,
            "positions": config.positions,
            "segments": config.segments,
            "labels": config.labels,
        })
    });
    Ok(value)
}

/// A file.
pub(super) fn file(path: &Path) -> Result<Value, Failure> {
    let file = SafeTensors::open(path, Access::Read)?;
    let mut value = tensors(file.entries());
    value["kind"] = json!("safetensors");
    value["metadata"] = json!(file.metadata());
    Ok(value)
}

fn tensors<'a>(entries: impl Iterator<Item = (&'a str, &'a Entry)>) -> Value {
    let (mut parameters, mut dtypes, mut tensors) = (0, BTreeMap::new(), Vec::new());
    for (name, entry) in entries {
        let bytes = entry.range.end - entry.range.start;
        *dtypes.entry(entry.dtype.name()).or_insert(0) += bytes;
        // Integers are indices of some kind, not parameters.
        if let FileType::Float(_) = entry.dtype {
            parameters += bytes / entry.dtype.size() as u64;
        }
        let dtype = entry.dtype.name();
        tensors.push(json!({ "name": name, "dtype": dtype, "shape": entry.dims, "bytes": bytes }));
    }
    let bytes: u64 = dtypes.values().sum();
    json!({ "parameters": parameters, "bytes": bytes, "dtypes": dtypes, "tensors": tensors })
}

/// The same to read.
pub(super) fn text(value: &Value) -> String {
    let mut about = Vec::new();
    if value["kind"] == "model" {
        about.push(line("family", string(value, "family")));
        let sizes = ["layers", "width", "heads", "hidden", "vocab", "positions", "segments", "labels"];
        let sizes = sizes.iter().filter(|_| value["architecture"].is_object());
        about.extend(sizes.map(|name| line(name, output::count(number(&value["architecture"], name)))));
    }
    for (name, text) in value["metadata"].as_object().into_iter().flatten() {
        about.push(line(
            &format!("metadata {name}"),
            text.as_str().unwrap_or_default().escape_debug().to_string(),
        ));
    }
    about.extend(labels_lines(value));
    about.push(line("parameters", output::count(number(value, "parameters"))));
    about.push(line("bytes", output::size(number(value, "bytes"))));
    for (dtype, bytes) in value["dtypes"].as_object().into_iter().flatten() {
        about.push(line(&format!("of {dtype}"), output::size(bytes.as_u64().unwrap_or(0))));
    }
    let mut lines = vec![head(&["tensor", "dtype", ">shape", ">bytes"])];
    for tensor in list(value, "tensors") {
        lines.push(vec![
            string(tensor, "name"),
            string(tensor, "dtype"),
            shape(tensor, "shape"),
            output::size(number(tensor, "bytes")),
        ]);
    }
    format!("{}\n{}", output::table(&about), output::table(&lines))
}
