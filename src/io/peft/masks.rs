//! AdaLoRA's `rank_pattern`: which of a layer's triplets are left. The file holds those alone.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::io::json::Object;

/// The triplets that are left, by the names of the layers.
pub(super) type Masks = BTreeMap<String, Vec<bool>>;

const E: &str = ".lora_E";

/// Reads the masks of these layers, of `first` triplets each.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) for a list of another length or of a layer that is not there.
pub(super) fn read(file: &Object, layers: &[String], first: usize) -> Result<Masks> {
    let Some(patterns) = file.object("rank_pattern")? else { return Ok(Masks::new()) };
    let one = |(name, value): (&String, &Value)| {
        let fail = |message: String| file.error(format!("`rank_pattern`: `{name}` {message}"));
        let layer = name.strip_suffix(".default").unwrap_or(name).strip_suffix(E);
        let Some(layer) = layer.filter(|layer| layers.iter().any(|other| other == layer)) else {
            return Err(fail("is no adapted layer of the file".into()));
        };
        let mask: Option<Vec<bool>> =
            value.as_array().and_then(|mask| mask.iter().map(Value::as_bool).collect());
        match mask {
            Some(mask) if mask.len() == first => Ok((layer.to_string(), mask)),
            _ => Err(fail(format!("is no list of `init_r`, {first}, times true or false"))),
        }
    };
    patterns.fields().iter().map(one).collect()
}

/// The masks as PEFT writes them.
pub(super) fn to_json(masks: &Masks) -> Value {
    let fields: Map<String, Value> =
        masks.iter().map(|(layer, mask)| (format!("{layer}{E}"), json!(mask))).collect();
    if fields.is_empty() { Value::Null } else { Value::Object(fields) }
}
