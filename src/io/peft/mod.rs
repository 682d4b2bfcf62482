//! Adapter folders as Hugging Face PEFT writes and reads them: adapter_config.json and
//! adapter_model.safetensors.
//!
//! | tensor | shape |
//! |---|---|
//! | `base_model.model.<layer>.randlora_lambda`, `….randlora_gamma` | λ (r, n), γ (n, m) |
//! | `base_model.randlora_A`, `base_model.randlora_B`, once for all layers | (r, 1, MIN), (MAX, ⌈MIN/r⌉, r) |
//! | `base_model.model.<layer>.lora_A.weight`, `….lora_B.weight` | (r, in), (out, r) |
//! | `base_model.model.<parameter>` of a module that is trained whole | its own |
//!
//! MAX and MIN are the largest output and the largest input size of the adapted layers, put in order; a
//! layer reads A[:, :, :m] and B[:D, :n, :]. Files from before PEFT's change #3714 hold A and B once
//! for every layer: they are read if all are the same.

mod config;
mod save;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::adapters::{
    Attached, LayerInfo, Lora, LoraAdapter, Method, RandLora, RandLoraAdapter, Targets, attach,
};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::map::Access;
use crate::io::safetensors::SafeTensors;
use crate::nn::{ItemMut, LinearAdapter, Module, Parameter};
use crate::ops::randlora::{Bases, Pairing};
use crate::tensor::Tensor;

pub use config::PeftConfig;
pub use save::{PeftTask, save_peft};

const ROOT: &str = "base_model.";
const MODEL: &str = "base_model.model.";
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// An open adapter folder.
///
/// ```no_run
/// # fn run(model: &mut randlora::nn::Linear) -> randlora::Result<()> {
/// use randlora::io::PeftAdapter;
///
/// let adapter = PeftAdapter::open("sst2-adapter".as_ref())?;
/// println!("{} of rank {}", adapter.config().method, adapter.config().rank);
/// adapter.attach(model)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct PeftAdapter {
    config: PeftConfig,
    file: SafeTensors,
    /// The adapted layers, as the file calls them.
    layers: Vec<String>,
    /// The parameters of modules that are trained whole.
    whole: Vec<String>,
}

/// The ends of the names of an adapter's tensors.
fn parts(method: &str) -> [&'static str; 2] {
    match method {
        "lora" => [".lora_A.weight", ".lora_B.weight"],
        _ => [".randlora_lambda", ".randlora_gamma"],
    }
}

const BASES: [&str; 2] = ["randlora_A", "randlora_B"];

impl PeftAdapter {
    /// Opens a folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Data`] that name the file; among them an adapter of a method or with a
    /// setting that this crate does not compute.
    pub fn open(folder: &Path) -> Result<PeftAdapter> {
        let fail = |message: &str| Err(Error::data(folder.display().to_string(), message));
        if !folder.is_dir() {
            return fail("there is no such folder: an adapter is a folder with adapter_config.json");
        }
        if !folder.join(CONFIG).is_file() {
            return fail("adapter_config.json is missing: this is no adapter folder");
        }
        let config = PeftConfig::read(&folder.join(CONFIG))?;
        let file = SafeTensors::open(&folder.join(TENSORS), Access::Read)?;
        let (mut layers, mut whole) = (BTreeSet::new(), Vec::new());
        for (key, _) in file.entries() {
            if BASES.iter().any(|name| key.ends_with(name)) {
                continue;
            }
            let Some(name) = key.strip_prefix(MODEL) else {
                return Err(Error::data(file.what(), format!("`{key}` does not begin with `{MODEL}`")));
            };
            match parts(config.method).iter().find_map(|part| name.strip_suffix(part)) {
                Some(layer) => drop(layers.insert(layer.to_string())),
                None => whole.push(name.to_string()),
            }
        }
        if layers.is_empty() {
            return Err(Error::data(file.what(), format!("there is no layer adapted by {}", config.method)));
        }
        layers.iter().try_for_each(|layer| check_layer(layer, &config, &file))?;
        Ok(PeftAdapter { config, file, layers: layers.into_iter().collect(), whole })
    }

    /// What adapter_config.json says.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// The adapted layers, as the file calls them.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// The parameters that the file holds whole, a new classifier's say, with their sizes.
    pub fn whole(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.whole
            .iter()
            .filter_map(|name| Some((name.as_str(), &self.file.entry(&format!("{MODEL}{name}"))?.dims[..])))
    }

    /// An error about the adapter's tensors.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::data(self.file.what(), message)
    }

    /// Attaches the adapter to a model, whose other parameters are frozen. Layers are found by their
    /// names; all of them may lie within an inner model that the adapter was made for
    /// (`encoder.layer.0…` of a model that has `bert.encoder.layer.0…`).
    ///
    /// # Errors
    /// [`Error::NoMatch`] where the model lacks a layer or parameter, [`Error::Data`] where a tensor is
    /// missing or has another shape than the model needs; [`Error::Config`] where a layer has an adapter
    /// already.
    pub fn attach<M: Module + ?Sized>(&self, model: &mut M) -> Result<Attached> {
        let prefix = self.prefix(model)?;
        let values = self.whole_values(model, &prefix)?;
        let modules: BTreeSet<&str> = values.keys().map(|name| module_of(name)).collect();
        let modules: Vec<&str> = modules.into_iter().collect();
        let targets = self.layers.iter().map(|layer| format!("{prefix}{layer}")).collect();
        let method = Within { adapter: self, prefix: &prefix };
        let attached = attach(model, &method, &Targets::Names(targets), &modules)?;
        model.try_visit_mut(&mut |name, item| match (item, values.get(name)) {
            (ItemMut::Parameter(parameter), Some(value)) => parameter.replace(value.clone()),
            _ => Ok(()),
        })?;
        Ok(attached)
    }

    /// What the model's names begin with where the file's do not: one beginning for all of them.
    fn prefix<M: Module + ?Sized>(&self, model: &M) -> Result<String> {
        let available: Vec<String> = model.linears().into_iter().map(|(name, _)| name).collect();
        let lacks =
            |prefix: &str| self.layers.iter().find(|layer| !available.contains(&format!("{prefix}{layer}")));
        let Some(missing) = lacks("") else { return Ok(String::new()) };
        let inner = available.iter().filter_map(|name| name.strip_suffix(missing.as_str()));
        let mut fitting = inner.filter(|prefix| prefix.ends_with('.') && lacks(prefix).is_none());
        match (fitting.next(), fitting.next()) {
            (Some(prefix), None) => Ok(prefix.to_string()),
            (Some(_), Some(_)) => {
                let message = format!("`{missing}` may be one of several layers of the model");
                Err(self.error(message))
            }
            (None, _) => Err(Error::NoMatch { wanted: format!("`{missing}`"), available }),
        }
    }

    /// The values of the parameters that the file holds whole, by the model's names.
    fn whole_values<M: Module + ?Sized>(&self, model: &M, prefix: &str) -> Result<BTreeMap<String, Tensor>> {
        let parameters: BTreeMap<String, &Parameter> = model.parameters().into_iter().collect();
        let mut values = BTreeMap::new();
        for name in &self.whole {
            let Some(parameter) = parameters.get(&format!("{prefix}{name}")) else {
                let available = parameters.into_keys().collect();
                return Err(Error::NoMatch { wanted: format!("`{name}` of the adapter"), available });
            };
            let value = parameter.value();
            let dtype = if value.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let value = self.tensor(name, value.dims(), dtype, value.device())?;
            values.insert(format!("{prefix}{name}"), value);
        }
        // What is trained whole is saved whole, and what the configuration promises is there.
        let modules: BTreeSet<&str> = values.keys().map(|name| module_of(name)).collect();
        let promised = Targets::Names(self.config.modules.clone());
        let missing = |name: &&String| {
            let module = module_of(name);
            (modules.contains(module) || promised.matches(module)) && !values.contains_key(*name)
        };
        match parameters.keys().find(missing) {
            Some(name) => Err(self.error(format!("`{MODEL}{name}` is missing"))),
            None => Ok(values),
        }
    }

    /// The tensor of a name within the model, if it has these sizes.
    fn tensor(&self, name: &str, dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let value = self.file.tensor(&format!("{MODEL}{name}"), device)?;
        if value.dims() != dims {
            let message = format!("`{name}` is {:?} where the model needs {dims:?}", value.dims());
            return Err(self.error(message));
        }
        value.to_dtype(dtype)
    }

    /// The trained matrices of a layer by the names that they have in its adapter, as they are stored:
    /// `lambda` (r, n) and `gamma` (n, m), or `a` (r, in) and `b` (out, r).
    ///
    /// # Errors
    /// [`Error::Data`] where the file lacks one of them.
    pub fn layer(&self, layer: &str, device: &Device) -> Result<[(&'static str, Tensor); 2]> {
        let names = if self.config.method == "lora" { ["a", "b"] } else { ["lambda", "gamma"] };
        let [first, second] =
            parts(self.config.method).map(|part| self.file.tensor(&format!("{MODEL}{layer}{part}"), device));
        Ok([(names[0], first?), (names[1], second?)])
    }

    /// RandLoRA's bases in f32, stored once or once for every layer; None for LoRA, which has none.
    ///
    /// # Errors
    /// [`Error::Data`] where they are missing, of other shapes, or not the same for all layers.
    pub fn bases(&self, device: &Device) -> Result<Option<Bases>> {
        if self.config.method == "lora" {
            return Ok(None);
        }
        let [a, b] = BASES.map(|name| self.base(name, device));
        let (a, b) = (a?, b?);
        let &[rank, 1, small] = a.dims() else {
            let message = format!("randlora_A is {:?}, not (r, 1, MIN)", a.dims());
            return Err(self.error(message));
        };
        Bases::new(&a.reshape([rank, small])?, &b, Pairing::Peft)
            .map_err(|error| self.of_file(error))
            .map(Some)
    }

    /// The same error, of this file: the bases in it do not fit each other, or a layer.
    fn of_file(&self, error: Error) -> Error {
        match error {
            Error::Shape { message, .. } => Error::data(self.file.what(), message),
            other => other,
        }
    }

    fn base(&self, name: &str, device: &Device) -> Result<Tensor> {
        let keys: Vec<&str> =
            self.file.entries().map(|(key, _)| key).filter(|key| key.ends_with(name)).collect();
        let once = format!("{ROOT}{name}");
        let Some(first) = keys.iter().find(|key| **key == once).or(keys.first()) else {
            return Err(self.error(format!("`{once}` is missing")));
        };
        let values = self.file.tensor(first, device)?.to_dtype(DType::F32)?;
        for key in &keys {
            let other = self.file.tensor(key, device)?.to_dtype(DType::F32)?;
            if other.dims() != values.dims() || other.to_vec::<f32>()? != values.to_vec::<f32>()? {
                return Err(Error::data(
                    self.file.what(),
                    format!("`{key}` and `{first}` differ: all layers share them"),
                ));
            }
        }
        Ok(values)
    }
}

/// An error unless the file has both tensors of a layer's adapter, of the rank that the configuration says,
/// and PEFT would give the layer one.
fn check_layer(layer: &str, config: &PeftConfig, file: &SafeTensors) -> Result<()> {
    let keys = parts(config.method).map(|part| format!("{MODEL}{layer}{part}"));
    for (key, place) in keys.iter().zip([0, 1]) {
        let Some(entry) = file.entry(key) else {
            let message = format!("there is no tensor `{key}`, which the layer's adapter needs");
            return Err(Error::data(file.what(), message));
        };
        // λ (r, n) and γ (n, m), or A (r, in) and B (out, r).
        let has_rank = config.method == "lora" || place == 0;
        if entry.dims.len() != 2 || has_rank && entry.dims[place] != config.rank {
            let message =
                format!("`{key}` is {:?}, but {CONFIG} says that `r` is {}", entry.dims, config.rank);
            return Err(Error::data(file.what(), message));
        }
    }
    if !config.targets.is_empty() && !Targets::Names(config.targets.clone()).matches(layer) {
        let message = format!("`{layer}` has an adapter, but is not among `target_modules` of {CONFIG}");
        return Err(Error::data(file.what(), message));
    }
    Ok(())
}

/// The module of a parameter.
fn module_of(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(module, _)| module)
}

/// An adapter folder as a method for a model whose names begin with something more than the file's.
#[derive(Debug)]
struct Within<'a> {
    adapter: &'a PeftAdapter,
    prefix: &'a str,
}

impl Method for Within<'_> {
    fn name(&self) -> &'static str {
        self.adapter.config.method
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        let Some(first) = layers.first() else { return Ok(Some(vec![])) };
        let mut bases = self.adapter.bases(&first.device)?;
        // Block bases that were saved with their zeros.
        let n = |layer: &LayerInfo| layer.small().div_ceil(self.adapter.config.rank);
        if let Some(dense) = &bases
            && layers.iter().all(|layer| n(layer) == n(first))
            && let Some(blocks) = dense.blocks(n(first))?
        {
            bases = Some(blocks);
        }
        let bases = bases.map(|b| b.to_dtype(first.dtype)).transpose()?.map(Arc::new);
        layers.iter().map(|layer| self.one(layer, bases.as_ref())).collect::<Result<_>>().map(Some)
    }
}

impl Within<'_> {
    fn one(&self, layer: &LayerInfo, bases: Option<&Arc<Bases>>) -> Result<Box<dyn LinearAdapter>> {
        let PeftConfig { method, rank, scale, dropout, .. } = self.adapter.config;
        let (m, n) = (layer.small(), layer.small().div_ceil(rank));
        let dims = match bases {
            Some(_) => [[rank, n], [n, m]],
            None => [[rank, layer.inputs], [layer.outputs, rank]],
        };
        let name = layer.name.strip_prefix(self.prefix).unwrap_or(&layer.name);
        let value = |i: usize| {
            let name = format!("{name}{}", parts(method)[i]);
            self.adapter.tensor(&name, &dims[i], layer.dtype, &layer.device)
        };
        // The values come first: room is made by what is in the file, not by what it says.
        let values = [value(0)?, value(1)?];
        let mut adapter: Box<dyn LinearAdapter> = match bases {
            Some(bases) => {
                let settings =
                    RandLora { rank, scale, dropout, pairing: Pairing::Peft, ..RandLora::default() };
                let adapter = RandLoraAdapter::new(&settings, layer, bases.clone());
                Box::new(adapter.map_err(|error| self.adapter.of_file(error))?)
            }
            None => Box::new(LoraAdapter::new(&Lora { rank, scale, dropout, seed: 0 }, layer)?),
        };
        for ((_, parameter), value) in adapter.parameters_mut().into_iter().zip(values) {
            parameter.replace(value)?;
        }
        Ok(adapter)
    }
}
