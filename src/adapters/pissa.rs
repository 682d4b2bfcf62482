//! PiSSA (Meng et al., NeurIPS 2024): LoRA that starts from the principal part of the weight.
//!
//! With W0 = U·Σ·Vᵀ, A₀ = √(Σᵣ/s)·Vᵣᵀ (r×in) and B₀ = Uᵣ·√(Σᵣ/s) (out×r) hold the r largest singular
//! values: s·B₀·A₀ is the best approximation of W0 of rank r. A and B start there and are trained, the
//! rest of W0 is frozen:
//!
//! > W = (W0 − s·B₀·A₀) + s·B·A, that is ΔW = s·(B·A − B₀·A₀), 0 at the start.
//!
//! PEFT puts the residual W0 − s·B₀·A₀ in the model's weight. Here the weight stays what it was and the
//! adapter keeps A₀ and B₀, r·(in + out) numbers more: the same function, but the adapter can be taken
//! off, and ΔW is LoRA of rank 2r, [B −B₀]·[A; A₀], which is the form in which PEFT's own conversion
//! saves it. The paper has s = 1; PEFT's alpha/r divides the singular values as above, so that s changes
//! only how far a step goes.

use crate::adapters::attach::{LayerInfo, Method, at_least_rank_1, each};
use crate::adapters::lora::low_rank;
use crate::adapters::recipe::recipe;
use crate::error::{Error, Result};
use crate::linalg::svd;
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::tensor::Tensor;

/// PiSSA's settings.
///
/// ```
/// use randlora::adapters::{Pissa, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &Pissa { rank: 4, ..Pissa::default() }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 4 * (20 + 30));
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pissa {
    /// r: the singular values that are trained.
    pub rank: usize,
    /// s, above 0; alpha/r in PEFT's terms. 1 by default.
    pub scale: f64,
    /// Dropout of the input of B·A.
    pub dropout: f64,
}

impl Default for Pissa {
    fn default() -> Pissa {
        Pissa { rank: 8, scale: 1.0, dropout: 0.0 }
    }
}

impl Method for Pissa {
    fn name(&self) -> &'static str {
        "pissa"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        at_least_rank_1(self.rank)?;
        check_rate(self.dropout)?;
        if !(self.scale.is_finite() && self.scale > 0.0) {
            let message = format!("{} does not divide singular values: it is above 0", self.scale);
            return Err(Error::config("scale", message));
        }
        each(layers, |layer| PissaAdapter::new(self, layer))
    }
}

/// One layer's A and B, and what they started at.
#[derive(Clone, Debug)]
pub struct PissaAdapter {
    a: Parameter,
    b: Parameter,
    start: [Tensor; 2],
    settings: Pissa,
}

impl PissaAdapter {
    /// The adapter of a layer at its start.
    ///
    /// # Errors
    /// [`Error::Config`] for a rank above the number of the weight's singular values.
    pub fn new(settings: &Pissa, layer: &LayerInfo) -> Result<PissaAdapter> {
        let Pissa { rank, scale, .. } = *settings;
        layer.check_rank(rank)?;
        let parts = svd(&layer.weight)?;
        let roots = parts.values.iter().take(rank).map(|value| (value / scale).sqrt()).collect();
        let roots = Tensor::from_vec::<f64>(roots, [rank], &layer.device)?;
        let a = parts.v.slice(1, 0..rank)?.mul(&roots)?.t()?.contiguous()?.to_dtype(layer.dtype)?;
        let b = parts.u.slice(1, 0..rank)?.mul(&roots)?.to_dtype(layer.dtype)?;
        let start = [a.clone(), b.clone()];
        Ok(PissaAdapter { a: Parameter::new(a), b: Parameter::new(b), start, settings: *settings })
    }

    /// Its settings.
    pub fn settings(&self) -> &Pissa {
        &self.settings
    }

    /// A₀ (r, in) and B₀ (out, r).
    pub fn start(&self) -> &[Tensor; 2] {
        &self.start
    }
}

impl LinearAdapter for PissaAdapter {
    fn method(&self) -> &'static str {
        "pissa"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let dropped = ctx.dropout(x, self.settings.dropout)?;
        let now = low_rank(&dropped, &self.a.tensor(ctx), &self.b.tensor(ctx), self.settings.scale)?;
        let [a, b] = &self.start;
        now.sub(&low_rank(x, a, b, self.settings.scale)?)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("a", &self.a), ("b", &self.b)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("a", &mut self.a), ("b", &mut self.b)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        let [a, b] = &self.start;
        self.b.value().matmul(self.a.value())?.sub(&b.matmul(a)?)?.scale(self.settings.scale)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => rank, scale, dropout))
    }
}
