//! HydraLoRA (Tian et al., NeurIPS 2024): one A, several B, and a router that weighs them for each token,
//!
//! > y = W0·x + b + s·Σᵢ gᵢ(x)·Bᵢ·A·x, g(x) = softmax(G·x), i = 1 … N
//!
//! with A (r×in), Bᵢ (out×r) and G (N×in) trained. A and G start uniform in ±1/√in, the Bᵢ at 0, so that
//! nothing changes at the start. The scale s is LoRA's alpha/r; dropout is of A's input, not of the
//! router's.
//!
//! The change depends on the input, so there is no ΔW: the adapter cannot be merged. The N products are one:
//! with u the N·r numbers gᵢ·(A·x)ₖ of a token, the update is \[B₁ … B_N\]·u.

use crate::adapters::attach::{LayerInfo, Method, at_least_rank_1, each, finite_scale};
use crate::adapters::recipe::recipe;
use crate::error::{Error, Result};
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::tensor::Tensor;

/// HydraLoRA's settings.
///
/// ```
/// use randlora::adapters::{HydraLora, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// let method = HydraLora { rank: 4, heads: 3, ..HydraLora::default() };
/// attach(&mut layer, &method, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 4 * 20 + 3 * 4 * 30 + 3 * 20);
/// assert!(layer.merge(None).is_err());
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HydraLora {
    /// r: the rank of each Bᵢ·A.
    pub rank: usize,
    /// N: the number of the Bᵢ.
    pub heads: usize,
    /// s; alpha/r in LoRA's terms. 2 by default.
    pub scale: f64,
    /// Dropout of A's input.
    pub dropout: f64,
    /// What A and G start from.
    pub seed: u64,
}

impl Default for HydraLora {
    fn default() -> HydraLora {
        HydraLora { rank: 8, heads: 3, scale: 2.0, dropout: 0.0, seed: 0 }
    }
}

impl Method for HydraLora {
    fn name(&self) -> &'static str {
        "hydralora"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        at_least_rank_1(self.rank)?;
        finite_scale(self.scale)?;
        check_rate(self.dropout)?;
        if self.heads == 0 {
            return Err(Error::config("heads", "0 leave nothing to train: there is at least 1"));
        }
        each(layers, |layer| HydraLoraAdapter::new(self, layer))
    }
}

/// One layer's A, Bᵢ and G.
#[derive(Clone, Debug)]
pub struct HydraLoraAdapter {
    a: Parameter,
    /// The Bᵢ side by side (out, N·r).
    b: Parameter,
    router: Parameter,
    settings: HydraLora,
}

impl HydraLoraAdapter {
    /// The adapter of a layer at its start.
    pub fn new(settings: &HydraLora, layer: &LayerInfo) -> Result<HydraLoraAdapter> {
        let HydraLora { rank, heads, seed, .. } = *settings;
        let bound = 1.0 / (layer.inputs.max(1) as f64).sqrt();
        let draw = |name, rows: usize| {
            layer.init(seed).uniform(name, [rows, layer.inputs], bound)?.to_dtype(layer.dtype)
        };
        let b = Tensor::zeros([layer.outputs, heads * rank], layer.dtype, &layer.device)?;
        Ok(HydraLoraAdapter {
            a: Parameter::new(draw("hydralora.a", rank)?),
            b: Parameter::new(b),
            router: Parameter::new(draw("hydralora.router", heads)?),
            settings: *settings,
        })
    }
}

impl LinearAdapter for HydraLoraAdapter {
    fn method(&self) -> &'static str {
        "hydralora"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let b = self.b.tensor(ctx);
        let last = x.rank() - 1;
        let gates = x.linear(&self.router.tensor(ctx), None)?.softmax(last)?.unsqueeze(last + 1)?;
        let low =
            ctx.dropout(x, self.settings.dropout)?.linear(&self.a.tensor(ctx), None)?.unsqueeze(last)?;
        let each = gates.mul(&low)?.reshape(x.shape().with_dim(last, b.dims()[1])?)?;
        each.linear(&b, None)?.scale(self.settings.scale)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("a", &self.a), ("b", &self.b), ("router", &self.router)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("a", &mut self.a), ("b", &mut self.b), ("router", &mut self.router)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        let message = "HydraLoRA weighs its updates by the input, so that there is no one change of the \
                       weight: keep the adapter on the layer";
        Err(Error::config("merge", message))
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => rank, heads, scale, dropout, seed))
    }
}
