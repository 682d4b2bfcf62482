//! A model's adapters as a folder that PEFT reads.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::adapters::{BasesOrigin, Targets, TorchBases};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::files::io_error;
use crate::io::peft::compact::save_compact;
use crate::io::peft::describe::{describe, values};
use crate::io::peft::kind::Kind;
use crate::io::peft::shared::Shared;
use crate::io::peft::{
    Biases, CONFIG, MODEL, ORIGIN, PeftAdapter, PeftConfig, ROOT, TENSORS, module_of, origin,
};
use crate::io::safetensors::{FileType, save_safetensors};
use crate::nn::{Linear, Module, Parameter};
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
/// [`Error::Config`] for a model without adapters, with adapters that PEFT does not have, of several kinds or
/// settings, or with RandLoRA's bases paired as in the paper, or block bases of layers with different smaller sides, which
/// PEFT cannot express: attach with [`Pairing::Peft`](crate::Pairing::Peft). [`Error::Io`] where the folder cannot be written.
pub fn save_peft<M: Module + ?Sized>(model: &M, folder: &Path, task: &PeftTask) -> Result<()> {
    let saved = Saved::of(model)?;
    let mut config = PeftConfig { base_model: task.base_model.clone(), ..saved.config.clone() };
    let mut metadata = vec![("format", "pt".to_string())];
    match &saved.shared {
        Some(Shared::RandLora(_, Some(BasesOrigin::Torch(TorchBases { key, draw, .. })))) => {
            config.kind = Kind::RandLora(Some((*key, *draw)));
        }
        Some(Shared::RandLora(_, Some(origin))) => {
            metadata.push((ORIGIN, origin::to_json(origin)?.to_string()));
        }
        _ => {}
    }
    let tensors = [saved.shared_tensors()?, saved.tensors].concat();
    fs::create_dir_all(folder).map_err(|source| io_error(folder, source))?;
    write_tensors(&folder.join(TENSORS), tensors, &metadata)?;
    config.write(&folder.join(CONFIG), task.name.as_deref())
}

impl PeftAdapter {
    /// Saves a model's adapters to a folder in the form of this one, which they come from and may have been
    /// trained on since: what the configuration says beside is kept, what layers share stays out of the file where
    /// it was, and a tensor that was stored in bf16 or f16 is again, where that type holds its values.
    ///
    /// An adapter that was only loaded is saved bit for bit, apart from copies of the bases below the layers.
    ///
    /// # Errors
    /// As [`save_peft`] and [`save_compact`](crate::io::save_compact); [`Error::Config`] where the model's
    /// adapters have other settings than this one.
    pub fn save<M: Module + ?Sized>(&self, model: &M, folder: &Path) -> Result<()> {
        if self.compact {
            return save_compact(model, folder, self.config.base_model.as_deref());
        }
        let saved = Saved::of(model)?;
        let settings = |c: &PeftConfig| (c.method(), c.rank, c.scale.to_bits(), c.dropout.to_bits());
        if self.config.layers.is_empty() && settings(&saved.config) != settings(&self.config) {
            let message = "the model's has other settings than the folder that it should be saved like: use `save_peft`";
            return Err(Error::config("adapter", message));
        }
        let shared = if self.config.stored { saved.shared_tensors()? } else { vec![] };
        let tensors: Vec<(String, Tensor)> = shared
            .into_iter()
            .chain(saved.tensors)
            .map(|(key, x)| Ok((key.clone(), self.narrowed(&key, x)?)))
            .collect::<Result<_>>()?;
        fs::create_dir_all(folder).map_err(|source| io_error(folder, source))?;
        let metadata: Vec<(&str, String)> =
            self.file.metadata().iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        write_tensors(&folder.join(TENSORS), tensors, &metadata)?;
        self.config.rewrite(&folder.join(CONFIG), &saved.config)
    }

    /// The tensor in the type that it had in the file, if that holds its values.
    fn narrowed(&self, key: &str, x: Tensor) -> Result<Tensor> {
        match self.file.entry(key).map(|entry| entry.dtype) {
            Some(FileType::Float(dtype)) if dtype != x.dtype() => {
                let narrow = x.to_dtype(dtype)?;
                let same = narrow.to_dtype(x.dtype())?.to_dtype(DType::F64)?.to_vec::<f64>()?
                    == x.to_dtype(DType::F64)?.to_vec::<f64>()?;
                Ok(if same { narrow } else { x })
            }
            _ => Ok(x),
        }
    }
}

fn write_tensors(path: &Path, tensors: Vec<(String, Tensor)>, metadata: &[(&str, String)]) -> Result<()> {
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(key, value)| (*key, value.as_str())).collect();
    save_safetensors(path, &tensors, &metadata)
}

/// What of a model goes into a file.
pub(super) struct Saved {
    pub(super) config: PeftConfig,
    /// What all layers share.
    pub(super) shared: Option<Shared>,
    /// The inputs and outputs of the layers.
    pub(super) sizes: Vec<[usize; 2]>,
    /// All tensors but those that layers share, by their keys.
    pub(super) tensors: Vec<(String, Tensor)>,
}

impl Saved {
    pub(super) fn of<M: Module + ?Sized>(model: &M) -> Result<Saved> {
        let layers: Vec<(String, &Linear)> =
            model.linears().into_iter().filter(|(_, layer)| layer.adapter().is_some()).collect();
        let (config, shared) = describe(&layers)?;
        let (mut tensors, mut own) = (Vec::new(), BTreeSet::new());
        for (name, layer) in &layers {
            let Some(adapter) = layer.adapter() else { continue };
            for (value, part) in values(adapter)?.into_iter().zip(config.form().parts) {
                own.insert(format!("{name}.{}.{}", config.method(), part.name));
                tensors.push((format!("{MODEL}{name}{}", part.suffix), value));
            }
        }
        let parameters: Vec<(String, &Parameter)> =
            model.parameters().into_iter().filter(|(name, _)| !own.contains(name)).collect();
        let (biases, alone) = biases(&parameters, &layers)?;
        let trained =
            parameters.iter().filter(|(name, p)| p.is_trainable() && !alone.contains(name.as_str()));
        let modules: BTreeSet<&str> = trained.map(|(name, _)| module_of(name)).collect();
        // PEFT keeps modules whole: what of them is frozen goes along.
        for (name, parameter) in &parameters {
            let module = module_of(name);
            let adapted = alone.contains(name.as_str()) && layers.iter().any(|(layer, _)| layer == module);
            match adapted {
                true => tensors.push((format!("{MODEL}{module}.base_layer.bias"), parameter.value().clone())),
                false if modules.contains(module) || alone.contains(name.as_str()) => {
                    tensors.push((format!("{MODEL}{name}"), parameter.value().clone()));
                }
                false => {}
            }
        }
        let modules: Vec<String> = modules.into_iter().map(String::from).collect();
        let targets = targets(model, &layers, &modules);
        let config = PeftConfig { targets, modules, biases, ..config };
        let sizes = layers.iter().map(|(_, layer)| [layer.inputs(), layer.outputs()]).collect();
        Ok(Saved { config, shared, sizes, tensors })
    }

    /// The tensors that layers share, by their keys.
    fn shared_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let (Some(shared), Some(names)) = (&self.shared, self.config.form().shared) else {
            return Ok(vec![]);
        };
        let keys = names.map(|name| format!("{ROOT}{name}"));
        Ok(keys.into_iter().zip(shared.stored(&self.sizes)?).collect())
    }
}

/// Which biases are trained without their modules, and their names. PEFT knows of all of the model's, or those
/// of all adapted layers, or none; where it is all of them, those of modules that are trained whole are not
/// told apart.
fn biases<'a>(
    parameters: &'a [(String, &Parameter)],
    layers: &[(String, &Linear)],
) -> Result<(Biases, BTreeSet<&'a str>)> {
    let of_layer = |name: &str| layers.iter().any(|(layer, _)| layer == module_of(name));
    let biases = || parameters.iter().filter(|(name, _)| name.ends_with(".bias"));
    let names =
        |biases: Vec<&'a (String, &Parameter)>| biases.into_iter().map(|(name, _)| name.as_str()).collect();
    let of_layers: Vec<_> = biases().filter(|(name, _)| of_layer(name)).collect();
    let trained = of_layers.iter().filter(|(_, p)| p.is_trainable()).count();
    if trained == 0 {
        return Ok((Biases::None, BTreeSet::new()));
    }
    if trained < of_layers.len() {
        let message = "some of the adapted layers' are trained and some are not, which PEFT cannot express: train all \
                       of them, or none";
        return Err(Error::config("biases", message));
    }
    if !biases().all(|(_, p)| p.is_trainable()) {
        return Ok((Biases::Adapted, names(of_layers)));
    }
    // A module all of whose parameters are trained is one that is trained whole.
    let whole = |module: &str| {
        let mut others =
            parameters.iter().filter(|(name, _)| module_of(name) == module && !name.ends_with(".bias"));
        others.any(|(_, p)| p.is_trainable())
    };
    Ok((Biases::All, names(biases().filter(|(name, _)| !whole(module_of(name))).collect())))
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
