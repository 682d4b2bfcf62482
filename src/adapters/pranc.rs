//! PRANC (Nooralinejad et al., ICCV 2023), as an adapter: ΔW = s·Σⱼ αⱼ·Rⱼ, j = 1 … k, with random Rⱼ
//! (out×in), uniform in ±1/√in, and the coefficients α (k) trained, from 0, so that ΔW = 0.
//!
//! The paper trains a network from nothing as a sum of random networks that share one α. Here each layer
//! has an α of its own, as the paper does where it splits large networks, and the sum is added to the
//! frozen weight.
//!
//! The Rⱼ are made from the seed in each pass and not held. ΔW has full rank and no factors: it is formed
//! (out×in) in each pass, and so is its gradient. k·out·in random numbers a pass are this method's cost.

use crate::adapters::attach::{LayerInfo, Method, each, finite_scale};
use crate::adapters::nola::some_coefficients;
use crate::adapters::recipe::recipe;
use crate::error::Result;
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::ops::random_sum::random_sum;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// PRANC's settings.
///
/// ```
/// use randlora::adapters::{Pranc, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &Pranc { coefficients: 10, ..Pranc::default() }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 10);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pranc {
    /// k: the random matrices of a layer.
    pub coefficients: usize,
    /// s. 1 by default; the paper has none.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What the random matrices follow from.
    pub seed: u64,
}

impl Default for Pranc {
    fn default() -> Pranc {
        Pranc { coefficients: 64, scale: 1.0, dropout: 0.0, seed: 0 }
    }
}

impl Method for Pranc {
    fn name(&self) -> &'static str {
        "pranc"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        some_coefficients(self.coefficients)?;
        finite_scale(self.scale)?;
        check_rate(self.dropout)?;
        each(layers, |layer| PrancAdapter::new(self, layer))
    }
}

/// One layer's coefficients, and what their matrices follow from.
#[derive(Clone, Debug)]
pub struct PrancAdapter {
    alpha: Parameter,
    shape: Shape,
    key: u64,
    settings: Pranc,
}

impl PrancAdapter {
    /// The adapter of a layer at its start.
    pub fn new(settings: &Pranc, layer: &LayerInfo) -> Result<PrancAdapter> {
        let Pranc { coefficients, seed, .. } = *settings;
        Ok(PrancAdapter {
            alpha: Parameter::new(Tensor::zeros([coefficients], layer.dtype, &layer.device)?),
            shape: Shape::new(&[layer.outputs, layer.inputs])?,
            key: layer.init(seed).key("pranc"),
            settings: *settings,
        })
    }

    fn sum(&self, alpha: &Tensor) -> Result<Tensor> {
        random_sum(alpha, self.shape, self.key, self.settings.scale / (self.shape[1].max(1) as f64).sqrt())
    }
}

impl LinearAdapter for PrancAdapter {
    fn method(&self) -> &'static str {
        "pranc"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        ctx.dropout(x, self.settings.dropout)?.linear(&self.sum(&self.alpha.tensor(ctx))?, None)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("alpha", &self.alpha)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("alpha", &mut self.alpha)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        self.sum(self.alpha.value())
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => coefficients, scale, dropout, seed))
    }
}
