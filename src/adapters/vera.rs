//! VeRA (Kopiczko et al., ICLR 2024): ΔW = Λ_b·B·Λ_d·A with random A and B that all layers share, and
//! two trained diagonals in each: λ_d (r) and λ_b (out).
//!
//! A layer reads A[:, :in] of A (r×MAX in) and B[:out, :] of B (MAX out×r), the largest of the adapted
//! layers, as in PEFT. Both are uniform with Kaiming's variance 2/fan: ±√(6/MAX in) and ±√(6/r). λ_b
//! starts at 0, so that ΔW = 0, and λ_d at 0.1. There is no scale.

use std::sync::Arc;

use crate::adapters::attach::{LayerInfo, Method, Shared, at_least_rank_1, each};
use crate::adapters::recipe::recipe;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Context, Init, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::tensor::Tensor;

/// VeRA's settings.
///
/// ```
/// use randlora::adapters::{Targets, Vera, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &Vera { rank: 64, ..Vera::default() }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 64 + 30);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Vera {
    /// r: the rank of the update. It costs r numbers a layer, so it is larger than LoRA's.
    pub rank: usize,
    /// What λ_d starts at.
    pub d_initial: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What A and B follow from.
    pub seed: u64,
}

impl Default for Vera {
    fn default() -> Vera {
        Vera { rank: 256, d_initial: 0.1, dropout: 0.0, seed: 0 }
    }
}

impl Method for Vera {
    fn name(&self) -> &'static str {
        "vera"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        at_least_rank_1(self.rank)?;
        check_rate(self.dropout)?;
        if !self.d_initial.is_finite() {
            return Err(Error::config("d_initial", format!("{} is not finite", self.d_initial)));
        }
        let Some(first) = layers.first() else { return Ok(Some(vec![])) };
        let largest = |size: fn(&LayerInfo) -> usize| layers.iter().map(size).max().unwrap_or(0);
        let (inputs, outputs) = (largest(|layer| layer.inputs), largest(|layer| layer.outputs));
        let init = Init::seeded(self.seed, &first.device).at("vera");
        let draw = |name, dims: [usize; 2]| {
            let matrix = init.uniform(name, dims, (6.0 / dims[1].max(1) as f64).sqrt())?;
            Shared::new(matrix, layers)
        };
        let (a, b) = (draw("a", [self.rank, inputs])?, draw("b", [outputs, self.rank])?);
        let pair = |dtype| Arc::new([a.of(dtype).clone(), b.of(dtype).clone()]);
        let (narrow, wide) = (pair(DType::F32), pair(DType::F64));
        each(layers, |layer| {
            VeraAdapter::new(self, layer, if layer.dtype == DType::F64 { &wide } else { &narrow })
        })
    }
}

/// One layer's diagonals, and its part of the matrices that all share.
#[derive(Clone, Debug)]
pub struct VeraAdapter {
    lambda_b: Parameter,
    lambda_d: Parameter,
    /// This layer's part of A and B.
    a: Tensor,
    b: Tensor,
    shared: Arc<[Tensor; 2]>,
    settings: Vera,
}

impl VeraAdapter {
    /// The adapter of a layer at its start, with A (r, at least in) and B (at least out, r) in the
    /// layer's type.
    ///
    /// # Errors
    /// [`Error::Shape`] where they are too small.
    pub fn new(settings: &Vera, layer: &LayerInfo, shared: &Arc<[Tensor; 2]>) -> Result<VeraAdapter> {
        let (LayerInfo { dtype, device, .. }, [a, b]) = (layer, &**shared);
        let lambda_b = Tensor::zeros([layer.outputs], *dtype, device)?;
        let lambda_d = Tensor::full(settings.d_initial, [settings.rank], *dtype, device)?;
        Ok(VeraAdapter {
            lambda_b: Parameter::new(lambda_b),
            lambda_d: Parameter::new(lambda_d),
            a: a.slice(1, 0..layer.inputs)?,
            b: b.slice(0, 0..layer.outputs)?,
            shared: shared.clone(),
            settings: *settings,
        })
    }

    /// Its settings.
    pub fn settings(&self) -> &Vera {
        &self.settings
    }

    /// A and B, of which the layer reads a part.
    pub fn shared(&self) -> &Arc<[Tensor; 2]> {
        &self.shared
    }
}

impl LinearAdapter for VeraAdapter {
    fn method(&self) -> &'static str {
        "vera"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let low =
            ctx.dropout(x, self.settings.dropout)?.linear(&self.a, None)?.mul(&self.lambda_d.tensor(ctx))?;
        low.linear(&self.b, None)?.mul(&self.lambda_b.tensor(ctx))
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("lambda_b", &self.lambda_b), ("lambda_d", &self.lambda_d)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("lambda_b", &mut self.lambda_b), ("lambda_d", &mut self.lambda_d)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        let (b, d) = (self.lambda_b.value().unsqueeze(1)?, self.lambda_d.value());
        self.b.mul(d)?.matmul(&self.a)?.mul(&b)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => rank, d_initial, dropout, seed))
    }
}
