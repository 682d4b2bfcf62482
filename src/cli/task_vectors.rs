//! aTLAS's task vectors, from folders of models that were fine-tuned from the same base.

use std::path::{Path, PathBuf};

use randlora::adapters::{Targets, TaskVector, task_vector};
use randlora::analysis::norm;
use randlora::io::{Access, Checkpoint};
use randlora::models::{Bert, BertLoad};
use randlora::nn::Module;
use randlora::{Device, Error, Result};

use super::method::MethodName;
use super::model::{PeftDraw, is_adapter, with_adapters};
use super::table::wrong;

/// What an option for them says of itself.
pub(crate) const HELP: &str = "What --method atlas combines, with commas between: folders of whole models that were \
                               fine-tuned from the model, as --method full and `merge` write them, or of adapters \
                               for it";

/// Where task vectors come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Folders<'a> {
    pub(crate) folders: &'a [PathBuf],
    /// How adapters among them are read.
    pub(crate) draw: PeftDraw,
    /// How models among them are read.
    pub(crate) access: Access,
}

impl Folders<'_> {
    /// An error where this method needs folders and has none, or has some and needs none.
    pub(crate) fn check(&self, method: MethodName) -> Result<()> {
        let message = match (method == MethodName::Atlas, self.folders.is_empty()) {
            (true, true) => {
                "atlas combines models that were fine-tuned from this one: name their folders, with commas between"
                    .into()
            }
            (false, false) => {
                format!("{} combines none: say `--method atlas`, or leave them out", method.name())
            }
            _ => return Ok(()),
        };
        Err(Error::Config { what: "--task-vectors", message })
    }

    /// The task vectors, in these layers, of a base that is the model of `from`.
    ///
    /// # Errors
    /// [`Error::Data`] that names the folder whose model lacks a layer, has one of another size, or is the base
    /// itself in all of them; and as opening the folders.
    pub(crate) fn load(&self, base: &Bert, from: &Checkpoint, layers: &Targets) -> Result<Vec<TaskVector>> {
        self.folders.iter().map(|folder| self.one(folder, base, from, layers)).collect()
    }

    fn one(&self, folder: &Path, base: &Bert, from: &Checkpoint, layers: &Targets) -> Result<TaskVector> {
        let device = base.parameters().first().map_or_else(Device::cpu, |(_, p)| p.value().device().clone());
        let tuned = match is_adapter(folder) {
            true => self.adapted(folder, from, &device)?,
            false => self.whole(folder, layers, &device)?,
        };
        let vector = task_vector(base, &tuned, layers).map_err(|error| wrong(folder, error.to_string()))?;
        let sizes = vector.values().map(norm).collect::<Result<Vec<f64>>>()?;
        match sizes.iter().sum::<f64>() {
            size if !size.is_finite() => {
                Err(wrong(folder, "its weights are not finite: the model is broken"))
            }
            0.0 if !sizes.is_empty() => {
                let message = "it changes none of the layers that are adapted: name a model that was fine-tuned in \
                               them, or others with `--targets`";
                Err(wrong(folder, message))
            }
            _ => Ok(vector),
        }
    }

    /// The base with an adapter.
    fn adapted(&self, folder: &Path, base: &Checkpoint, device: &Device) -> Result<Bert> {
        let (name, adapter) = ("task", self.draw.open(folder)?);
        let (mut model, _) = with_adapters(base, &[(name, &adapter)], device)?;
        model.activate(name)?;
        Ok(model.into_model())
    }

    /// A model that was fine-tuned whole.
    fn whole(&self, folder: &Path, layers: &Targets, device: &Device) -> Result<Bert> {
        let checkpoint = Checkpoint::open(folder, self.access)?;
        let (model, loaded) = Bert::load(&checkpoint, BertLoad::default(), device)?;
        // What the folder lacks is random in the model.
        let lacks = |name: &&String| name.strip_suffix(".weight").is_some_and(|layer| layers.matches(layer));
        match loaded.fresh.iter().find(lacks) {
            Some(name) => {
                Err(wrong(folder, format!("there is no tensor `{name}`, which its task vector needs")))
            }
            None => Ok(model),
        }
    }
}
