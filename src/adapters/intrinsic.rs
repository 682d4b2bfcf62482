//! Fine-tuning in a random subspace (Li et al., ICLR 2018; Aghajanyan et al., ACL 2021): ΔW = P·θ with θ (d)
//! trained, from 0, and a random P from d numbers to all out·in of a weight.
//!
//! P is the Fastfood transform of the papers: with it P·θ costs out·in·log(out·in) operations, and P needs
//! 8 bytes a row instead of 4·d. Layers of the same size share one P. Columns of P have length 1, so that
//! ΔW is as long as θ; there is no scale.
//!
//! The papers' θ belongs to the whole model and measures its intrinsic dimension. Here each layer has a θ of
//! its own. ΔW has no factors: it is formed (out×in) in each pass, and so is its gradient.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use crate::adapters::attach::{LayerInfo, Method, each};
use crate::adapters::nola::some_coefficients;
use crate::adapters::recipe::recipe;
use crate::error::Result;
use crate::nn::{Context, Init, LinearAdapter, Parameter, Recipe};
use crate::ops::fastfood::{Fastfood, fastfood};
use crate::tensor::Tensor;

/// The random subspace's settings.
///
/// ```
/// use randlora::adapters::{Intrinsic, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &Intrinsic { coefficients: 100, seed: 0 }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 100);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intrinsic {
    /// d: the numbers that a layer trains, at most as many as its weight has.
    pub coefficients: usize,
    /// What P follows from.
    pub seed: u64,
}

impl Default for Intrinsic {
    fn default() -> Intrinsic {
        Intrinsic { coefficients: 256, seed: 0 }
    }
}

impl Method for Intrinsic {
    fn name(&self) -> &'static str {
        "intrinsic"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        some_coefficients(self.coefficients)?;
        let mut transforms: BTreeMap<usize, Arc<Fastfood>> = BTreeMap::new();
        for layer in layers {
            let size = layer.inputs * layer.outputs;
            if let Entry::Vacant(place) = transforms.entry(size) {
                let key = Init::seeded(self.seed, &layer.device).key(&format!("intrinsic.{size}"));
                place.insert(Arc::new(Fastfood::new(size, self.coefficients, key)?));
            }
        }
        each(layers, |layer| {
            let theta = Tensor::zeros([self.coefficients], layer.dtype, &layer.device)?;
            Ok(IntrinsicAdapter {
                theta: Parameter::new(theta),
                transform: transforms[&(layer.inputs * layer.outputs)].clone(),
                shape: [layer.outputs, layer.inputs],
                settings: *self,
            })
        })
    }
}

/// One layer's θ, and the transform that it shares.
#[derive(Clone, Debug)]
pub struct IntrinsicAdapter {
    theta: Parameter,
    transform: Arc<Fastfood>,
    shape: [usize; 2],
    settings: Intrinsic,
}

impl LinearAdapter for IntrinsicAdapter {
    fn method(&self) -> &'static str {
        "intrinsic"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let delta = fastfood(&self.theta.tensor(ctx), &self.transform)?.reshape(self.shape)?;
        x.linear(&delta, None)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("theta", &self.theta)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("theta", &mut self.theta)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        fastfood(self.theta.value(), &self.transform)?.reshape(self.shape)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => coefficients, seed))
    }
}
