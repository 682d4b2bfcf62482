//! aTLAS (Zhang et al., NeurIPS 2024): ΔW = Σᵢ λᵢ·τᵢ, the task vectors τᵢ of models that were fine-tuned from
//! the same base, each with a trained coefficient in each layer.
//!
//! A task vector is the difference of two models' weights. Task arithmetic adds them with one number each;
//! "anisotropic" scaling gives each block of parameters its own, here each adapted weight. λ starts at 0, so
//! that ΔW = 0: n numbers a layer for n task vectors. Biases and normalisations keep the base's values.
//!
//! The τᵢ (out×in) are the caller's, not copies, where they have the layer's type and device. Σᵢ λᵢ·τᵢ is formed
//! (out×in) in each pass, as is its gradient: one product with the input instead of n.

use std::collections::BTreeMap;

use crate::adapters::attach::{LayerInfo, Method, Targets, each};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Context, Linear, LinearAdapter, Module, Parameter, Recipe};
use crate::tensor::Tensor;

/// The weights' differences of one task, matrices (out, in), by the names of their layers.
pub type TaskVector = BTreeMap<String, Tensor>;

/// What the fine-tuned model's linear layers that `targets` means have more than the base's: each a matrix
/// (out, in), in f64 where either weight is, else in f32. What adapters of either add to its weight counts too.
/// Empty where `targets` means no layer of the base.
///
/// # Errors
/// [`Error::NoMatch`] where the fine-tuned model lacks a layer, [`Error::Shape`] where one is of another
/// size, [`Error::Config`] where the models are on two devices, [`Error::DType`] for f64 on a device without it,
/// [`Error::OutOfMemory`] and [`Error::OpenCl`], and those of [`LinearAdapter::delta`].
pub fn task_vector<M: Module + ?Sized>(base: &M, tuned: &M, targets: &Targets) -> Result<TaskVector> {
    let tuned: BTreeMap<String, _> = tuned.linears().into_iter().collect();
    let mut vector = BTreeMap::new();
    for (name, layer) in base.linears().into_iter().filter(|(name, _)| targets.matches(name)) {
        let Some(other) = tuned.get(&name) else {
            let available = tuned.into_keys().collect();
            return Err(Error::NoMatch { wanted: format!("`{name}` of the base"), available });
        };
        let (from, to) = (layer.weight().value(), other.weight().value());
        if from.shape() != to.shape() {
            let message = format!("`{name}` is {} in the base and {} after it", from.shape(), to.shape());
            return Err(Error::shape("task vector", message));
        }
        vector.insert(name, difference(layer, other)?);
    }
    Ok(vector)
}

fn difference(base: &Linear, tuned: &Linear) -> Result<Tensor> {
    let weights = [tuned, base].map(|layer| layer.weight().value().detach());
    let dtype = if weights.iter().any(|x| x.dtype() == DType::F64) { DType::F64 } else { DType::F32 };
    let [to, from] = [&weights[0], &weights[1]].map(|x| x.to_dtype(dtype));
    let mut difference = to?.sub(&from?)?;
    // After the weights: where they are the same, what is left is what the adapter adds, to the bit.
    if let Some(delta) = tuned.delta()? {
        difference = difference.add(&delta.detach().to_dtype(dtype)?)?;
    }
    match base.delta()? {
        Some(delta) => difference.sub(&delta.detach().to_dtype(dtype)?),
        None => Ok(difference),
    }
}

/// The task vectors to combine.
///
/// ```
/// use randlora::adapters::{Atlas, Targets, attach, task_vector};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let model = |seed| Linear::init(&Init::seeded(seed, &Device::cpu()), 20, 30, true);
/// let mut base = model(0)?;
/// let vector = |tuned| task_vector(&base, &tuned, &Targets::AllLinear);
/// let vectors = vec![vector(model(1)?)?, vector(model(2)?)?];
/// attach(&mut base, &Atlas { vectors }, &Targets::AllLinear, &[])?;
/// assert_eq!(base.trainable_count(), 2);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Atlas {
    /// One for each task.
    pub vectors: Vec<TaskVector>,
}

impl Method for Atlas {
    fn name(&self) -> &'static str {
        "atlas"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        if self.vectors.is_empty() {
            return Err(Error::config("vectors", "there is no task vector to combine: give at least one"));
        }
        each(layers, |layer| AtlasAdapter::new(self, layer))
    }
}

/// One layer's coefficients and task vectors.
#[derive(Clone, Debug)]
pub struct AtlasAdapter {
    lambda: Parameter,
    vectors: Vec<Tensor>,
}

impl AtlasAdapter {
    /// The adapter of a layer at its start.
    ///
    /// # Errors
    /// [`Error::NoMatch`] where a task vector lacks the layer, [`Error::Shape`] where it has another size.
    pub fn new(settings: &Atlas, layer: &LayerInfo) -> Result<AtlasAdapter> {
        let own = |vector: &TaskVector| {
            let Some(tau) = vector.get(&layer.name) else {
                let available = vector.keys().cloned().collect();
                return Err(Error::NoMatch {
                    wanted: format!("the task vector of `{}`", layer.name),
                    available,
                });
            };
            if tau.dims() != [layer.outputs, layer.inputs] {
                let message = format!(
                    "the task vector of `{}` is {}, the weight {}",
                    layer.name,
                    tau.shape(),
                    layer.weight.shape()
                );
                return Err(Error::shape("atlas", message));
            }
            tau.detach().to_dtype(layer.dtype)?.to_device(&layer.device)
        };
        let vectors: Vec<Tensor> = settings.vectors.iter().map(own).collect::<Result<_>>()?;
        let lambda = Tensor::zeros([vectors.len()], layer.dtype, &layer.device)?;
        Ok(AtlasAdapter { lambda: Parameter::new(lambda), vectors })
    }

    fn sum(&self, lambda: &Tensor) -> Result<Tensor> {
        let mut terms = self.vectors.iter().enumerate().map(|(i, tau)| lambda.slice(0, i..i + 1)?.mul(tau));
        let first = terms.next().unwrap_or_else(|| Err(Error::config("vectors", "there is none")))?;
        terms.try_fold(first, |sum, term| sum.add(&term?))
    }
}

impl LinearAdapter for AtlasAdapter {
    fn method(&self) -> &'static str {
        "atlas"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        x.linear(&self.sum(&self.lambda.tensor(ctx))?, None)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("lambda", &self.lambda)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("lambda", &mut self.lambda)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        self.sum(self.lambda.value())
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(Recipe::new())
    }

    fn given(&self) -> &[Tensor] {
        &self.vectors
    }
}
