//! Adapter folders: as Hugging Face PEFT writes and reads them, and in a compact form of our own.
//!
//! # PEFT's form
//!
//! adapter_config.json and adapter_model.safetensors:
//!
//! | tensor | shape |
//! |---|---|
//! | `base_model.model.<layer>.randlora_lambda`, `….randlora_gamma` | λ (r, n), γ (n, m) |
//! | `base_model.randlora_A`, `base_model.randlora_B`, once for all layers | (r, 1, MIN), (MAX, ⌈MIN/r⌉, r) |
//! | `base_model.model.<layer>.lora_A.weight`, `….lora_B.weight` | (r, in), (out, r) |
//! | `base_model.model.<parameter>` of a module that is trained whole | its own |
//! | `base_model.model.<layer>.base_layer.bias`, `base_model.model.<…>.bias` where biases are trained | (out) |
//!
//! MAX and MIN are the largest output and the largest input size of the adapted layers, put in order; a
//! layer reads A[:, :, :m] and B[:D, :n, :]. Files from before PEFT's change #3714 hold A and B once
//! for every layer: they are read if all are the same. Where the configuration says `save_projection: false`
//! the file holds neither, and they are drawn as torch does ([`TorchBases`](crate::adapters::TorchBases)).
//!
//! What is written here says in its metadata, under `randlora_bases`, what the bases follow from.
//!
//! The compact form and what bases follow from are described at [`save_compact`].

mod attach;
mod bases;
mod compact;
mod config;
mod expression;
mod origin;
mod pattern;
mod save;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::adapters::{BasesOrigin, Targets, TorchDraw};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::json::Object;
use crate::io::map::Access;
use crate::io::safetensors::SafeTensors;
use crate::tensor::Tensor;

pub use compact::save_compact;
pub use config::{Biases, PeftConfig};
pub use save::{PeftTask, save_peft};

const ROOT: &str = "base_model.";
const MODEL: &str = "base_model.model.";
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const COMPACT: &str = "compact.safetensors";
/// Where a file's metadata says what its bases follow from.
const ORIGIN: &str = "randlora_bases";

/// An open adapter folder, in either form.
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
    compact: bool,
    /// The adapted layers, as the file calls them.
    layers: Vec<String>,
    /// The parameters that are trained whole, by the model's names, with their keys in the file.
    whole: BTreeMap<String, String>,
    /// What the file says that the bases follow from.
    origin: Option<BasesOrigin>,
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
        let compact = folder.join(COMPACT).is_file() && !folder.join(CONFIG).is_file();
        let (config, file, origin) = if compact {
            let file = SafeTensors::open(&folder.join(COMPACT), Access::Read)?;
            let (config, origin) = compact::read(&file)?;
            (config, file, Some(origin))
        } else {
            if !folder.join(CONFIG).is_file() {
                return fail("adapter_config.json is missing: this is no adapter folder");
            }
            let config = PeftConfig::read(&folder.join(CONFIG))?;
            let file = SafeTensors::open(&folder.join(TENSORS), Access::Read)?;
            // What is not understood is not needed: the file has the bases themselves.
            let text = file.metadata().get(ORIGIN).cloned();
            let origin = text.and_then(|text| Object::parse(ORIGIN.into(), &text).ok());
            let origin = origin.and_then(|object| origin::from_json(&object).ok());
            (config, file, origin)
        };
        let (layers, whole) = names(&file, config.method)?;
        let mut adapter = PeftAdapter { config, file, compact, layers, whole, origin };
        let what = folder.join(CONFIG).display().to_string();
        adapter.config.resolve(what, &adapter.layers)?;
        adapter.layers.iter().try_for_each(|layer| check_layer(layer, &adapter.config, &adapter.file))?;
        Ok(adapter)
    }

    /// What the configuration says.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// Whether the folder is of the compact form.
    pub fn is_compact(&self) -> bool {
        self.compact
    }

    /// What the file says that its bases follow from.
    pub fn origin(&self) -> Option<BasesOrigin> {
        self.origin
    }

    /// The same adapter with its bases drawn in this type where the file holds none and PEFT drew uniform numbers:
    /// bf16, as PEFT does nearly everywhere, or f16, as on machines without bf16.
    pub fn drawn_in(mut self, dtype: DType) -> PeftAdapter {
        if let Some((_, draw @ TorchDraw::Uniform(_))) = &mut self.config.draw {
            *draw = TorchDraw::Uniform(dtype);
        }
        self
    }

    /// The adapted layers, as the file calls them.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// The parameters that the file holds whole, a new classifier's say, with their sizes.
    pub fn whole(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.whole.iter().filter_map(|(name, key)| Some((name.as_str(), &self.file.entry(key)?.dims[..])))
    }

    /// An error about the adapter's tensors.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::data(self.file.what(), message)
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
}

/// The adapted layers of a file, and its other parameters by the model's names with their keys.
fn names(file: &SafeTensors, method: &str) -> Result<(Vec<String>, BTreeMap<String, String>)> {
    let (mut layers, mut whole) = (BTreeSet::new(), BTreeMap::new());
    for (key, _) in file.entries() {
        if BASES.iter().any(|name| key.ends_with(name)) {
            continue;
        }
        let Some(name) = key.strip_prefix(MODEL) else {
            return Err(Error::data(file.what(), format!("`{key}` does not begin with `{MODEL}`")));
        };
        // With `bias: all` PEFT writes a module's bias before training and the one after it once more.
        if name.contains(".original_module.") || name.contains(".modules_to_save.") {
            continue;
        }
        match parts(method).iter().find_map(|part| name.strip_suffix(part)) {
            Some(layer) => drop(layers.insert(layer.to_string())),
            None => {
                let name = name.replace(".base_layer.", ".");
                if let Some(other) = whole.insert(name, key.to_string()) {
                    let message = format!("`{key}` and `{other}` are the same parameter");
                    return Err(Error::data(file.what(), message));
                }
            }
        }
    }
    if layers.is_empty() {
        return Err(Error::data(file.what(), format!("there is no layer adapted by {method}")));
    }
    Ok((layers.into_iter().collect(), whole))
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
        let (rank, _) = config.of(layer);
        if entry.dims.len() != 2 || has_rank && entry.dims[place] != rank {
            let message = format!("`{key}` is {:?}, but {CONFIG} says that `r` is {rank}", entry.dims);
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
