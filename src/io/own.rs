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
//! Only what aTLAS combines follows from neither. Its task vectors are a third file, adapter_given.safetensors, by
//! the names `<layer>.atlas.tau.<place>`: as many numbers as the adapted weights have, for each task.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::adapters::{Attached, Method, Targets, attach, by_recipe};
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
const GIVEN: &str = "adapter_given.safetensors";
pub(super) const KIND: &str = "RANDLORA_RS";

/// An open adapter folder of this crate's own form.
#[derive(Debug)]
pub struct OwnAdapter {
    config: Object,
    method: String,
    layers: Vec<String>,
    modules: Vec<String>,
    file: SafeTensors,
    /// What is not trained, where the adapter was given such.
    given: Option<SafeTensors>,
}

impl OwnAdapter {
    /// Opens a folder.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Data`] that name the file.
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
        let given = folder.join(GIVEN);
        let given = given.is_file().then(|| SafeTensors::open(&given, Access::Read)).transpose()?;
        let adapter = OwnAdapter { method, layers, modules, file, given, config };
        // What cannot be read is better known now than when a model is there.
        adapter.recipe(|name| adapter.check_given(name))?;
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
        self.tensors().filter(|(name, _)| self.layer_of(name).is_some())
    }

    /// The parameters that the file holds whole, a new classifier's say, with their sizes.
    pub fn whole(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors().filter(|(name, _)| self.layer_of(name).is_none())
    }

    fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.file.entries().map(|(name, entry)| (name, &entry.dims[..]))
    }

    /// The layer whose adapter a parameter belongs to.
    fn layer_of(&self, parameter: &str) -> Option<&String> {
        let (rest, _) = parameter.rsplit_once('.')?;
        let layer = rest.strip_suffix(self.method.as_str())?.strip_suffix('.')?;
        self.layers.iter().find(|name| *name == layer)
    }

    /// The tensors of the adapted layers that are not trained, with their sizes: aTLAS's task vectors.
    pub fn given(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.given.iter().flat_map(SafeTensors::entries).map(|(name, entry)| (name, &entry.dims[..]))
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

    fn recipe(&self, given: impl Fn(&str) -> Result<BTreeMap<String, Tensor>>) -> Result<Box<dyn Method>> {
        let settings = self.settings()?;
        let get = |name: &str| settings.iter().find(|(key, _)| *key == name).map(|(_, text)| *text);
        by_recipe(&self.method, get, given).map_err(|error| match error {
            Error::Config { .. } | Error::NoMatch { .. } => self.config.error(error.to_string()),
            of_tensors => of_tensors,
        })
    }

    /// The file with what every layer was given, and the names of this in it.
    fn place_of(&self, name: &str) -> Result<(&SafeTensors, impl Iterator<Item = (&String, String)>)> {
        let Some(file) = &self.given else {
            return Err(self
                .config
                .error(format!("{} needs {GIVEN} beside it, which is missing", self.method)));
        };
        let layers = self.layers.iter();
        Ok((file, layers.map(move |layer| (layer, given_name(layer, &self.method, name)))))
    }

    /// An error where a layer was not given this; no tensor is read.
    fn check_given(&self, name: &str) -> Result<BTreeMap<String, Tensor>> {
        let (file, mut names) = self.place_of(name)?;
        match names.find(|(_, name)| file.entry(name).is_none()) {
            Some((_, name)) => Err(Error::data(file.what(), format!("there is no tensor `{name}`"))),
            None => Ok(BTreeMap::new()),
        }
    }

    /// What the layers were given under this name.
    fn read_given(&self, name: &str, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let (file, names) = self.place_of(name)?;
        names.map(|(layer, name)| Ok((layer.clone(), file.tensor(&name, device)?))).collect()
    }

    /// Attaches the adapter to a model, whose other parameters are frozen.
    ///
    /// # Errors
    /// [`Error::NoMatch`] where the model lacks a layer or parameter, [`Error::Data`] where a tensor is
    /// missing, has another shape than the model needs, or is no part of it; and as [`attach`], whose
    /// [`Error::Shape`] is for a task vector that is not of the layer's size.
    pub fn attach<M: Module + ?Sized>(&self, model: &mut M) -> Result<Attached> {
        let modules: Vec<&str> = self.modules.iter().map(String::as_str).collect();
        let device = model.parameters().first().map_or_else(Device::cpu, |(_, p)| p.value().device().clone());
        let method = self.recipe(|name| self.read_given(name, &device))?;
        let attached = attach(model, &*method, &Targets::Names(self.layers.clone()), &modules)?;
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
        if let Some((name, _)) = self.tensors().find(|(name, _)| !trained.contains(*name)) {
            return Err(self.error(format!("`{name}` is no part of what is trained in this model")));
        }
        let given: BTreeSet<String> = given_to(model).into_iter().map(|(name, _)| name).collect();
        match self.given.as_ref().zip(self.given().find(|(name, _)| !given.contains(*name))) {
            Some((file, (name, _))) => {
                Err(Error::data(file.what(), format!("`{name}` is no part of this adapter")))
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
    let trained: Vec<(String, Tensor)> = parameters
        .into_iter()
        .filter(|(_, parameter)| parameter.is_trainable())
        .map(|(name, parameter)| (name, parameter.value().clone()))
        .collect();
    let of_adapter = |name: &str| layers.iter().any(|layer| name.starts_with(&format!("{layer}.{method}.")));
    let module = |name: &str| name.rsplit_once('.').map_or(name, |(module, _)| module).to_string();
    let modules: BTreeSet<String> =
        trained.iter().filter(|(name, _)| !of_adapter(name)).map(|(name, _)| module(name)).collect();
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
    save_given(&given_to(model), &folder.join(GIVEN))?;
    save_safetensors(&folder.join(TENSORS), &trained, &[("format", "pt")])?;
    let text = serde_json::to_string_pretty(&config).unwrap_or_default();
    write_whole(&folder.join(CONFIG), |out| writeln!(out, "{text}"))
}

/// Writes what adapters were given; where that is nothing, no file is left that says otherwise.
fn save_given(given: &[(String, Tensor)], path: &Path) -> Result<()> {
    match given.is_empty() {
        false => save_safetensors(path, given, &[("format", "pt")]),
        true if path.exists() => fs::remove_file(path).map_err(|source| io_error(path, source)),
        true => Ok(()),
    }
}

/// The tensors that a model's adapters were given, by their names in a file.
fn given_to<M: Module + ?Sized>(model: &M) -> Vec<(String, Tensor)> {
    let mut found = Vec::new();
    for (layer, linear) in model.linears() {
        let Some(adapter) = linear.adapter() else { continue };
        let given = adapter.given().into_iter();
        found.extend(given.map(|(name, x)| (given_name(&layer, adapter.method(), &name), x.clone())));
    }
    found
}

fn given_name(layer: &str, method: &str, name: &str) -> String {
    join(&join(layer, method), name)
}

/// The method and the settings that all adapters of a model share, and the layers that have one.
fn describe<M: Module + ?Sized>(model: &M) -> Result<(&'static str, Recipe, Vec<String>)> {
    let mut common: Option<(&'static str, Recipe)> = None;
    let mut layers = Vec::new();
    for (name, layer) in model.linears() {
        let Some(adapter) = layer.adapter() else { continue };
        let this = (adapter.method(), made_again(adapter)?);
        if common.as_ref().is_some_and(|common| *common != this) {
            let message =
                format!("`{name}` has other settings than the layers before it: a folder holds one set");
            return Err(Error::config("adapter", message));
        }
        common = Some(this);
        layers.push(name);
    }
    let (method, recipe) = common.ok_or_else(|| Error::config("adapter", "the model has none to save"))?;
    Ok((method, recipe, layers))
}

fn made_again(adapter: &dyn LinearAdapter) -> Result<Recipe> {
    adapter.recipe().ok_or_else(|| {
        let message = format!("{} cannot be saved in this form: merge it into the weights", adapter.method());
        Error::config("adapter", message)
    })
}
