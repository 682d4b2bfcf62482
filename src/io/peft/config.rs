//! adapter_config.json.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::Result;
use crate::io::files::write_whole;
use crate::io::json::Object;
use crate::ops::dropout::check_rate;

/// What this crate reads of an adapter_config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftConfig {
    /// `randlora` or `lora`.
    pub method: &'static str,
    /// r.
    pub rank: usize,
    /// s = alpha/r; alpha/√r where the configuration says `use_rslora`.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// The model that the adapter was made for, if the file says so.
    pub base_model: Option<String>,
    /// The layers that are adapted, by names or their last parts; empty where the file has a pattern,
    /// which is not looked at.
    pub targets: Vec<String>,
    /// The modules that are trained whole, among them PEFT's usual names that the model may not have.
    pub modules: Vec<String>,
}

/// Settings that change nothing of what is computed, or that are read here. What is not listed must have a
/// value that means "no" (null, false, nothing in it): PEFT adds variants with every release.
const KNOWN: [&str; 30] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "loftq_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "projection_prng_key",
    "qalora_group_size",
    "r",
    "randlora_alpha",
    "randlora_dropout",
    "revision",
    "runtime_config",
    "save_projection",
    "sparse",
    "target_modules",
    "task_type",
    "use_rslora",
    "very_sparse",
];

impl PeftConfig {
    pub(super) fn read(path: &Path) -> Result<PeftConfig> {
        let file = Object::read(path)?;
        let kind = file.needed("peft_type", file.text("peft_type")?)?;
        let (method, alpha, dropout) = match kind {
            "RANDLORA" => ("randlora", "randlora_alpha", "randlora_dropout"),
            "LORA" => ("lora", "lora_alpha", "lora_dropout"),
            _ => {
                return Err(
                    file.error(format!("peft_type {kind} is not known here; known are RANDLORA and LORA"))
                );
            }
        };
        check_settings(&file)?;
        if file.flag("save_projection")? == Some(false) {
            let message = "`save_projection` is false, but PEFT's random numbers are not the same on every \
                           machine: save the adapter with `save_projection=True`";
            return Err(file.error(message));
        }
        let rank = file.needed("r", file.size("r")?)?;
        if rank == 0 {
            return Err(file.error("`r` is 0: the rank is at least 1"));
        }
        let alpha = file.needed(alpha, file.number(alpha)?)?;
        let rate = file.number(dropout)?.unwrap_or(0.0);
        check_rate(rate).map_err(|error| file.error(format!("`{dropout}`: {error}")))?;
        let rslora = file.flag("use_rslora")?.unwrap_or(false);
        let names = |name| -> Result<Vec<String>> {
            Ok(file.texts(name)?.unwrap_or_default().into_iter().map(String::from).collect())
        };
        Ok(PeftConfig {
            method,
            rank,
            scale: alpha / if rslora { (rank as f64).sqrt() } else { rank as f64 },
            dropout: rate,
            base_model: file.text("base_model_name_or_path")?.map(String::from),
            targets: match file.get("target_modules") {
                Some(Value::Array(_)) => names("target_modules")?,
                _ => vec![],
            },
            modules: names("modules_to_save")?,
        })
    }

    /// Writes a configuration that PEFT reads, all values but these at PEFT's defaults.
    pub(super) fn write(&self, path: &Path, task: Option<&str>) -> Result<()> {
        let alpha = self.alpha();
        // PEFT declares alpha as an integer; other values work, but stay rare this way.
        let alpha = match alpha as i64 as f64 == alpha {
            true => json!(alpha as i64),
            false => json!(alpha),
        };
        let modules = if self.modules.is_empty() { Value::Null } else { json!(self.modules) };
        let mut config = json!({
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "modules_to_save": modules,
            "peft_type": self.method.to_uppercase(),
            "r": self.rank,
            "revision": null,
            "target_modules": self.targets,
            "task_type": task,
        });
        let own = match self.method {
            "lora" => json!({
                "init_lora_weights": true,
                "lora_alpha": alpha,
                "lora_dropout": self.dropout,
                "use_dora": false,
                "use_rslora": false,
            }),
            _ => json!({
                "projection_prng_key": 0,
                "randlora_alpha": alpha,
                "randlora_dropout": self.dropout,
                "save_projection": true,
                "sparse": false,
                "very_sparse": false,
            }),
        };
        if let (Some(config), Value::Object(own)) = (config.as_object_mut(), own) {
            config.extend(own);
            if self.method == "lora" {
                config.remove("init_weights");
            }
        }
        let text = serde_json::to_string_pretty(&config).unwrap_or_default();
        write_whole(path, |out| writeln!(out, "{text}"))
    }
}

impl PeftConfig {
    /// The alpha whose quotient by the rank is the scale, to the last bit if there is one.
    fn alpha(&self) -> f64 {
        let (rank, alpha) = (self.rank as f64, self.scale * self.rank as f64);
        let near = [alpha.round(), alpha, alpha.next_up(), alpha.next_down()];
        near.into_iter().find(|alpha| alpha / rank == self.scale).unwrap_or(alpha)
    }
}

/// An error for a setting that changes what is computed in a way that is not known here.
fn check_settings(file: &Object) -> Result<()> {
    for (name, value) in file.fields() {
        let means_no = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            Value::String(text) => name == "bias" && text == "none",
            _ => false,
        };
        if !means_no && !KNOWN.contains(&name.as_str()) {
            let message = format!("`{name}` is {value}, which is not supported here: train without it");
            return Err(file.error(message));
        }
    }
    // The others subtract their start from the weight that the adapter is then added to.
    match file.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(text)) if ["gaussian", "eva", "orthogonal"].contains(&text.as_str()) => Ok(()),
        Some(value) => Err(file.error(format!(
            "`init_lora_weights` is {value}, which changes the model's own weights: convert the adapter to \
             plain LoRA with PEFT's `path_initial_model_for_weight_conversion`"
        ))),
    }
}
