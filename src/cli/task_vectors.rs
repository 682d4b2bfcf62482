//! aTLAS's task vectors, from folders of models that were fine-tuned from the same base.

use std::path::{Path, PathBuf};

use randlora::adapters::{Targets, TaskVector, task_vector};
use randlora::analysis::norm;
use randlora::io::{Access, Adapter, Checkpoint};
use randlora::models::{Bert, BertLoad};
use randlora::nn::Module;
use randlora::{Device, Error, Result};

use super::method::MethodName;
use super::model::{PeftDraw, is_adapter, with_adapters};
use super::several::base_name;
use super::table::wrong;

/// What an option for them says of itself.
pub(crate) const HELP: &str = "What --method atlas combines, with commas between: folders of whole models that were \
                               fine-tuned from the model, as --method full and `merge` write them, or of adapters \
                               for it. Only what they change in the layers of --targets counts";

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
    /// [`Error::Data`] that names the folder whose model lacks a layer, has one of another size or numbers that
    /// are not finite, or is the base itself in all of them, or that holds a model and an adapter; and as opening
    /// the folders.
    pub(crate) fn load(&self, base: &Bert, from: &Checkpoint, layers: &Targets) -> Result<Vec<TaskVector>> {
        self.folders.iter().map(|folder| self.one(folder, base, from, layers)).collect()
    }

    fn one(&self, folder: &Path, base: &Bert, from: &Checkpoint, layers: &Targets) -> Result<TaskVector> {
        let device = base.parameters().first().map_or_else(Device::cpu, |(_, p)| p.value().device().clone());
        let tuned = match (is_adapter(folder), is_model(folder)) {
            (true, true) => {
                let message = "it holds both a model and an adapter: give each a folder of its own, and name the one \
                               that is meant";
                return Err(wrong(folder, message));
            }
            (true, false) => self.adapted(folder, from, &device)?,
            (false, _) => self.whole(folder, from, layers, &device)?,
        };
        // Not all errors are the folder's: memory may be short, say.
        let vector = task_vector(base, &tuned, layers).map_err(|error| match error {
            Error::Shape { message, .. } => misfit(folder, &message, from),
            Error::NoMatch { wanted, .. } => misfit(folder, &format!("it lacks {wanted}"), from),
            // An update that depends on the input.
            Error::Config { message, .. } => {
                wrong(folder, format!("{message}; name a whole model, or an adapter that can be merged"))
            }
            other => other,
        })?;
        check_sizes(folder, &vector, from)?;
        Ok(vector)
    }

    /// The base with an adapter.
    fn adapted(&self, folder: &Path, base: &Checkpoint, device: &Device) -> Result<Bert> {
        let (name, adapter) = ("task", self.draw.open(folder)?);
        note_model(folder, &adapter, base);
        let added = with_adapters(base, &[(name, &adapter)], device);
        let (mut model, _) = added.map_err(|error| match error {
            Error::NoMatch { wanted, .. } => {
                let base = base.folder().display();
                wrong(folder, format!("{base} has no {wanted}: name an adapter that was trained for it"))
            }
            other => other,
        })?;
        model.activate(name)?;
        Ok(model.into_model())
    }

    /// A model that was fine-tuned whole from the model of `base`.
    fn whole(&self, folder: &Path, base: &Checkpoint, layers: &Targets, device: &Device) -> Result<Bert> {
        let checkpoint = Checkpoint::open(folder, self.access)?;
        let (model, loaded) = Bert::load(&checkpoint, BertLoad::default(), device)?;
        // What the folder lacks is random in the model.
        let lacks = |name: &&String| name.strip_suffix(".weight").is_some_and(|layer| layers.matches(layer));
        match loaded.fresh.iter().find(lacks) {
            Some(name) => Err(misfit(folder, &format!("there is no tensor `{name}`"), base)),
            None => Ok(model),
        }
    }
}

/// Says where an adapter names another model: it shows in nothing else if the sizes are the same.
fn note_model(folder: &Path, adapter: &Adapter, base: &Checkpoint) {
    // The folder's own name, also of `.`.
    let path = base.folder().canonicalize().unwrap_or_default();
    if let (Some(own), Some(other)) = (path.file_name(), base_name(adapter))
        && own != other
    {
        let (folder, base) = (folder.display(), base.folder().display());
        eprintln!("note: {folder} was made for {other}: is it the same model as {base}?");
    }
}

/// Whether this is the folder of a model with its tensors.
fn is_model(folder: &Path) -> bool {
    let there = |name: &str| folder.join(name).is_file();
    there("config.json") && (there("model.safetensors") || there("model.safetensors.index.json"))
}

/// An error where a task vector is not finite, or is 0 in all layers.
fn check_sizes(folder: &Path, vector: &TaskVector, base: &Checkpoint) -> Result<()> {
    let mut any = vector.is_empty();
    for (layer, tau) in vector {
        let size = norm(tau)?;
        if !size.is_finite() {
            return Err(misfit(folder, &format!("what it changes in `{layer}` is not finite"), base));
        }
        any |= size != 0.0;
    }
    match any {
        true => Ok(()),
        false => {
            let message = "it changes none of the layers that are adapted: name a model that was fine-tuned in \
                           them, or others with `--targets`";
            Err(wrong(folder, message))
        }
    }
}

/// The error for a folder whose task vector does not fit the base.
fn misfit(folder: &Path, message: &str, base: &Checkpoint) -> Error {
    let base = base.folder().display();
    wrong(
        folder,
        format!(
            "{message}: name a model that was fine-tuned from {base}, or leave that layer out with `--targets`"
        ),
    )
}
