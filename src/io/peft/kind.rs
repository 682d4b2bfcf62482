//! What a configuration says of one method alone.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::adapters::{AdaLora, TorchDraw};
use crate::dtype::DType;
use crate::error::Result;
use crate::io::json::Object;
use crate::io::peft::PeftConfig;
use crate::io::peft::form::{ADALORA, DORA, Form, LORA, PISSA, RANDLORA, VERA};
use crate::io::peft::masks;

/// A method with the settings that it alone has.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// RandLoRA, with the seed and the kind of the bases that PEFT draws where the file holds none.
    RandLora(Option<(u64, TorchDraw)>),
    /// LoRA.
    Lora,
    /// DoRA.
    Dora,
    /// PiSSA.
    Pissa,
    /// VeRA, with what λ_d starts at and the seed of the matrices that PEFT draws where the file holds none.
    Vera { d_initial: f64, key: u64 },
    /// AdaLoRA, with its settings but r₀, the scale and the dropout.
    AdaLora(AdaLora),
}

impl Kind {
    /// How PEFT stores the method.
    pub(super) fn form(&self) -> &'static Form {
        match self {
            Kind::RandLora(_) => &RANDLORA,
            Kind::Lora => &LORA,
            Kind::Dora => &DORA,
            Kind::Pissa => &PISSA,
            Kind::Vera { .. } => &VERA,
            Kind::AdaLora(_) => &ADALORA,
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
            "VERA" => Ok(Kind::Vera { d_initial: file.number("d_initial")?.unwrap_or(0.1), key: key(file)? }),
            "ADALORA" => adalora(file),
            kind => Err(file.error(format!(
                "peft_type {kind} is not known here; known are RANDLORA, LORA, VERA and ADALORA"
            ))),
        }
    }

    /// The settings as PEFT writes them.
    pub(super) fn fields(&self, config: &PeftConfig) -> Map<String, Value> {
        let fields = match self {
            Kind::Lora | Kind::Dora | Kind::Pissa => {
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
                    "init_lora_weights": if *self == Kind::Pissa { json!("pissa") } else { json!(true) },
                    "rank_pattern": ranks,
                    "use_dora": *self == Kind::Dora,
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
            Kind::Vera { d_initial, key } => json!({
                "d_initial": d_initial,
                "init_weights": true,
                "projection_prng_key": *key as i64,
                "save_projection": true,
            }),
            Kind::AdaLora(settings) => json!({
                "beta1": settings.beta1,
                "beta2": settings.beta2,
                "deltaT": settings.interval,
                "init_lora_weights": true,
                "orth_reg_weight": settings.orthogonality,
                "rank_pattern": masks::to_json(&config.kept),
                "target_r": settings.rank,
                "tfinal": settings.fixed,
                "tinit": settings.warmup,
                "total_step": settings.steps,
            }),
        };
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}

/// The variant of LoRA, by how it starts: some ways subtract their start from the weight that the adapter is then
/// added to. PiSSA's follows from the weight alone, and PEFT finds it anew whenever it loads an adapter.
fn lora(file: &Object) -> Result<Kind> {
    let dora = file.flag("use_dora")?.unwrap_or(false);
    let start = match file.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => "usual",
        Some(Value::String(text)) if ["gaussian", "eva", "orthogonal"].contains(&text.as_str()) => "usual",
        Some(value) => value.as_str().unwrap_or_default(),
    };
    let what = match (start, dora) {
        ("usual", true) => return Ok(Kind::Dora),
        ("usual", false) => return Ok(Kind::Lora),
        ("pissa", false) => return Ok(Kind::Pissa),
        ("pissa", true) => "which is not computed here together with `use_dora`",
        (start, _) if start.starts_with("pissa_niter_") => {
            "whose start is an approximation that PEFT draws anew whenever it loads the adapter"
        }
        _ => "which changes the model's own weights",
    };
    let value = file.get("init_lora_weights").unwrap_or(&Value::Null);
    Err(file.error(format!(
        "`init_lora_weights` is {value}, {what}: convert the adapter to plain LoRA with PEFT's \
         `path_initial_model_for_weight_conversion`"
    )))
}

/// AdaLoRA's settings; PEFT's defaults for those that are missing.
fn adalora(file: &Object) -> Result<Kind> {
    // PEFT takes the rank then.
    if file.number("lora_alpha")?.is_some_and(|alpha| alpha <= 0.0) {
        return Err(
            file.error("`lora_alpha` is not above 0, which AdaLoRA does not divide: train with another")
        );
    }
    let size = |name, default| Ok(file.size(name)?.unwrap_or(default));
    let number = |name, default| Ok(file.number(name)?.unwrap_or(default));
    Ok(Kind::AdaLora(AdaLora {
        rank: size("target_r", 8)?,
        warmup: size("tinit", 0)?,
        fixed: size("tfinal", 0)?,
        interval: size("deltaT", 1)?,
        beta1: number("beta1", 0.85)?,
        beta2: number("beta2", 0.85)?,
        orthogonality: number("orth_reg_weight", 0.5)?,
        ..AdaLora::over(file.needed("total_step", file.size("total_step")?)?)
    }))
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
