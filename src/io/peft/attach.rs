//! Attaching an adapter of a folder to a model.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapters::{Attached, LayerInfo, Method, Targets, attach};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::peft::form::Part;
use crate::io::peft::{Biases, MODEL, PeftAdapter, module_of};
use crate::nn::{ItemMut, LinearAdapter, Module, Parameter};
use crate::tensor::Tensor;

impl PeftAdapter {
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
        // A bias alone is trained beside its layer's adapter, a module instead of one.
        let biases = |name: &&String| self.is_bias(name, &prefix);
        let modules: BTreeSet<&str> =
            values.keys().filter(|name| !biases(name)).map(|name| module_of(name)).collect();
        let modules: Vec<&str> = modules.into_iter().collect();
        let targets = self.layers.iter().map(|layer| format!("{prefix}{layer}")).collect();
        let method = Within { adapter: self, prefix: &prefix };
        attach(model, &method, &Targets::Names(targets), &modules)?;
        model.try_visit_mut(&mut |name, item| match (item, values.get(name)) {
            (ItemMut::Parameter(parameter), Some(value)) => {
                parameter.set_trainable(true);
                parameter.replace(value.clone())
            }
            _ => Ok(()),
        })?;
        Ok(Attached::of(model))
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
        for (name, key) in &self.whole {
            let Some(parameter) = parameters.get(&format!("{prefix}{name}")) else {
                let available = parameters.into_keys().collect();
                return Err(Error::NoMatch { wanted: format!("`{name}` of the adapter"), available });
            };
            let value = parameter.value();
            let dtype = if value.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let value = self.tensor(name, key, value.dims(), dtype, value.device())?;
            values.insert(format!("{prefix}{name}"), value);
        }
        // What is trained whole is saved whole, and what the configuration promises is there.
        let alone = |name: &&String| self.is_bias(name, prefix);
        let modules: BTreeSet<&str> =
            values.keys().filter(|name| !alone(name)).map(|name| module_of(name)).collect();
        let promised = Targets::Names(self.config.modules.clone());
        let missing = |name: &&String| {
            let module = module_of(name);
            let bias = name.ends_with(".bias")
                && match self.config.biases {
                    Biases::None => false,
                    Biases::Adapted => self.layers.iter().any(|layer| format!("{prefix}{layer}") == module),
                    Biases::All => true,
                };
            (bias || modules.contains(module) || promised.matches(module)) && !values.contains_key(*name)
        };
        match parameters.keys().find(missing) {
            Some(name) => Err(self.error(format!("`{MODEL}{name}` is missing"))),
            None => Ok(values),
        }
    }

    /// Whether a parameter is a bias that is trained without its module.
    fn is_bias(&self, name: &str, prefix: &str) -> bool {
        let bias = name.strip_suffix(".bias").filter(|_| self.config.biases != Biases::None);
        let alone = |module: &str| {
            let module = module.strip_prefix(prefix).unwrap_or(module);
            !self.whole.keys().any(|other| module_of(other) == module && !other.ends_with(".bias"))
        };
        bias.is_some_and(alone)
    }

    /// The tensors of a layer, in the order of its adapter's parameters.
    fn values(&self, layer: &LayerInfo) -> Result<Vec<Tensor>> {
        let (rank, _) = self.config.of(&layer.name);
        let value = |part: &Part| {
            let name = format!("{}{}", layer.name, part.suffix);
            let dims: Vec<usize> = part.sides.iter().map(|side| side.of(layer, rank)).collect();
            self.tensor(&name, &format!("{MODEL}{name}"), &dims, layer.dtype, &layer.device)
        };
        self.config.form().parts.iter().map(value).collect()
    }

    /// The tensor of a name within the model, if it has these sizes.
    fn tensor(&self, name: &str, key: &str, dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let value = self.file.tensor(key, device)?;
        if value.dims() != dims {
            let message = format!("`{name}` is {:?} where the model needs {dims:?}", value.dims());
            return Err(self.error(message));
        }
        value.to_dtype(dtype)
    }
}

/// An adapter folder as a method for a model whose names begin with something more than the file's.
#[derive(Debug)]
struct Within<'a> {
    adapter: &'a PeftAdapter,
    prefix: &'a str,
}

impl Method for Within<'_> {
    fn name(&self) -> &'static str {
        self.adapter.config.method()
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        let layers: Vec<LayerInfo> = layers.iter().map(|layer| self.named(layer)).collect();
        // The values come first: room is made by what is in the file, not by what it says.
        let values = layers.iter().map(|layer| self.adapter.values(layer)).collect::<Result<Vec<_>>>()?;
        let adapters = self.adapter.make(&layers)?;
        adapters
            .into_iter()
            .zip(values)
            .map(|(adapter, values)| filled(adapter, values))
            .collect::<Result<_>>()
            .map(Some)
    }
}

impl Within<'_> {
    /// The layer by its name in the file.
    fn named(&self, layer: &LayerInfo) -> LayerInfo {
        let name = layer.name.strip_prefix(self.prefix).unwrap_or(&layer.name);
        LayerInfo { name: name.into(), ..layer.clone() }
    }
}

/// The adapter with these values.
fn filled(mut adapter: Box<dyn LinearAdapter>, values: Vec<Tensor>) -> Result<Box<dyn LinearAdapter>> {
    for ((_, parameter), value) in adapter.parameters_mut().into_iter().zip(values) {
        parameter.replace(value)?;
    }
    Ok(adapter)
}
