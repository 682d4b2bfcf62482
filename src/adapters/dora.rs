//! DoRA (Liu et al., ICML 2024): the size and the direction of each row of the weight apart.
//!
//! > W = g∘(W0 + s·B·A), gᵢ = mᵢ/‖(W0 + s·B·A)ᵢ‖, ᵢ a row: one output
//!
//! with A (r×in), B (out×r) and the magnitudes m (out) trained. A and B start as LoRA's, m at the
//! lengths of W0's rows, so that ΔW = 0. The scale s is LoRA's alpha/r.
//!
//! The lengths need no W0 + s·B·A of their own (out×in):
//! ‖W0ᵢ + s·(BA)ᵢ‖² = ‖W0ᵢ‖² + 2s·⟨Bᵢ, (W0·Aᵀ)ᵢ⟩ + s²·Bᵢ·(A·Aᵀ)·Bᵢᵀ, with ‖W0ᵢ‖² kept from the start.
//!
//! The paper (its §4.3) and PEFT take the lengths for constant in the gradient, which saves memory at no
//! loss: then dm = (y₀∘dy)/‖…‖ summed over the tokens with y₀ = x·(W0 + s·B·A)ᵀ, and A and B have
//! LoRA's gradients under g∘dy. [`Dora::through_norm`] gives the gradient of the whole formula.
//!
//! Where the input is dropped, PEFT's layer is y = x·W0ᵀ + (g − 1)∘(x̃·W0ᵀ) + g∘s·x̃·AᵀBᵀ with x̃ the
//! dropped one, which is what happens here too.

use crate::adapters::attach::{LayerInfo, Method, at_least_rank_1, each, finite_scale};
use crate::adapters::lora::{low_rank, start};
use crate::adapters::recipe::recipe;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::tensor::Tensor;

/// DoRA's settings.
///
/// ```
/// use randlora::adapters::{Dora, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &Dora { rank: 4, ..Dora::default() }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 4 * (20 + 30) + 30);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dora {
    /// r: the rank of B·A. The update of the weight has full rank all the same.
    pub rank: usize,
    /// s; alpha/r in PEFT's terms. 2 by default.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What A starts from.
    pub seed: u64,
    /// Whether the gradient takes the lengths of the rows for what they are, functions of A and B;
    /// not by default, as in the paper and PEFT.
    pub through_norm: bool,
}

impl Default for Dora {
    fn default() -> Dora {
        Dora { rank: 8, scale: 2.0, dropout: 0.0, seed: 0, through_norm: false }
    }
}

impl Method for Dora {
    fn name(&self) -> &'static str {
        "dora"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        at_least_rank_1(self.rank)?;
        finite_scale(self.scale)?;
        check_rate(self.dropout)?;
        each(layers, |layer| DoraAdapter::new(self, layer))
    }
}

/// One layer's A, B and m.
#[derive(Clone, Debug)]
pub struct DoraAdapter {
    a: Parameter,
    b: Parameter,
    magnitude: Parameter,
    /// ‖W0ᵢ‖² (out).
    squares: Tensor,
    settings: Dora,
}

impl DoraAdapter {
    /// The adapter of a layer at its start.
    ///
    /// # Errors
    /// [`Error::Config`] where a row of the weight is 0: it has no direction.
    pub fn new(settings: &Dora, layer: &LayerInfo) -> Result<DoraAdapter> {
        let [a, b] = start(settings.rank, settings.seed, layer)?;
        let squares = layer.weight.to_dtype(DType::F64)?.powf(2.0)?.sum(&[1], false)?;
        if let Some(row) = squares.to_vec::<f64>()?.iter().position(|&square| square == 0.0) {
            let message =
                format!("row {row} of `{}` is 0 and has no direction: adapt other layers", layer.name);
            return Err(Error::config("dora", message));
        }
        let squares = squares.to_dtype(layer.dtype)?;
        let [a, b, magnitude] = [a, b, squares.sqrt()?].map(Parameter::new);
        Ok(DoraAdapter { a, b, magnitude, squares, settings: *settings })
    }

    /// Its settings; the seed is what A started from.
    pub fn settings(&self) -> &Dora {
        &self.settings
    }

    /// gᵢ = mᵢ/‖(W0 + s·B·A)ᵢ‖ (out).
    fn gain(&self, [a, b, magnitude]: &[Tensor; 3], weight: &Tensor) -> Result<Tensor> {
        let (a, b) = match self.settings.through_norm {
            true => (a.clone(), b.clone()),
            false => (a.detach(), b.detach()),
        };
        let s = self.settings.scale;
        let mixed = a.linear(weight, None)?.t()?.mul(&b)?.sum(&[1], false)?.scale(2.0 * s)?;
        let update = b.matmul(&a.matmul(&a.t()?)?)?.mul(&b)?.sum(&[1], false)?.scale(s * s)?;
        magnitude.div(&self.squares.add(&mixed)?.add(&update)?.sqrt()?)
    }

    /// x̃·W0ᵀ and g∘(x̃·(W0 + s·B·A)ᵀ) with x̃ the dropped x.
    fn products(&self, x: &Tensor, weight: &Tensor, ctx: &Context) -> Result<(Tensor, Tensor)> {
        let parts = [&self.a, &self.b, &self.magnitude].map(|parameter| parameter.tensor(ctx));
        let gain = self.gain(&parts, weight)?;
        let [a, b, _] = parts;
        let dropped = ctx.dropout(x, self.settings.dropout)?;
        let (frozen, update) =
            (dropped.linear(weight, None)?, low_rank(&dropped, &a, &b, self.settings.scale)?);
        let scaled = frozen.add(&update)?.mul(&gain)?;
        Ok((frozen, scaled))
    }
}

impl LinearAdapter for DoraAdapter {
    fn method(&self) -> &'static str {
        "dora"
    }

    fn forward(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, ctx: &Context) -> Result<Tensor> {
        let (frozen, scaled) = self.products(x, weight, ctx)?;
        if self.settings.dropout > 0.0 && ctx.is_training() {
            return x.linear(weight, bias)?.add(&scaled.sub(&frozen)?);
        }
        match bias {
            Some(bias) => scaled.add(bias),
            None => Ok(scaled),
        }
    }

    fn update(&self, x: &Tensor, weight: &Tensor, ctx: &Context) -> Result<Tensor> {
        let (frozen, scaled) = self.products(x, weight, ctx)?;
        scaled.sub(&frozen)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("a", &self.a), ("b", &self.b), ("magnitude", &self.magnitude)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("a", &mut self.a), ("b", &mut self.b), ("magnitude", &mut self.magnitude)]
    }

    fn delta(&self, weight: &Tensor) -> Result<Tensor> {
        let parts = [&self.a, &self.b, &self.magnitude].map(|parameter| parameter.value().clone());
        let gain = self.gain(&parts, weight)?;
        let [a, b, _] = parts;
        let weight = weight.to_dtype(a.dtype())?;
        let sum = weight.add(&b.matmul(&a)?.scale(self.settings.scale)?)?;
        sum.mul(&gain.unsqueeze(1)?)?.sub(&weight)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => rank, scale, dropout, seed, through_norm))
    }
}
