//! Adapter folders: as Hugging Face PEFT writes and reads them, and in a compact form of our own.
//!
//! # PEFT's form
//!
//! adapter_config.json and adapter_model.safetensors:
//!
//! | method, `peft_type` | tensors of a layer, after `base_model.model.<layer>` | once, after `base_model` | s |
//! |---|---|---|---|
//! | RandLoRA, `RANDLORA` | `.randlora_lambda` (r, n), `.randlora_gamma` (n, m) | `.randlora_A` (r, 1, MIN), `.randlora_B` (MAX, ⌈MIN/r⌉, r) | α/r |
//! | LoRA, `LORA` | `.lora_A.weight` (r, in), `.lora_B.weight` (out, r) | | α/r; α/√r with `use_rslora` |
//! | DoRA: LoRA with `use_dora` | LoRA's and `.lora_magnitude_vector` (out) | | as LoRA |
//! | PiSSA: LoRA with `init_lora_weights: "pissa"` | LoRA's | | as LoRA |
//! | VeRA, `VERA` | `.vera_lambda_b` (out), `.vera_lambda_d` (r) | `.vera_A` (r, IN), `.vera_B` (OUT, r) | 1 |
//! | AdaLoRA, `ADALORA` | `.lora_A` (k, in), `.lora_B` (out, k), `.lora_E` (k, 1) | | α/(`init_r` + 1e-5) |
//!
//! and of each, where it applies,
//!
//! | tensor | shape |
//! |---|---|
//! | `base_model.model.<parameter>` of a module that is trained whole | its own |
//! | `base_model.model.<layer>.base_layer.bias`, `base_model.model.<…>.bias` where biases are trained | (out) |
//!
//! PEFT has none of the other methods. Settings that are not known are kept when a folder is written again, and
//! refused by their names where they say more than "no".
//!
//! **What layers share.** OUT and IN are the largest output and the largest input size of the adapted layers, MAX and
//! MIN the same put in order; a layer reads A[:, :, :m] and B[:D, :n, :], or A[:, :in] and B[:out]. Files from before
//! PEFT's change #3714 hold RandLoRA's A and B once for every layer: they are read if all are the same. Where the
//! configuration says `save_projection: false` the file holds neither, and they are drawn as torch does
//! ([`TorchBases`](crate::adapters::TorchBases), [`TorchVera`](crate::adapters::TorchVera)). What is written here
//! says in its metadata, under `randlora_bases`, what RandLoRA's bases follow from.
//!
//! **PiSSA.** The file has A and B; PEFT takes s·B₀·A₀, the principal part of the weight, out of the model whenever it
//! loads one, by the SVD, and so does the adapter here. `pissa_niter_…` approximates that part with random numbers of
//! the moment, in PEFT too: it is refused, as are other starts that change the model (`olora`, `corda`, `loftq`). What
//! PEFT's `path_initial_model_for_weight_conversion` makes of them is plain LoRA.
//!
//! **AdaLoRA.** k is `init_r` until the ranks are chosen. Then `rank_pattern` has, under `<layer>.lora_E`, true for each
//! of the `init_r` triplets that is left, and the file holds those alone; the scale stays. From such a file no more is
//! taken away in training.
//!
//! The compact form and what bases follow from are described at [`save_compact`].

mod attach;
mod bases;
mod compact;
mod config;
mod describe;
mod expression;
mod form;
mod kind;
mod make;
mod masks;
mod origin;
mod pattern;
mod save;
mod shared;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::adapters::{BasesOrigin, Targets, TorchDraw};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::json::Object;
use crate::io::map::Access;
use crate::io::peft::form::{Form, Side};
use crate::io::peft::kind::Kind;
use crate::io::safetensors::SafeTensors;
use crate::tensor::Tensor;

pub use compact::save_compact;
pub use config::{Biases, PeftConfig};
pub use save::{PeftTask, save_peft};

pub(super) use describe::has_form;

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
/// println!("{} of rank {}", adapter.config().method(), adapter.config().rank);
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
        let (layers, whole) = names(&file, config.form())?;
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
        if let Kind::RandLora(Some((_, draw @ TorchDraw::Uniform(_)))) = &mut self.config.kind {
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

    /// The trained tensors of a layer by the names that they have in its adapter, as they are stored:
    /// `lambda` (r, n) and `gamma` (n, m), say, or `a` (r, in) and `b` (out, r).
    ///
    /// # Errors
    /// [`Error::Data`] where the file lacks one of them.
    pub fn layer(&self, layer: &str, device: &Device) -> Result<Vec<(&'static str, Tensor)>> {
        let parts = self.config.form().parts.iter();
        parts
            .map(|part| Ok((part.name, self.file.tensor(&format!("{MODEL}{layer}{}", part.suffix), device)?)))
            .collect()
    }
}

/// The adapted layers of a file, and its other parameters by the model's names with their keys.
fn names(file: &SafeTensors, form: &Form) -> Result<(Vec<String>, BTreeMap<String, String>)> {
    let (mut layers, mut whole) = (BTreeSet::new(), BTreeMap::new());
    for (key, _) in file.entries() {
        if form.shared.iter().flatten().any(|name| key.ends_with(name)) {
            continue;
        }
        let Some(name) = key.strip_prefix(MODEL) else {
            return Err(Error::data(file.what(), format!("`{key}` does not begin with `{MODEL}`")));
        };
        // With `bias: all` PEFT writes a module's bias before training and the one after it once more.
        if name.contains(".original_module.") || name.contains(".modules_to_save.") {
            continue;
        }
        match form.parts.iter().find_map(|part| name.strip_suffix(part.suffix)) {
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
        return Err(Error::data(file.what(), format!("there is no layer adapted by {}", form.method)));
    }
    Ok((layers.into_iter().collect(), whole))
}

/// An error unless the file has all tensors of a layer's adapter, of the rank that the configuration says,
/// and PEFT would give the layer one.
fn check_layer(layer: &str, config: &PeftConfig, file: &SafeTensors) -> Result<()> {
    let (form, (rank, _)) = (config.form(), config.of(layer));
    for part in form.parts {
        let key = format!("{MODEL}{layer}{}", part.suffix);
        let Some(entry) = file.entry(&key) else {
            let message = format!("there is no tensor `{key}`, which the layer's adapter needs");
            return Err(Error::data(file.what(), message));
        };
        let fits = |(&side, &size): (&Side, &usize)| side != Side::Rank || size == rank;
        if entry.dims.len() != part.sides.len() || !part.sides.iter().zip(&entry.dims).all(fits) {
            let message =
                format!("`{key}` is {:?}, but {CONFIG} says that `{}` is {rank}", entry.dims, form.rank);
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
