//! A model's adapters as a folder that PEFT reads.

use std::any::Any;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::adapters::{LoraAdapter, RandLoraAdapter, Targets};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::files::io_error;
use crate::io::peft::{CONFIG, MODEL, PeftConfig, ROOT, TENSORS, module_of, parts};
use crate::io::safetensors::save_safetensors;
use crate::nn::{Linear, Module};
use crate::ops::randlora::{Bases, Pairing, Structure};
use crate::tensor::Tensor;

/// What the file says beside the numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeftTask {
    /// PEFT's name of the task, as in `SEQ_CLS`.
    pub name: Option<String>,
    /// The model that the adapter belongs to, a path or a name.
    pub base_model: Option<String>,
}

/// Saves a model's adapters and what else of it is trained to a folder, which is made if need be: with
/// `PeftModel.from_pretrained` they give the same outputs in Python.
///
/// The two files are each written whole; what was there under their names is replaced.
///
/// # Errors
/// [`Error::Config`] for a model without adapters, with adapters of several kinds or settings, or with
/// RandLoRA's bases paired as in the paper, or block bases of layers with different smaller sides, which
/// PEFT cannot express: attach with [`Pairing::Peft`]. [`Error::Io`] where the folder cannot be written.
pub fn save_peft<M: Module + ?Sized>(model: &M, folder: &Path, task: &PeftTask) -> Result<()> {
    let layers: Vec<(String, &Linear)> =
        model.linears().into_iter().filter(|(_, layer)| layer.adapter().is_some()).collect();
    let (config, bases) = describe(&layers)?;
    let mut tensors = Vec::new();
    if let Some(bases) = bases {
        let [a, b] = stored(&bases, &layers)?;
        tensors.push((format!("{ROOT}randlora_A"), a));
        tensors.push((format!("{ROOT}randlora_B"), b));
    }
    let mut own = BTreeSet::new();
    for (name, layer) in &layers {
        let Some(adapter) = layer.adapter() else { continue };
        for ((part, parameter), suffix) in adapter.parameters().into_iter().zip(parts(config.method)) {
            own.insert(format!("{name}.{}.{part}", config.method));
            tensors.push((format!("{MODEL}{name}{suffix}"), parameter.value().clone()));
        }
    }
    let parameters = model.parameters();
    let trained = parameters.iter().filter(|(name, p)| p.is_trainable() && !own.contains(name));
    let modules: BTreeSet<&str> = trained.map(|(name, _)| module_of(name)).collect();
    // PEFT keeps modules whole: what of them is frozen goes along.
    for (name, parameter) in &parameters {
        if modules.contains(module_of(name)) {
            tensors.push((format!("{MODEL}{name}"), parameter.value().clone()));
        }
    }
    fs::create_dir_all(folder).map_err(|source| io_error(folder, source))?;
    save_safetensors(&folder.join(TENSORS), &tensors, &[("format", "pt")])?;
    let modules: Vec<String> = modules.into_iter().map(String::from).collect();
    let targets = targets(model, &layers, &modules);
    let config = PeftConfig { base_model: task.base_model.clone(), targets, modules, ..config };
    config.write(&folder.join(CONFIG), task.name.as_deref())
}

/// The settings and the bases that all adapters share.
fn describe(layers: &[(String, &Linear)]) -> Result<(PeftConfig, Option<Arc<Bases>>)> {
    let mut common: Option<(PeftConfig, Option<Arc<Bases>>)> = None;
    for (name, layer) in layers {
        let Some(adapter) = layer.adapter() else { continue };
        let any: &dyn Any = adapter;
        let config = |method, rank, scale, dropout| {
            let (base_model, targets, modules) = (None, vec![], vec![]);
            PeftConfig { method, rank, scale, dropout, base_model, targets, modules }
        };
        let this = if let Some(a) = any.downcast_ref::<RandLoraAdapter>() {
            (config("randlora", a.bases().rank(), a.scale(), a.dropout()), Some(a.bases().clone()))
        } else if let Some(a) = any.downcast_ref::<LoraAdapter>() {
            (config("lora", a.rank(), a.scale(), a.dropout()), None)
        } else {
            let message = format!("`{name}` has one of {}, which has no form in PEFT here", adapter.method());
            return Err(Error::config("adapter", message));
        };
        let same = common.as_ref().is_none_or(|(config, bases)| {
            let bases = match (bases, &this.1) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (a, b) => a.is_none() && b.is_none(),
            };
            *config == this.0 && bases
        });
        if !same {
            let message =
                format!("`{name}` has other settings than the layers before it: PEFT's file holds one set");
            return Err(Error::config("adapter", message));
        }
        common = Some(this);
    }
    let common = common.ok_or_else(|| Error::config("adapter", "the model has none to save"))?;
    let dense_of_paper =
        |bases: &Arc<Bases>| (bases.structure(), bases.pairing()) == (Structure::Dense, Pairing::Paper);
    if common.1.as_ref().is_some_and(dense_of_paper) {
        let message = "PEFT pairs the bases in its own way: attach with `pairing: Pairing::Peft`";
        return Err(Error::config("pairing", message));
    }
    Ok(common)
}

/// A (r, 1, MIN) and B (MAX, ⌈MIN/r⌉, r) at the sizes that PEFT makes them, block bases with their zeros;
/// what no layer reads is 0.
fn stored(bases: &Bases, layers: &[(String, &Linear)]) -> Result<[Tensor; 2]> {
    let largest = |size: fn(&Linear) -> usize| layers.iter().map(|(_, layer)| size(layer)).max().unwrap_or(0);
    let (inputs, outputs) = (largest(Linear::inputs), largest(Linear::outputs));
    let (small, large, rank) = (inputs.min(outputs), inputs.max(outputs), bases.rank());
    let smaller = |(_, layer): &(String, &Linear)| layer.inputs().min(layer.outputs());
    let read = layers.iter().map(smaller).max().unwrap_or(0);
    let n = read.div_ceil(rank);
    let same = layers.iter().all(|layer| smaller(layer).div_ceil(rank) == n);
    if bases.structure() == Structure::Block && !same {
        let message = "PEFT's file has one B, but which row of block bases is whose follows from a layer's smaller \
                       side, and these layers have several: use dense bases";
        return Err(Error::config("bases", message));
    }
    let bases = bases.dense(n)?;
    let (a, b) = (bases.a().to_dtype(DType::F32)?, bases.b().to_dtype(DType::F32)?);
    let (a, b) = (a.slice(1, 0..read)?, b.slice(0, 0..large)?.slice(1, 0..n)?);
    Ok([pad(&a, 1, small)?.unsqueeze(1)?, pad(&b, 1, small.div_ceil(rank))?])
}

/// Zeros after a dimension until it has this size.
fn pad(x: &Tensor, dim: usize, size: usize) -> Result<Tensor> {
    let missing = x.shape().with_dim(dim, size - x.dims()[dim])?;
    Tensor::concat(&[x, &Tensor::zeros(missing, x.dtype(), x.device())?], dim)
}

/// The last parts of the layers' names, if they mean no other layers, else the whole names.
fn targets<M: Module + ?Sized>(model: &M, layers: &[(String, &Linear)], modules: &[String]) -> Vec<String> {
    let last: BTreeSet<&str> =
        layers.iter().map(|(name, _)| name.rsplit('.').next().unwrap_or(name)).collect();
    let short = Targets::names(&last.iter().copied().collect::<Vec<_>>());
    let meant =
        model.linears().into_iter().filter(|(name, _)| short.matches(name) && !modules.contains(name));
    match meant.count() == layers.len() {
        true => last.into_iter().map(String::from).collect(),
        false => layers.iter().map(|(name, _)| name.clone()).collect(),
    }
}
