//! Filling a model with a checkpoint's values.

use std::collections::BTreeSet;

use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::Checkpoint;
use crate::nn::{ItemMut, Module};
use crate::tensor::Tensor;

/// What of a model and of its checkpoint had no counterpart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Parameters that the checkpoint lacks: they kept their first, random values.
    pub fresh: Vec<String>,
    /// Tensors of the checkpoint that the model has no use for.
    pub unused: Vec<String>,
}

/// Gives every parameter the checkpoint's value: the first of `names` that is there. Matrices keep the
/// narrow type in which they are stored; all else is f32.
///
/// # Errors
/// [`Error::Data`] for a parameter that the checkpoint lacks, unless it `may_be_fresh`, or that has
/// another shape there.
pub(crate) fn load<M: Module>(
    model: &mut M,
    checkpoint: &Checkpoint,
    device: &Device,
    names: impl Fn(&str) -> Vec<String>,
    may_be_fresh: impl Fn(&str) -> bool,
) -> Result<Loaded> {
    let what = checkpoint.folder().display().to_string();
    let (mut loaded, mut used) = (Loaded::default(), BTreeSet::new());
    model.try_visit_mut(&mut |name, item| {
        let ItemMut::Parameter(parameter) = item else { return Ok(()) };
        let Some(found) = names(name).into_iter().find(|name| checkpoint.has(name)) else {
            if may_be_fresh(name) {
                loaded.fresh.push(name.into());
                return Ok(());
            }
            return Err(Error::data(&what, format!("there is no tensor `{name}`, which the model needs")));
        };
        let value = checkpoint.tensor(&found, device)?;
        if value.shape() != parameter.value().shape() {
            let wanted = parameter.value().shape();
            let message = format!("`{found}` is {} where config.json makes it {wanted}", value.shape());
            return Err(Error::data(&what, message));
        }
        used.insert(found);
        parameter.replace(storage(value)?)
    })?;
    let unused = checkpoint.entries().map(|(name, _)| name).filter(|name| !used.contains(*name));
    loaded.unused = unused.map(String::from).collect();
    Ok(loaded)
}

fn storage(value: Tensor) -> Result<Tensor> {
    match value.dtype() {
        DType::BF16 | DType::F16 if value.rank() >= 2 => Ok(value),
        _ => value.to_dtype(DType::F32),
    }
}
