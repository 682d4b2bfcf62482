//! adapter_config.json.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::adapters::{Targets, TorchDraw};
use crate::dtype::DType;
use crate::error::Result;
use crate::io::files::write_whole;
use crate::io::json::Object;
use crate::io::peft::pattern;
use crate::ops::dropout::check_rate;

/// Which of the model's biases are trained beside the adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Biases {
    /// None of them.
    #[default]
    None,
    /// Those of the adapted layers: `lora_only` or `randlora_only` in PEFT.
    Adapted,
    /// All of them.
    All,
}

/// What this crate reads of an adapter_config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftConfig {
    /// `randlora` or `lora`.
    pub method: &'static str,
    /// r.
    pub rank: usize,
    /// s = alpha/r; alpha/√r where the configuration says `use_rslora`.
    pub scale: f64,
    /// The layers with another rank and scale, by name: PEFT's `rank_pattern` and `alpha_pattern`.
    pub layers: BTreeMap<String, (usize, f64)>,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// The model that the adapter was made for, if the file says so.
    pub base_model: Option<String>,
    /// The layers that are adapted, by names or their last parts; empty where the file has a pattern,
    /// which is not looked at.
    pub targets: Vec<String>,
    /// The modules that are trained whole, among them PEFT's usual names that the model may not have.
    pub modules: Vec<String>,
    /// Which biases are trained.
    pub biases: Biases,
    /// The seed and the kind of the bases that PEFT draws where the file holds none.
    pub(super) draw: Option<(u64, TorchDraw)>,
    /// Whether the file holds RandLoRA's bases.
    pub(super) stored: bool,
    /// All that the file says, also what is not read here.
    pub(super) fields: Map<String, Value>,
}

/// Settings that change nothing of what is computed, or that are read here. What is not listed must have a
/// value that means "no" (null, false, nothing in it): PEFT adds variants with every release.
/// `fan_in_fan_out` says how the model stores its weights; an adapter's tensors are the same either way.
const KNOWN: [&str; 34] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
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
    "rank_pattern",
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
    /// The settings of an adapter that is about to be written.
    pub(super) fn new(method: &'static str, rank: usize, scale: f64, dropout: f64) -> PeftConfig {
        PeftConfig {
            method,
            rank,
            scale,
            layers: BTreeMap::new(),
            dropout,
            base_model: None,
            targets: vec![],
            modules: vec![],
            biases: Biases::None,
            draw: None,
            stored: true,
            fields: Map::new(),
        }
    }

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
        let rank = file.needed("r", file.size("r")?)?;
        if rank == 0 {
            return Err(file.error("`r` is 0: the rank is at least 1"));
        }
        let alpha = file.needed(alpha, file.number(alpha)?)?;
        let rate = file.number(dropout)?.unwrap_or(0.0);
        check_rate(rate).map_err(|error| file.error(format!("`{dropout}`: {error}")))?;
        let names = |name| -> Result<Vec<String>> {
            Ok(file.texts(name)?.unwrap_or_default().into_iter().map(String::from).collect())
        };
        let draw = if method == "randlora" { Some(draw(&file)?) } else { None };
        Ok(PeftConfig {
            scale: alpha / divisor(rank, file.flag("use_rslora")?.unwrap_or(false)),
            base_model: file.text("base_model_name_or_path")?.map(String::from),
            targets: match file.get("target_modules") {
                Some(Value::Array(_)) => names("target_modules")?,
                _ => vec![],
            },
            modules: names("modules_to_save")?,
            biases: biases(&file)?,
            draw,
            stored: file.flag("save_projection")?.unwrap_or(true),
            fields: file.fields().clone(),
            ..PeftConfig::new(method, rank, 0.0, rate)
        })
    }

    /// The rank and the scale of a layer that the configuration knows of.
    pub(super) fn of(&self, layer: &str) -> (usize, f64) {
        self.layers.get(layer).copied().unwrap_or((self.rank, self.scale))
    }

    /// Notes the layers for which `rank_pattern` and `alpha_pattern` say something else.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for a pattern that is more than a name.
    pub(super) fn resolve(&mut self, what: String, layers: &[String]) -> Result<()> {
        let file = Object::of(what, self.fields.clone());
        let patterns = |name: &str| match file.get(name) {
            None => Ok(vec![]),
            Some(Value::Object(patterns)) => Ok(patterns.iter().collect()),
            Some(value) => Err(file.error(format!("`{name}` is {value}, not an object"))),
        };
        let (ranks, alphas) = (patterns("rank_pattern")?, patterns("alpha_pattern")?);
        if ranks.is_empty() && alphas.is_empty() {
            return Ok(());
        }
        let rslora = file.flag("use_rslora")?.unwrap_or(false);
        let alpha = file.number("lora_alpha")?.unwrap_or(self.scale * self.rank as f64);
        for layer in layers {
            // The first that matches counts, in the order of the file; another order of keys that mean the
            // same layer would be another adapter, so these must agree.
            let found = |name: &str, patterns: &[(&String, &Value)]| -> Result<Option<f64>> {
                let mut found: Option<f64> = None;
                for (pattern, value) in patterns {
                    let fail = |message: &str| file.error(format!("`{name}`: `{pattern}` {message}"));
                    let meant = pattern::matches(pattern, layer)
                        .ok_or_else(|| fail("is an expression: name the layers one by one"))?;
                    let value = value.as_f64().ok_or_else(|| fail("has no number"))?;
                    match found {
                        Some(other) if meant && other != value => {
                            return Err(fail(&format!("contradicts another pattern for `{layer}`")));
                        }
                        _ if meant => found = Some(value),
                        _ => {}
                    }
                }
                Ok(found)
            };
            let rank = found("rank_pattern", &ranks)?.unwrap_or(self.rank as f64);
            if !(rank >= 1.0 && rank.fract() == 0.0 && rank < u32::MAX as f64) {
                return Err(file.error(format!("`rank_pattern` gives `{layer}` the rank {rank}")));
            }
            let scale = found("alpha_pattern", &alphas)?.unwrap_or(alpha) / divisor(rank as usize, rslora);
            if (rank as usize, scale) != (self.rank, self.scale) {
                self.layers.insert(layer.clone(), (rank as usize, scale));
            }
        }
        Ok(())
    }

    /// Writes a configuration that PEFT reads, all values but these at PEFT's defaults.
    pub(super) fn write(&self, path: &Path, task: Option<&str>) -> Result<()> {
        let mut config = json!({
            "base_model_name_or_path": self.base_model,
            "bias": self.bias(),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "modules_to_save": self.modules_to_save(),
            "peft_type": self.method.to_uppercase(),
            "r": self.rank,
            "revision": null,
            "target_modules": self.targets,
            "task_type": task,
        });
        let own = match self.method {
            "lora" => {
                let exact = |(name, (rank, scale)): (&String, &(usize, f64))| {
                    (format!("^{name}"), (*rank, number(alpha(*rank, *scale))))
                };
                let layers: BTreeMap<String, (usize, Value)> = self.layers.iter().map(exact).collect();
                let ranks: Map<String, Value> =
                    layers.iter().map(|(name, (rank, _))| (name.clone(), json!(rank))).collect();
                let alphas: Map<String, Value> =
                    layers.into_iter().map(|(name, (_, alpha))| (name, alpha)).collect();
                json!({
                    "alpha_pattern": alphas,
                    "init_lora_weights": true,
                    "lora_alpha": number(alpha(self.rank, self.scale)),
                    "lora_dropout": self.dropout,
                    "rank_pattern": ranks,
                    "use_dora": false,
                    "use_rslora": false,
                })
            }
            _ => json!({
                "init_weights": true,
                "projection_prng_key": self.draw.map_or(0, |(key, _)| key as i64),
                "randlora_alpha": number(alpha(self.rank, self.scale)),
                "randlora_dropout": self.dropout,
                "save_projection": true,
                "sparse": self.draw.is_some_and(|(_, draw)| draw == TorchDraw::Sparse),
                "very_sparse": self.draw.is_some_and(|(_, draw)| draw == TorchDraw::VerySparse),
            }),
        };
        if let (Some(config), Value::Object(own)) = (config.as_object_mut(), own) {
            config.extend(own);
        }
        write_json(path, &config)
    }

    /// Writes the configuration as it was read, but with these modules trained whole if they are others.
    pub(super) fn rewrite(&self, path: &Path, modules: &[String]) -> Result<()> {
        let mut fields = self.fields.clone();
        let named = Targets::Names(self.modules.clone());
        // The module itself, or one that it lies within.
        let known = |module: &String| {
            let mut ends = module.match_indices('.').map(|(i, _)| i).chain([module.len()]);
            ends.any(|end| named.matches(&module[..end]))
        };
        if !modules.iter().all(known) {
            let config = PeftConfig { modules: modules.to_vec(), ..self.clone() };
            fields.insert("modules_to_save".into(), config.modules_to_save());
        }
        write_json(path, &Value::Object(fields))
    }

    fn modules_to_save(&self) -> Value {
        if self.modules.is_empty() { Value::Null } else { json!(self.modules) }
    }

    fn bias(&self) -> String {
        match self.biases {
            Biases::None => "none".into(),
            Biases::Adapted => format!("{}_only", self.method),
            Biases::All => "all".into(),
        }
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    write_whole(path, |out| writeln!(out, "{text}"))
}

/// What alpha is divided by.
fn divisor(rank: usize, rslora: bool) -> f64 {
    if rslora { (rank as f64).sqrt() } else { rank as f64 }
}

/// The alpha whose quotient by the rank is the scale, to the last bit if there is one.
fn alpha(rank: usize, scale: f64) -> f64 {
    let (rank, alpha) = (rank as f64, scale * rank as f64);
    let near = [alpha.round(), alpha, alpha.next_up(), alpha.next_down()];
    near.into_iter().find(|alpha| alpha / rank == scale).unwrap_or(alpha)
}

/// PEFT declares alpha as an integer; other values work, but stay rare this way.
fn number(alpha: f64) -> Value {
    if alpha as i64 as f64 == alpha { json!(alpha as i64) } else { json!(alpha) }
}

/// The seed and the kind of PEFT's bases.
fn draw(file: &Object) -> Result<(u64, TorchDraw)> {
    let key = match file.get("projection_prng_key") {
        None => 0,
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(key), _) => key,
            (None, Some(key)) => key as u64,
            (None, None) => {
                let message = format!("`projection_prng_key` is {value}, not a number without fraction");
                return Err(file.error(message));
            }
        },
    };
    let flag = |name| Ok(file.flag(name)?.unwrap_or(false));
    let draw = match (flag("very_sparse")?, flag("sparse")?) {
        (true, _) => TorchDraw::VerySparse,
        (false, true) => TorchDraw::Sparse,
        (false, false) => TorchDraw::Uniform(DType::BF16),
    };
    Ok((key, draw))
}

fn biases(file: &Object) -> Result<Biases> {
    match file.text("bias")? {
        None | Some("none") => Ok(Biases::None),
        Some("all") => Ok(Biases::All),
        Some("lora_only" | "randlora_only") => Ok(Biases::Adapted),
        Some(other) => Err(file.error(format!(
            "`bias` is \"{other}\", which is not known here; known are none, all, lora_only and randlora_only"
        ))),
    }
}

/// An error for a setting that changes what is computed in a way that is not known here.
fn check_settings(file: &Object) -> Result<()> {
    for (name, value) in file.fields() {
        let means_no = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
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
