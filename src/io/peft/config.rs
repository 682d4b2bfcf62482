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
}

/// Settings that change what is computed, with the values at which they change nothing (null and a
/// missing setting never do).
const NEUTRAL: [(&str, &str); 10] = [
    ("bias", "\"none\""),
    ("fan_in_fan_out", "false"),
    ("use_dora", "false"),
    ("lora_bias", "false"),
    ("use_qalora", "false"),
    ("rank_pattern", "{}"),
    ("alpha_pattern", "{}"),
    ("target_parameters", "[]"),
    ("layer_replication", "[]"),
    ("trainable_token_indices", "[]"),
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
        for (name, neutral) in NEUTRAL {
            let Some(value) = file.get(name).map(Value::to_string) else { continue };
            if value != neutral {
                let message = format!("`{name}` is {value}, which is not supported: only {neutral} is");
                return Err(file.error(message));
            }
        }
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
        Ok(PeftConfig {
            method,
            rank,
            scale: alpha / if rslora { (rank as f64).sqrt() } else { rank as f64 },
            dropout: rate,
            base_model: file.text("base_model_name_or_path")?.map(String::from),
        })
    }

    /// Writes a configuration that PEFT reads, all values but these at PEFT's defaults.
    pub(super) fn write(
        &self,
        path: &Path,
        targets: &[String],
        modules: &[String],
        task: Option<&str>,
    ) -> Result<()> {
        let alpha = self.scale * self.rank as f64;
        // PEFT declares alpha as an integer; other values work, but stay rare this way.
        let alpha =
            if (alpha - alpha.round()).abs() < 1e-9 { json!(alpha.round() as i64) } else { json!(alpha) };
        let modules = if modules.is_empty() { Value::Null } else { json!(modules) };
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
            "target_modules": targets,
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
