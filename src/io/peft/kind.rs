//! What a configuration says of one method alone.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::adapters::TorchDraw;
use crate::dtype::DType;
use crate::error::Result;
use crate::io::json::Object;
use crate::io::peft::PeftConfig;
use crate::io::peft::form::{Form, LORA, RANDLORA};

/// A method with the settings that it alone has.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// RandLoRA, with the seed and the kind of the bases that PEFT draws where the file holds none.
    RandLora(Option<(u64, TorchDraw)>),
    /// LoRA.
    Lora,
}

impl Kind {
    /// How PEFT stores the method.
    pub(super) fn form(&self) -> &'static Form {
        match self {
            Kind::RandLora(_) => &RANDLORA,
            Kind::Lora => &LORA,
        }
    }

    /// Reads what a configuration says.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for a method or a variant of one that is not computed here.
    pub(super) fn read(file: &Object) -> Result<Kind> {
        match file.needed("peft_type", file.text("peft_type")?)? {
            "RANDLORA" => Ok(Kind::RandLora(Some((key(file)?, draw(file)?)))),
            "LORA" => lora(file),
            kind => {
                Err(file.error(format!("peft_type {kind} is not known here; known are RANDLORA and LORA")))
            }
        }
    }

    /// The settings as PEFT writes them.
    pub(super) fn fields(&self, config: &PeftConfig) -> Map<String, Value> {
        let fields = match self {
            Kind::Lora => {
                let exact = |(name, (rank, scale)): (&String, &(usize, f64))| {
                    (format!("^{name}"), (*rank, config.alpha_of(*rank, *scale)))
                };
                let layers: BTreeMap<String, (usize, Value)> = config.layers.iter().map(exact).collect();
                let ranks: Map<String, Value> =
                    layers.iter().map(|(name, (rank, _))| (name.clone(), json!(rank))).collect();
                let alphas: Map<String, Value> =
                    layers.into_iter().map(|(name, (_, alpha))| (name, alpha)).collect();
                json!({
                    "alpha_pattern": alphas,
                    "init_lora_weights": true,
                    "rank_pattern": ranks,
                    "use_dora": false,
                    "use_rslora": false,
                })
            }
            Kind::RandLora(draw) => json!({
                "init_weights": true,
                "projection_prng_key": draw.map_or(0, |(key, _)| key as i64),
                "save_projection": true,
                "sparse": draw.is_some_and(|(_, draw)| draw == TorchDraw::Sparse),
                "very_sparse": draw.is_some_and(|(_, draw)| draw == TorchDraw::VerySparse),
            }),
        };
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}

/// The variant of LoRA. Some ways to start subtract their start from the weight that the adapter is then added to.
fn lora(file: &Object) -> Result<Kind> {
    match file.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(Kind::Lora),
        Some(Value::String(text)) if ["gaussian", "eva", "orthogonal"].contains(&text.as_str()) => {
            Ok(Kind::Lora)
        }
        Some(value) => Err(file.error(format!(
            "`init_lora_weights` is {value}, which changes the model's own weights: convert the adapter to \
             plain LoRA with PEFT's `path_initial_model_for_weight_conversion`"
        ))),
    }
}

/// The seed of what PEFT draws.
fn key(file: &Object) -> Result<u64> {
    match file.get("projection_prng_key") {
        None => Ok(0),
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(key), _) => Ok(key),
            (None, Some(key)) => Ok(key as u64),
            (None, None) => {
                let message = format!("`projection_prng_key` is {value}, not a number without fraction");
                Err(file.error(message))
            }
        },
    }
}

/// The kind of RandLoRA's bases.
fn draw(file: &Object) -> Result<TorchDraw> {
    let flag = |name| Ok(file.flag(name)?.unwrap_or(false));
    Ok(match (flag("very_sparse")?, flag("sparse")?) {
        (true, _) => TorchDraw::VerySparse,
        (false, true) => TorchDraw::Sparse,
        (false, false) => TorchDraw::Uniform(DType::BF16),
    })
}
