//! adapter_config.json.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::adapters::Targets;
use crate::error::Result;
use crate::io::files::write_whole;
use crate::io::json::Object;
use crate::io::peft::form::Form;
use crate::io::peft::kind::Kind;
use crate::io::peft::masks::{self, Masks};
use crate::io::peft::pattern;
use crate::ops::dropout::check_rate;

/// Which of the model's biases are trained beside the adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Biases {
    /// None of them.
    #[default]
    None,
    /// Those of the adapted layers: `lora_only`, `randlora_only` or `vera_only` in PEFT.
    Adapted,
    /// All of them.
    All,
}

/// What this crate reads of an adapter_config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftConfig {
    /// r.
    pub rank: usize,
    /// s: alpha/r; alpha/√r where the configuration says `use_rslora`.
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
    /// The method, and what it alone has.
    pub(super) kind: Kind,
    /// The triplets that AdaLoRA has left, where it has chosen them.
    pub(super) kept: Masks,
    /// Whether the file holds what all layers share.
    pub(super) stored: bool,
    /// All that the file says, also what is not read here.
    pub(super) fields: Map<String, Value>,
}

impl PeftConfig {
    /// The settings of an adapter that is about to be written.
    pub(super) fn new(kind: Kind, rank: usize, scale: f64, dropout: f64) -> PeftConfig {
        PeftConfig {
            rank,
            scale,
            layers: BTreeMap::new(),
            dropout,
            base_model: None,
            targets: vec![],
            modules: vec![],
            biases: Biases::None,
            kind,
            kept: Masks::new(),
            stored: true,
            fields: Map::new(),
        }
    }

    pub(super) fn read(path: &Path) -> Result<PeftConfig> {
        let file = Object::read(path)?;
        let kind = Kind::read(&file)?;
        let form = kind.form();
        check_settings(&file, form)?;
        let rank = file.needed(form.rank, file.size(form.rank)?)?;
        if rank == 0 {
            return Err(file.error(format!("`{}` is 0: the rank is at least 1", form.rank)));
        }
        let scale = match form.alpha {
            Some((alpha, divisor)) => {
                let alpha = file.needed(alpha, file.number(alpha)?)?;
                alpha / divisor.of(rank, file.flag("use_rslora")?.unwrap_or(false))
            }
            None => 1.0,
        };
        let rate = file.number(form.dropout)?.unwrap_or(0.0);
        check_rate(rate).map_err(|error| file.error(format!("`{}`: {error}", form.dropout)))?;
        let names = |name| -> Result<Vec<String>> {
            Ok(file.texts(name)?.unwrap_or_default().into_iter().map(String::from).collect())
        };
        Ok(PeftConfig {
            base_model: file.text("base_model_name_or_path")?.map(String::from),
            targets: match file.get("target_modules") {
                Some(Value::Array(_)) => names("target_modules")?,
                _ => vec![],
            },
            modules: names("modules_to_save")?,
            biases: biases(&file, form)?,
            stored: file.flag("save_projection")?.unwrap_or(true),
            fields: file.fields().clone(),
            ..PeftConfig::new(kind, rank, scale, rate)
        })
    }

    /// The method's name, as in `randlora` or `lora`.
    pub fn method(&self) -> &'static str {
        self.form().method
    }

    /// How PEFT stores the method.
    pub(super) fn form(&self) -> &'static Form {
        self.kind.form()
    }

    /// The rank and the scale of a layer that the configuration knows of.
    pub(super) fn of(&self, layer: &str) -> (usize, f64) {
        self.layers.get(layer).copied().unwrap_or((self.rank, self.scale))
    }

    /// Notes the layers for which the configuration says something else.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for patterns that are not understood.
    pub(super) fn resolve(&mut self, what: String, layers: &[String]) -> Result<()> {
        let (file, form) = (Object::of(what, self.fields.clone()), self.form());
        if let Kind::AdaLora(_) = self.kind {
            self.kept = masks::read(&file, layers, self.rank)?;
            let ranks =
                self.kept.iter().map(|(layer, kept)| (layer, kept.iter().filter(|&&kept| kept).count()));
            self.layers = ranks.map(|(layer, rank)| (layer.clone(), (rank, self.scale))).collect();
        }
        if let (true, Some((alpha, divisor))) = (form.patterns, form.alpha) {
            let rslora = file.flag("use_rslora")?.unwrap_or(false);
            let alpha = file.number(alpha)?.unwrap_or(self.scale * divisor.of(self.rank, rslora));
            for (layer, (rank, alpha)) in pattern::resolve(&file, layers, (self.rank, alpha))? {
                let own = (rank, alpha / divisor.of(rank, rslora));
                if own != (self.rank, self.scale) {
                    self.layers.insert(layer, own);
                }
            }
        }
        Ok(())
    }

    /// Writes a configuration that PEFT reads, all values but these at PEFT's defaults.
    pub(super) fn write(&self, path: &Path, task: Option<&str>) -> Result<()> {
        let form = self.form();
        let mut config = self.kind.fields(self);
        let common = json!({
            "base_model_name_or_path": self.base_model,
            "bias": self.bias(),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "modules_to_save": self.modules_to_save(),
            "peft_type": form.kind,
            "revision": null,
            "target_modules": self.targets,
            "task_type": task,
            form.rank: self.rank,
            form.dropout: self.dropout,
        });
        if let Value::Object(common) = common {
            config.extend(common);
        }
        config.extend(form.alpha.map(|(name, _)| (name.into(), self.alpha_of(self.rank, self.scale))));
        write_json(path, &Value::Object(config))
    }

    /// The alpha whose quotient by what the rank divides by is the scale, to the last bit if there is one. PEFT
    /// declares it as an integer; other values work, but stay rare this way.
    pub(super) fn alpha_of(&self, rank: usize, scale: f64) -> Value {
        let divisor = self.form().alpha.map_or(1.0, |(_, divisor)| divisor.of(rank, false));
        let alpha = scale * divisor;
        let near = [alpha.round(), alpha, alpha.next_up(), alpha.next_down()];
        let alpha = near.into_iter().find(|alpha| alpha / divisor == scale).unwrap_or(alpha);
        if alpha as i64 as f64 == alpha { json!(alpha as i64) } else { json!(alpha) }
    }

    /// Writes the configuration as it was read, but for what a training has changed: the modules that are trained
    /// whole, and the triplets that AdaLoRA has left.
    pub(super) fn rewrite(&self, path: &Path, now: &PeftConfig) -> Result<()> {
        let (mut fields, modules) = (self.fields.clone(), &now.modules);
        if !now.kept.is_empty() {
            fields.insert("rank_pattern".into(), masks::to_json(&now.kept));
        }
        let named = Targets::Names(self.modules.clone());
        // The module itself, or one that it lies within.
        let known = |module: &String| {
            let mut ends = module.match_indices('.').map(|(i, _)| i).chain([module.len()]);
            ends.any(|end| named.matches(&module[..end]))
        };
        if !modules.iter().all(known) {
            let config = PeftConfig { modules: modules.clone(), ..self.clone() };
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
            Biases::Adapted => self.form().biases.into(),
            Biases::All => "all".into(),
        }
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    write_whole(path, |out| writeln!(out, "{text}"))
}

fn biases(file: &Object, form: &Form) -> Result<Biases> {
    match file.text("bias")? {
        None | Some("none") => Ok(Biases::None),
        Some("all") => Ok(Biases::All),
        Some(other) if other == form.biases => Ok(Biases::Adapted),
        Some(other) => Err(file.error(format!(
            "`bias` is \"{other}\", which is not known here; known are none, all and {}",
            form.biases
        ))),
    }
}

/// An error for a setting that changes what is computed in a way that is not known here: what the form does not
/// list must have a value that means "no" (null, false, nothing in it), for PEFT adds variants with every release.
fn check_settings(file: &Object, form: &Form) -> Result<()> {
    for (name, value) in file.fields() {
        let means_no = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        };
        if !means_no && !form.knows(name) {
            let message = format!("`{name}` is {value}, which is not supported here: train without it");
            return Err(file.error(message));
        }
    }
    Ok(())
}
