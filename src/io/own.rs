//! Adapter folders of the methods that are not exchanged with PEFT: adapter_config.json and
//! adapter_model.safetensors of this crate's own form.
//!
//! The configuration is an object with these fields:
//!
//! | field | value |
//! |---|---|
//! | `peft_type` | `RANDLORA_RS`: PEFT knows no such type, and says so |
//! | `method` | the method's name, as in [`by_recipe`] |
//! | `settings` | an object of texts: the settings of that method by the names of its fields |
//! | `layers` | the adapted layers, by their full names |
//! | `modules_to_save` | the modules that are trained whole |
//! | `base_model_name_or_path`, `task_type` | as in PEFT, or null |
//!
//! The tensors are the trained parameters by their names in the model, `<layer>.<method>.<parameter>` for an
//! adapter's. What is not trained, random matrices and the singular vectors of the model's weights, is made
//! again from the settings and the model: the folder is small, and goes with that very model.
//!
//! Only what aTLAS combines follows from neither. Its task vectors lie beside what is trained, by the names
//! `<layer>.atlas.tau.<place>`: as many numbers as the adapted weights have, for each task. How many tasks there
//! are, these names say.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::adapters::{Attached, Method, Targets, TaskVector, attach, by_recipe};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::files::{io_error, write_whole};
use crate::io::json::Object;
use crate::io::map::Access;
use crate::io::peft::PeftTask;
use crate::io::safetensors::{SafeTensors, save_safetensors};
use crate::nn::{ItemMut, LinearAdapter, Module, Recipe, join};
use crate::tensor::Tensor;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// What the names of task vectors have before their place.
const TAU: &str = "tau.";
pub(super) const KIND: &str = "RANDLORA_RS";

/// An open adapter folder of this crate's own form.
#[derive(Debug)]
pub struct OwnAdapter {
    config: Object,
    method: String,
    layers: Vec<String>,
    modules: Vec<String>,
    file: SafeTensors,
    /// How many task vectors each layer has.
    tasks: usize,
}

impl OwnAdapter {
    /// Opens a folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Data`] that name the file, also for aTLAS without a layer's task vector.
    pub fn open(folder: &Path) -> Result<OwnAdapter> {
        let config = Object::read(&folder.join(CONFIG))?;
        match config.text("peft_type")? {
            Some(KIND) => {}
            other => return Err(config.error(format!("`peft_type` is {other:?}, not {KIND}"))),
        }
        let names = |name| -> Result<Vec<String>> {
            Ok(config.texts(name)?.unwrap_or_default().into_iter().map(String::from).collect())
        };
        let (layers, modules) = (names("layers")?, names("modules_to_save")?);
        if layers.is_empty() {
            return Err(config.error("`layers` names no layer"));
        }
        let method = config.needed("method", config.text("method")?)?.to_string();
        let file = SafeTensors::open(&folder.join(TENSORS), Access::Read)?;
        let mut adapter = OwnAdapter { method, layers, modules, file, tasks: 0, config };
        // What cannot be read is better known now than when a model is there.
        adapter.recipe(vec![])?;
        adapter.tasks = adapter.count_tasks()?;
        Ok(adapter)
    }

    /// The method's name.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The method's settings, by their names.
    ///
    /// # Errors
    /// [`Error::Data`] where they are no texts.
    pub fn settings(&self) -> Result<Vec<(&str, &str)>> {
        self.config.needed("settings", self.config.table("settings")?)
    }

    /// The model that the adapter was made for, if the file says so.
    pub fn base_model(&self) -> Option<&str> {
        self.config.text("base_model_name_or_path").ok().flatten()
    }

    /// What is known of its use.
    pub(super) fn task(&self) -> PeftTask {
        let name = self.config.text("task_type").ok().flatten().map(String::from);
        PeftTask { name, base_model: self.base_model().map(String::from) }
    }

    /// The adapted layers.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// The parameters of the adapted layers, with their sizes.
    pub fn adapted(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors().filter(|(name, _)| self.of_layer(name).is_some_and(|part| !part.starts_with(TAU)))
    }

    /// The parameters that the file holds whole, a new classifier's say, with their sizes.
    pub fn whole(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors().filter(|(name, _)| self.of_layer(name).is_none())
    }

    /// The tensors of the adapted layers that are not trained, with their sizes (out, in): aTLAS's task vectors.
    pub fn given(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors().filter(|(name, _)| self.of_layer(name).is_some_and(|part| part.starts_with(TAU)))
    }

    /// How many task vectors each layer has; 0 for other methods than aTLAS.
    pub fn tasks(&self) -> usize {
        self.tasks
    }

    fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.file.entries().map(|(name, entry)| (name, &entry.dims[..]))
    }

    /// The last part of the name of what an adapted layer has.
    fn of_layer<'a>(&self, name: &'a str) -> Option<&'a str> {
        self.layers.iter().find_map(|layer| name.strip_prefix(&path(layer, &self.method)))
    }

    /// A parameter as it is stored.
    ///
    /// # Errors
    /// [`Error::Data`] where the file lacks it.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.file.tensor(name, device)
    }

    /// An error about the adapter's tensors.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::data(self.file.what(), message)
    }

    fn recipe(&self, vectors: Vec<TaskVector>) -> Result<Box<dyn Method>> {
        let settings = self.settings()?;
        let get = |name: &str| settings.iter().find(|(key, _)| *key == name).map(|(_, text)| *text);
        by_recipe(&self.method, get, vectors).map_err(|error| self.config.error(error.to_string()))
    }

    /// How many task vectors each layer has, by the file.
    fn count_tasks(&self) -> Result<usize> {
        if self.method != "atlas" {
            return Ok(0);
        }
        let has = |layer: &str, place| self.file.entry(&tau(layer, &self.method, place)).is_some();
        let of = |layer: &String| (0..).take_while(|place| has(layer, *place)).count();
        let tasks = self.layers.iter().map(of).max().unwrap_or(0);
        match self.layers.iter().map(|layer| (layer, of(layer))).find(|(_, own)| *own < tasks.max(1)) {
            Some((layer, own)) => Err(self.error(format!(
                "there is no `{}`, a task vector that the adapter combines: train it again",
                tau(layer, &self.method, own)
            ))),
            None => Ok(tasks),
        }
    }

    fn read_vectors(&self, device: &Device) -> Result<Vec<TaskVector>> {
        let one = |layer: &String, place| {
            Ok((layer.clone(), self.file.tensor(&tau(layer, &self.method, place), device)?))
        };
        (0..self.tasks).map(|place| self.layers.iter().map(|layer| one(layer, place)).collect()).collect()
    }

    /// Attaches the adapter to a model, whose other parameters are frozen.
    ///
    /// # Errors
    /// [`Error::NoMatch`] where the model lacks a layer or parameter, [`Error::Data`] where a tensor is
    /// missing, has another shape than the model needs, or is no part of it; and as [`attach`].
    pub fn attach<M: Module + ?Sized>(&self, model: &mut M) -> Result<Attached> {
        let modules: Vec<&str> = self.modules.iter().map(String::as_str).collect();
        let device = model.parameters().first().map_or_else(Device::cpu, |(_, p)| p.value().device().clone());
        let method = self.recipe(self.read_vectors(&device)?)?;
        let attached = attach(model, &*method, &Targets::Names(self.layers.clone()), &modules);
        let attached = attached.map_err(|error| match error {
            Error::Shape { message, .. } => {
                self.error(format!("{message}: attach it to the model that it was trained on"))
            }
            other => other,
        })?;
        let mut trained = BTreeSet::new();
        model.try_visit_mut(&mut |name, item| match item {
            ItemMut::Parameter(parameter) if parameter.is_trainable() => {
                trained.insert(name.to_string());
                let value = parameter.value();
                let dtype = if value.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                let stored = self.file.tensor(name, value.device())?;
                if stored.shape() != value.shape() {
                    let message =
                        format!("`{name}` is {} where the model needs {}", stored.shape(), value.shape());
                    return Err(self.error(message));
                }
                parameter.replace(stored.to_dtype(dtype)?)
            }
            _ => Ok(()),
        })?;
        let given = given_to(model);
        let known = |name: &str| trained.contains(name) || given.iter().any(|(given, _)| given == name);
        match self.tensors().find(|(name, _)| !known(name)) {
            Some((name, _)) => {
                Err(self.error(format!("`{name}` is no part of what is trained in this model")))
            }
            None => Ok(attached),
        }
    }
}

/// Saves a model's adapters and what else of it is trained to a folder, which is made if need be.
///
/// # Errors
/// [`Error::Config`] for a model without adapters, with adapters of several kinds or settings, or of a kind
/// that cannot be made again. [`Error::Io`] where the folder cannot be written.
pub fn save_own<M: Module + ?Sized>(model: &M, folder: &Path, task: &PeftTask) -> Result<()> {
    let (method, recipe, layers) = describe(model)?;
    let parameters = model.parameters();
    let mut tensors: Vec<(String, Tensor)> = parameters
        .into_iter()
        .filter(|(_, parameter)| parameter.is_trainable())
        .map(|(name, parameter)| (name, parameter.value().clone()))
        .collect();
    let of_adapter = |name: &str| layers.iter().any(|layer| name.starts_with(&path(layer, method)));
    let module = |name: &str| name.rsplit_once('.').map_or(name, |(module, _)| module).to_string();
    let modules: BTreeSet<String> =
        tensors.iter().filter(|(name, _)| !of_adapter(name)).map(|(name, _)| module(name)).collect();
    let config = json!({
        "base_model_name_or_path": task.base_model,
        "layers": layers,
        "method": method,
        "modules_to_save": modules,
        "peft_type": KIND,
        "settings": recipe,
        "task_type": task.name,
    });
    fs::create_dir_all(folder).map_err(|source| io_error(folder, source))?;
    tensors.extend(given_to(model));
    save_safetensors(&folder.join(TENSORS), &tensors, &[("format", "pt")])?;
    let text = serde_json::to_string_pretty(&config).unwrap_or_default();
    write_whole(&folder.join(CONFIG), |out| writeln!(out, "{text}"))
}

/// The tensors that a model's adapters were given, by their names in a file.
fn given_to<M: Module + ?Sized>(model: &M) -> Vec<(String, Tensor)> {
    let mut found = Vec::new();
    for (layer, linear) in model.linears() {
        let Some(adapter) = linear.adapter() else { continue };
        let name = |place| tau(&layer, adapter.method(), place);
        found.extend(adapter.given().iter().enumerate().map(|(place, x)| (name(place), x.clone())));
    }
    found
}

/// What the names of all that an adapter has begin with.
fn path(layer: &str, method: &str) -> String {
    join(layer, method) + "."
}

/// The name of a layer's task vector.
fn tau(layer: &str, method: &str, place: usize) -> String {
    format!("{}{TAU}{place}", path(layer, method))
}

/// The method and the settings that all adapters of a model share, and the layers that have one.
fn describe<M: Module + ?Sized>(model: &M) -> Result<(&'static str, Recipe, Vec<String>)> {
    let mut common: Option<(&'static str, Recipe, usize)> = None;
    let mut layers = Vec::new();
    for (name, layer) in model.linears() {
        let Some(adapter) = layer.adapter() else { continue };
        let this = (adapter.method(), made_again(adapter)?, adapter.given().len());
        if common.as_ref().is_some_and(|common| *common != this) {
            let message =
                format!("`{name}` has other settings than the layers before it: a folder holds one set");
            return Err(Error::config("adapter", message));
        }
        common = Some(this);
        layers.push(name);
    }
    let (method, recipe, _) = common.ok_or_else(|| Error::config("adapter", "the model has none to save"))?;
    Ok((method, recipe, layers))
}

fn made_again(adapter: &dyn LinearAdapter) -> Result<Recipe> {
    adapter.recipe().ok_or_else(|| {
        let message = format!("{} cannot be saved in this form: merge it into the weights", adapter.method());
        Error::config("adapter", message)
    })
}
