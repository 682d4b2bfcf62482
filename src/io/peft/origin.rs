//! What bases follow from, as JSON in a file's metadata: the fields are described at `save_compact`.

use std::str::FromStr;

use serde_json::{Value, json};

use crate::adapters::{BasesOrigin, BasesSpec, Distribution, TorchBases, TorchDraw};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::json::Object;
use crate::ops::randlora::{Pairing, Structure};

/// The origin as JSON.
pub(super) fn to_json(origin: &BasesOrigin) -> Result<Value> {
    match origin {
        BasesOrigin::Spec(spec) => {
            let BasesSpec { seed, rank, small, large, .. } = *spec;
            let mut value = json!({
                "from": "randlora", "seed": seed.to_string(),
                "structure": match spec.structure { Structure::Dense => "dense", Structure::Block => "block" },
                "rank": rank, "small": small, "large": large,
                "pairing": match spec.pairing { Pairing::Paper => "paper", Pairing::Peft => "peft" },
            });
            value["distribution"] = match spec.distribution {
                Distribution::Uniform => json!("uniform"),
                Distribution::Normal => json!("normal"),
                Distribution::Ternary { sparsity } => {
                    value["sparsity"] = json!(sparsity.to_string());
                    json!("ternary")
                }
            };
            Ok(value)
        }
        BasesOrigin::Torch(TorchBases { key, draw, rank, small, large }) => Ok(json!({
            "from": "torch", "seed": key.to_string(), "draw": draw_name(*draw)?,
            "rank": rank, "small": small, "large": large,
        })),
    }
}

fn draw_name(draw: TorchDraw) -> Result<&'static str> {
    Ok(match draw {
        TorchDraw::Uniform(DType::BF16) => "bf16",
        TorchDraw::Uniform(DType::F16) => "f16",
        TorchDraw::Uniform(other) => {
            return Err(Error::config("draw", format!("PEFT draws in bf16 or f16, not in {other}")));
        }
        TorchDraw::Sparse => "sparse",
        TorchDraw::VerySparse => "very_sparse",
    })
}

/// The origin out of JSON.
///
/// # Errors
/// [`Error::Data`] for a field that is missing or says what is not known here.
pub(super) fn from_json(file: &Object) -> Result<BasesOrigin> {
    let size = |name| file.needed(name, file.size(name)?);
    let (rank, small, large) = (size("rank")?, size("small")?, size("large")?);
    let key = number(file, "seed")?;
    match choice(file, "from")? {
        "randlora" => {
            let structure = match choice(file, "structure")? {
                "dense" => Structure::Dense,
                "block" => Structure::Block,
                other => return Err(unknown(file, "structure", other)),
            };
            let distribution = match choice(file, "distribution")? {
                "uniform" => Distribution::Uniform,
                "normal" => Distribution::Normal,
                "ternary" => Distribution::Ternary { sparsity: number(file, "sparsity")? },
                other => return Err(unknown(file, "distribution", other)),
            };
            let pairing = match choice(file, "pairing")? {
                "paper" => Pairing::Paper,
                "peft" => Pairing::Peft,
                other => return Err(unknown(file, "pairing", other)),
            };
            let spec = BasesSpec { seed: key, distribution, structure, rank, small, large, pairing };
            Ok(BasesOrigin::Spec(spec))
        }
        "torch" => {
            let draw = match choice(file, "draw")? {
                "bf16" => TorchDraw::Uniform(DType::BF16),
                "f16" => TorchDraw::Uniform(DType::F16),
                "sparse" => TorchDraw::Sparse,
                "very_sparse" => TorchDraw::VerySparse,
                other => return Err(unknown(file, "draw", other)),
            };
            Ok(BasesOrigin::Torch(TorchBases { key, draw, rank, small, large }))
        }
        other => Err(unknown(file, "from", other)),
    }
}

fn choice<'a>(file: &'a Object, name: &str) -> Result<&'a str> {
    file.needed(name, file.text(name)?)
}

/// A number that is written as a text.
pub(super) fn number<T: FromStr>(file: &Object, name: &str) -> Result<T> {
    let text = choice(file, name)?;
    text.parse().map_err(|_| file.error(format!("`{name}` is \"{text}\", which is no such number")))
}

fn unknown(file: &Object, name: &str, value: &str) -> Error {
    file.error(format!("`{name}` is {value}, which this version does not know: update the program"))
}
