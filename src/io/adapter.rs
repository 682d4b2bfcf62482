//! Adapter folders of any method.

use std::path::Path;

use crate::adapters::Attached;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::json::Object;
use crate::io::own::{self, OwnAdapter, save_own};
use crate::io::peft::{PeftAdapter, PeftTask, has_form, save_peft};
use crate::nn::{Linear, Module};

/// An open adapter folder: PEFT's form, or this crate's own for the methods that are not exchanged with it.
///
/// ```
/// use randlora::adapters::{Nola, Targets, attach};
/// use randlora::io::{Adapter, PeftTask, save_adapter};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let model = || -> randlora::Result<Vec<Linear>> {
///     Ok(vec![Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?])
/// };
/// let mut trained = model()?;
/// attach(&mut trained, &Nola::default(), &Targets::AllLinear, &[])?;
/// let folder = std::env::temp_dir().join(format!("randlora-doc-{}", std::process::id()));
/// save_adapter(&trained, &folder, &PeftTask::default())?;
///
/// let mut other = model()?;
/// let adapter = Adapter::open(&folder)?;
/// assert_eq!(adapter.attach(&mut other)?.trained, trained.trainable_count());
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // There are never many.
pub enum Adapter {
    /// In PEFT's form.
    Peft(PeftAdapter),
    /// In this crate's.
    Own(OwnAdapter),
}

impl Adapter {
    /// Opens a folder.
    ///
    /// # Errors
    /// Those of [`PeftAdapter::open`] and [`OwnAdapter::open`].
    pub fn open(folder: &Path) -> Result<Adapter> {
        let config = folder.join("adapter_config.json");
        // What is wrong with a folder that is not ours is PEFT's to say.
        let own = config.is_file() && Object::read(&config)?.text("peft_type")? == Some(own::KIND);
        match own {
            true => OwnAdapter::open(folder).map(Adapter::Own),
            false => PeftAdapter::open(folder).map(Adapter::Peft),
        }
    }

    /// Attaches the adapter to a model, whose other parameters are frozen.
    ///
    /// # Errors
    /// Those of [`PeftAdapter::attach`] and [`OwnAdapter::attach`].
    pub fn attach<M: Module + ?Sized>(&self, model: &mut M) -> Result<Attached> {
        match self {
            Adapter::Peft(adapter) => adapter.attach(model),
            Adapter::Own(adapter) => adapter.attach(model),
        }
    }

    /// The same adapter with its bases drawn in this type where PEFT drew them and the file holds none; see
    /// [`PeftAdapter::drawn_in`].
    pub fn drawn_in(self, dtype: DType) -> Adapter {
        match self {
            Adapter::Peft(adapter) => Adapter::Peft(adapter.drawn_in(dtype)),
            own => own,
        }
    }

    /// The model that the adapter was made for, if the folder says so.
    pub fn base_model(&self) -> Option<&str> {
        match self {
            Adapter::Peft(adapter) => adapter.config().base_model.as_deref(),
            Adapter::Own(adapter) => adapter.base_model(),
        }
    }

    /// Saves a model's adapters, which come from this folder and may have been trained on since, in its form.
    ///
    /// # Errors
    /// Those of [`PeftAdapter::save`] and [`save_own`].
    pub fn save<M: Module + ?Sized>(&self, model: &M, folder: &Path) -> Result<()> {
        match self {
            Adapter::Peft(adapter) => adapter.save(model, folder),
            Adapter::Own(adapter) => save_own(model, folder, &adapter.task()),
        }
    }

    /// The parameters that the file holds whole, a new classifier's say, with their sizes.
    pub fn whole(&self) -> Vec<(&str, &[usize])> {
        match self {
            Adapter::Peft(adapter) => adapter.whole().collect(),
            Adapter::Own(adapter) => adapter.whole().collect(),
        }
    }

    /// An error about the adapter's tensors.
    pub fn error(&self, message: impl Into<String>) -> Error {
        match self {
            Adapter::Peft(adapter) => adapter.error(message),
            Adapter::Own(adapter) => adapter.error(message),
        }
    }
}

/// Saves a model's adapters and what else of it is trained to a folder: as PEFT reads them where it has the method
/// (RandLoRA, LoRA, DoRA, PiSSA, VeRA, AdaLoRA), else in this crate's own form.
///
/// # Errors
/// Those of [`save_peft`] and [`save_own`].
pub fn save_adapter<M: Module + ?Sized>(model: &M, folder: &Path, task: &PeftTask) -> Result<()> {
    let own = |(_, layer): (String, &Linear)| layer.adapter().is_some_and(|adapter| !has_form(adapter));
    match model.linears().into_iter().any(own) {
        true => save_own(model, folder, task),
        false => save_peft(model, folder, task),
    }
}
