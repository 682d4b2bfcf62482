//! A method of a study with its variants.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use randlora::adapters::RandLora;
use randlora::io::{Access, Checkpoint};
use randlora::models::{Bert, BertLoad};
use randlora::nn::Module;
use randlora::{Device, Result};

use crate::cli::method::{BasesName, MethodName, Scale};
use crate::cli::targets;

/// The methods of a study: all but aTLAS, which combines models that a study does not have.
pub(super) fn methods() -> impl Iterator<Item = MethodName> {
    MethodName::value_variants().iter().copied().filter(|method| *method != MethodName::Atlas)
}

/// A method; for RandLoRA also its bases and its scale, as in `randlora:block@peft`.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    text: String,
    pub(super) method: MethodName,
    bases: Option<String>,
    scale: Option<String>,
}

impl FromStr for Entry {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Entry, String> {
        let (rest, scale) = text.split_once('@').map_or((text, None), |(rest, scale)| (rest, Some(scale)));
        let (name, bases) = rest.split_once(':').map_or((rest, None), |(name, bases)| (name, Some(bases)));
        if name == MethodName::Atlas.name() {
            return Err("atlas needs task vectors, which a study has none of: use finetune".into());
        }
        let Some(method) = methods().find(|method| method.name() == name) else {
            let names: Vec<&str> = methods().map(MethodName::name).collect();
            return Err(format!("there is no method `{name}` among: {}", names.join(", ")));
        };
        if let Some(scale) = scale {
            scale.parse::<Scale>()?;
        }
        match bases.map(|bases| BasesName::from_str(bases, false)) {
            Some(Err(error)) => return Err(format!("`{text}`: bases: {error}")),
            Some(Ok(_)) if method != MethodName::Randlora => {
                return Err(format!("`{text}`: {name} has no bases"));
            }
            _ => {}
        }
        let [bases, scale] = [bases, scale].map(|part| part.map(String::from));
        Ok(Entry { text: text.into(), method, bases, scale })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Learning rates to choose from.
const RATES: [f64; 9] = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1];

impl Entry {
    /// The arguments of `finetune` for it, without those of every method.
    pub(super) fn arguments(&self, rank: Option<usize>) -> Vec<String> {
        let rank = rank.map(|rank| rank.to_string());
        [("--bases", &self.bases), ("--scale", &self.scale), ("--rank", &rank)]
            .into_iter()
            .filter_map(|(name, value)| Some([name.to_string(), value.clone()?]))
            .chain([["--method".into(), self.method.name().into()]])
            .flatten()
            .collect()
    }

    /// The learning rates to try where none are asked for: the method's default and its neighbours.
    pub(super) fn rates(&self) -> Vec<f64> {
        let scale = self.scale.as_deref().and_then(|scale| scale.parse().ok()).unwrap_or_default();
        let default = MethodName::learning_rate(self.method.name(), scale);
        let near = |rate: &&f64| (0.25..4.0).contains(&(*rate / default));
        RATES.iter().filter(near).copied().collect()
    }

    /// Whether its rank is the one that trains as many numbers as RandLoRA.
    fn is_low_rank(&self) -> bool {
        matches!(self.method, MethodName::Lora | MethodName::Rslora | MethodName::Dora | MethodName::Pissa)
    }
}

/// The ranks of the methods.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ranks {
    randlora: usize,
    lora: usize,
}

impl Ranks {
    /// RandLoRA's, and that of LoRA and its like with as many trained numbers in the layers that `targets` means.
    ///
    /// # Errors
    /// As opening the model.
    pub(super) fn of(checkpoint: &Checkpoint, targets: &str, randlora: usize) -> Result<Ranks> {
        let (model, _) = Bert::load(checkpoint, BertLoad { labels: None, seed: 0 }, &Device::cpu())?;
        let linears = model.linears();
        let names: Vec<String> = linears.iter().map(|(name, _)| name.clone()).collect();
        let targets = targets::parse(targets, &names)?;
        let sizes = linears.iter().filter(|(name, _)| targets.matches(name) && name != "classifier");
        let sizes: Vec<[usize; 2]> = sizes.map(|(_, layer)| [layer.inputs(), layer.outputs()]).collect();
        let method = RandLora { rank: randlora, ..RandLora::default() };
        let trained: usize = sizes.iter().map(|[inputs, outputs]| method.trained(*inputs, *outputs)).sum();
        let each: usize = sizes.iter().flatten().sum();
        let lora = (trained as f64 / each.max(1) as f64).round().max(1.0);
        let more = 100.0 * (lora * each as f64 / trained.max(1) as f64 - 1.0);
        if more.abs() > 5.0 {
            eprintln!(
                "note: LoRA of rank {lora} trains {more:+.0} % of RandLoRA's numbers: no rank is nearer"
            );
        }
        Ok(Ranks { randlora, lora: lora as usize })
    }

    /// Of a method; None for its default.
    pub(super) fn rank(&self, entry: &Entry) -> Option<usize> {
        match entry.method {
            MethodName::Randlora => Some(self.randlora),
            _ if entry.is_low_rank() => Some(self.lora),
            _ => None,
        }
    }
}

/// Opens a model's folder without reading its tensors.
pub(super) fn open(folder: &std::path::Path) -> Result<Checkpoint> {
    Checkpoint::open(folder, Access::Map)
}
