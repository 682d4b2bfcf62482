//! Model folders as Hugging Face writes them: config.json, and the tensors in one file or several.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::io::json::Object;
use crate::io::map::Access;
use crate::io::safetensors::{Entry, SafeTensors};
use crate::tensor::Tensor;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open model folder. Nothing but headers is read until a tensor is asked for.
///
/// ```no_run
/// use randlora::io::{Access, Checkpoint};
///
/// let checkpoint = Checkpoint::open("all-MiniLM-L6-v2".as_ref(), Access::Map)?;
/// println!("{} tensors", checkpoint.entries().count());
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: Object,
    files: Vec<SafeTensors>,
    /// Which file has the tensor of a name.
    places: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens config.json and model.safetensors, or the files that model.safetensors.index.json names.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Io`] that name the file that is missing or malformed.
    pub fn open(folder: &Path, access: Access) -> Result<Checkpoint> {
        let fail = |message: &str| Err(Error::data(folder.display().to_string(), message));
        if !folder.exists() {
            return fail("there is no such folder");
        }
        if !folder.is_dir() {
            return fail("this is a file: a model is a folder with config.json and model.safetensors");
        }
        if !folder.join("config.json").is_file() {
            return fail(
                "config.json is missing: a model is a folder with config.json and model.safetensors",
            );
        }
        let config = Object::read(&folder.join("config.json"))?;
        let (files, places) = if folder.join(SINGLE).is_file() {
            let file = SafeTensors::open(&folder.join(SINGLE), access)?;
            let places = file.entries().map(|(name, _)| (name.to_string(), 0)).collect();
            (vec![file], places)
        } else if folder.join(INDEX).is_file() {
            open_shards(folder, access)?
        } else if folder.join("pytorch_model.bin").is_file() {
            return fail(
                "the tensors are in pytorch_model.bin, which can run code: convert it to model.safetensors",
            );
        } else {
            return fail("model.safetensors is missing");
        };
        Ok(Checkpoint { folder: folder.to_path_buf(), config, files, places })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The family of the model, as in `bert`, where config.json names one (`model_type`).
    ///
    /// # Errors
    /// [`Error::Data`] where it is no text.
    pub fn family(&self) -> Result<Option<&str>> {
        self.config.text("model_type")
    }

    /// The fields of config.json.
    pub(crate) fn config(&self) -> &Object {
        &self.config
    }

    /// What the model's outputs are called (`id2label` of config.json), in order; empty where config.json
    /// does not say.
    pub fn labels(&self) -> Result<Vec<String>> {
        let mut numbered = Vec::new();
        for (number, name) in self.config.table("id2label")?.unwrap_or_default() {
            let number: usize =
                number.parse().map_err(|_| self.config.error(format!("`id2label` has `{number}`")))?;
            numbered.push((number, name.to_string()));
        }
        numbered.sort();
        Ok(numbered.into_iter().map(|(_, name)| name).collect())
    }

    /// What the outputs were trained as (`problem_type` of config.json), if config.json says so.
    pub fn problem(&self) -> Result<Option<&str>> {
        self.config.text("problem_type")
    }

    /// All tensors with their names, in the names' order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.places.iter().filter_map(|(name, &i)| Some((name.as_str(), self.files[i].entry(name)?)))
    }

    /// The sizes of a tensor's dimensions, if there is one of that name.
    pub fn sizes(&self, name: &str) -> Option<&[usize]> {
        Some(&self.files[*self.places.get(name)?].entry(name)?.dims)
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// A tensor; see [`SafeTensors::tensor`].
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        match self.places.get(name) {
            Some(&i) => self.files[i].tensor(name, device),
            None => {
                Err(Error::data(self.folder.display().to_string(), format!("there is no tensor `{name}`")))
            }
        }
    }
}

fn open_shards(folder: &Path, access: Access) -> Result<(Vec<SafeTensors>, BTreeMap<String, usize>)> {
    let index = Object::read(&folder.join(INDEX))?;
    let map = index.needed("weight_map", index.table("weight_map")?)?;
    let (mut files, mut numbers, mut places) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    for (name, file) in map {
        // A file of this folder, wherever the index may come from.
        if Path::new(file).components().count() != 1 || Path::new(file).file_name() != Some(file.as_ref()) {
            return Err(index.error(format!("`{file}` is no name of a file in this folder")));
        }
        let number = match numbers.get(file) {
            Some(&number) => number,
            None => {
                files.push(SafeTensors::open(&folder.join(file), access)?);
                numbers.insert(file, files.len() - 1);
                files.len() - 1
            }
        };
        if files[number].entry(name).is_none() {
            return Err(index.error(format!("`{name}` should be in {file}, but is not")));
        }
        places.insert(name.to_string(), number);
    }
    Ok((files, places))
}
