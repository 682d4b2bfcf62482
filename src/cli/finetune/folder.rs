//! What a training leaves behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use randlora::io::{Adapter, Checkpoint, PeftTask, save_adapter};
use randlora::models::{Bert, Head};
use randlora::nn::{ItemMut, Module};
use randlora::train::Progress;
use randlora::{Error, Result, Tensor};

use super::args::Args;
use crate::cli::about::About;

/// The folder that a training writes to.
pub(super) struct Folder<'a> {
    path: PathBuf,
    checkpoint: &'a Checkpoint,
    about: About,
    base: String,
    name: &'static str,
    /// The adapter that the training began with.
    adapter: Option<&'a Adapter>,
}

impl<'a> Folder<'a> {
    /// Makes the folder.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be made.
    pub(super) fn new(
        args: &Args,
        checkpoint: &'a Checkpoint,
        adapter: Option<&'a Adapter>,
        about: About,
    ) -> Result<Folder<'a>> {
        fs::create_dir_all(&args.out).map_err(|source| Error::Io { path: args.out.clone(), source })?;
        let base = args.model.model.display().to_string();
        Ok(Folder { path: args.out.clone(), checkpoint, about, base, name: args.method.name(), adapter })
    }

    /// A file or folder within.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The method by what it has put into the model.
    pub(super) fn method(&self, model: &Bert) -> &'static str {
        let adapter = model.linears().into_iter().find_map(|(_, layer)| Some(layer.adapter()?.method()));
        adapter.unwrap_or(self.name)
    }

    /// Saves the model's adapter, or where it has none the whole model, in place of what an earlier
    /// training has left under that name.
    pub(super) fn save(&self, model: &Bert, name: &str) -> Result<()> {
        let [new, old] = ["new", "old"].map(|what| self.path(&format!(".{name}.{what}")));
        let folder = self.path(name);
        let error = |path: &Path| {
            let path = path.to_path_buf();
            |source| Error::Io { path, source }
        };
        for leftover in [&new, &old] {
            remove(leftover).map_err(error(leftover))?;
        }
        self.write(model, &new).inspect_err(|_| drop(remove(&new)))?;
        if folder.exists() {
            fs::rename(&folder, &old).map_err(error(&folder))?;
        }
        fs::rename(&new, &folder).map_err(error(&folder))?;
        remove(&old).map_err(error(&old))
    }

    fn write(&self, model: &Bert, folder: &Path) -> Result<()> {
        if let Some(adapter) = self.adapter {
            // In the form that it came in, with all that its configuration says.
            adapter.save(model, folder)?;
        } else if model.linears().iter().any(|(_, layer)| layer.adapter().is_some()) {
            let task = PeftTask { name: Some("SEQ_CLS".into()), base_model: Some(self.base.clone()) };
            save_adapter(model, folder, &task)?;
        } else {
            let labels = self.about.task.labels().map_or(vec![], |labels| labels.names().to_vec());
            let head = Head { labels, problem: Some(self.about.task.problem().into()) };
            model.save(self.checkpoint, &head, folder)?;
        }
        self.about.write(folder)
    }
}

/// Removes a folder, or what else is there.
fn remove(path: &Path) -> std::io::Result<()> {
    match path.is_dir() {
        true => fs::remove_dir_all(path),
        false if path.exists() => fs::remove_file(path),
        false => Ok(()),
    }
}

/// The last trained values that are known to be good: those of a step that a finite loss came after.
pub(super) struct Kept {
    good: (usize, BTreeMap<String, Tensor>),
    next: Option<(usize, BTreeMap<String, Tensor>)>,
}

/// Steps from one to the next within an epoch. The values are shared with the model until it changes them.
const EVERY: usize = 50;

impl Kept {
    /// Of a model that is as good as it was given.
    pub(super) fn of(model: &Bert) -> Kept {
        Kept { good: (0, trained(model)), next: None }
    }

    /// To be called after each step.
    pub(super) fn after(&mut self, progress: &Progress, model: &Bert) {
        if let Some(next) = self.next.take() {
            self.good = next;
        }
        let steps = progress.step + 1;
        // What an epoch's end saves must not give way to something older.
        if progress.epoch_ends || steps.is_multiple_of(EVERY) {
            self.next = Some((steps, trained(model)));
        }
    }

    /// Gives them back to the model, and says after how many steps it had them.
    pub(super) fn restore(&self, model: &mut Bert) -> Result<usize> {
        let (steps, values) = &self.good;
        model.try_visit_mut(&mut |name, item| match (item, values.get(name)) {
            (ItemMut::Parameter(parameter), Some(value)) => parameter.replace(value.clone()),
            _ => Ok(()),
        })?;
        Ok(*steps)
    }
}

fn trained(model: &Bert) -> BTreeMap<String, Tensor> {
    let parameters = model.parameters().into_iter().filter(|(_, p)| p.is_trainable());
    parameters.map(|(name, p)| (name, p.value().clone())).collect()
}
