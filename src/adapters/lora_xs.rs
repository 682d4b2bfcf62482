//! LoRA-XS (Bałazy et al., 2024): ΔW = s·(Uᵣ·Σᵣ)·R·Vᵣᵀ with R (r×r) trained.
//!
//! Uᵣ (out×r), Σᵣ and Vᵣ (in×r) are the largest singular values of the frozen weight W0 = U·Σ·Vᵀ and
//! their vectors; they are frozen. R starts normal with the tiny standard deviation 1e-5, so that ΔW is
//! nearly, but not exactly, 0. An adapter trains r² numbers, whatever the layer's size.

use crate::adapters::attach::{LayerInfo, Method, at_least_rank_1, each, finite_scale};
use crate::adapters::recipe::recipe;
use crate::error::Result;
use crate::linalg::svd;
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::tensor::Tensor;

/// The standard deviation of R at the start, as in the paper.
const STD: f64 = 1e-5;

/// LoRA-XS's settings.
///
/// ```
/// use randlora::adapters::{LoraXs, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &LoraXs { rank: 6, ..LoraXs::default() }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 6 * 6);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraXs {
    /// r: the rank of the update.
    pub rank: usize,
    /// s; alpha/r in LoRA's terms. 1 by default.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What R starts from.
    pub seed: u64,
}

impl Default for LoraXs {
    fn default() -> LoraXs {
        LoraXs { rank: 25, scale: 1.0, dropout: 0.0, seed: 0 }
    }
}

impl Method for LoraXs {
    fn name(&self) -> &'static str {
        "lora-xs"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        at_least_rank_1(self.rank)?;
        finite_scale(self.scale)?;
        check_rate(self.dropout)?;
        each(layers, |layer| LoraXsAdapter::new(self, layer))
    }
}

/// One layer's R, and the singular vectors around it.
#[derive(Clone, Debug)]
pub struct LoraXsAdapter {
    r: Parameter,
    /// Vᵣᵀ (r, in).
    down: Tensor,
    /// Uᵣ·Σᵣ (out, r).
    up: Tensor,
    settings: LoraXs,
}

impl LoraXsAdapter {
    /// The adapter of a layer at its start.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a rank above the number of the weight's singular values.
    pub fn new(settings: &LoraXs, layer: &LayerInfo) -> Result<LoraXsAdapter> {
        let LoraXs { rank, seed, .. } = *settings;
        layer.check_rank(rank)?;
        let parts = svd(&layer.weight)?;
        let values =
            Tensor::from_slice(&parts.values, [parts.values.len()], &layer.device)?.slice(0, 0..rank)?;
        let r = layer.init(seed).normal("lora-xs.r", [rank, rank], STD)?;
        Ok(LoraXsAdapter {
            r: Parameter::new(r.to_dtype(layer.dtype)?),
            down: parts.v.slice(1, 0..rank)?.t()?.to_dtype(layer.dtype)?.contiguous()?,
            up: parts.u.slice(1, 0..rank)?.mul(&values)?.to_dtype(layer.dtype)?,
            settings: *settings,
        })
    }
}

impl LinearAdapter for LoraXsAdapter {
    fn method(&self) -> &'static str {
        "lora-xs"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let low = ctx
            .dropout(x, self.settings.dropout)?
            .linear(&self.down, None)?
            .linear(&self.r.tensor(ctx), None)?;
        low.linear(&self.up, None)?.scale(self.settings.scale)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("r", &self.r)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("r", &mut self.r)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        self.up.matmul(self.r.value())?.matmul(&self.down)?.scale(self.settings.scale)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => rank, scale, dropout, seed))
    }
}
