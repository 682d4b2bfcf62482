//! LoRA (Hu et al., 2021): ΔW = s·B·A with A (r×in) and B (out×r), both trained.
//!
//! A starts uniform in ±1/√in (Kaiming's rule with a = √5, as in PEFT), B at 0, so that ΔW = 0.
//! The paper and PEFT give s as alpha/r. rsLoRA (Kalajdzievski, 2023) shows that the update keeps its
//! size as r grows only with s = alpha/√r: [`Lora::stabilised`].

use crate::adapters::attach::{LayerInfo, Method, at_least_rank_1, each, finite_scale};
use crate::error::Result;
use crate::nn::{Context, LinearAdapter, Parameter};
use crate::ops::dropout::check_rate;
use crate::ops::lora::lora_linear;
use crate::tensor::Tensor;

/// LoRA's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// r: the rank of the update.
    pub rank: usize,
    /// s; alpha/r in PEFT's terms. 2 by default.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What A starts from.
    pub seed: u64,
}

impl Default for Lora {
    fn default() -> Lora {
        Lora { rank: 8, scale: 2.0, dropout: 0.0, seed: 0 }
    }
}

impl Lora {
    /// rsLoRA: s = alpha/√r.
    ///
    /// ```
    /// use randlora::adapters::Lora;
    ///
    /// assert_eq!(Lora::stabilised(64, 16.0).scale, 2.0);
    /// ```
    pub fn stabilised(rank: usize, alpha: f64) -> Lora {
        Lora { rank, scale: alpha / (rank as f64).sqrt(), ..Lora::default() }
    }
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        at_least_rank_1(self.rank)?;
        finite_scale(self.scale)?;
        check_rate(self.dropout)?;
        each(layers, |layer| LoraAdapter::new(self, layer))
    }
}

/// One layer's A and B.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    a: Parameter,
    b: Parameter,
    scale: f64,
    dropout: f64,
}

impl LoraAdapter {
    /// The adapter of a layer at its start.
    pub fn new(settings: &Lora, layer: &LayerInfo) -> Result<LoraAdapter> {
        let [a, b] = start(settings.rank, settings.seed, layer)?;
        let Lora { scale, dropout, .. } = *settings;
        Ok(LoraAdapter { a: Parameter::new(a), b: Parameter::new(b), scale, dropout })
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.a.value().dims()[0]
    }

    /// s.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The rate at which the adapter's input is dropped in training.
    pub fn dropout(&self) -> f64 {
        self.dropout
    }
}

/// A (r, in) and B (out, r) at the start.
pub(super) fn start(rank: usize, seed: u64, layer: &LayerInfo) -> Result<[Tensor; 2]> {
    let bound = 1.0 / (layer.inputs.max(1) as f64).sqrt();
    let a = layer.init(seed).uniform("lora.a", [rank, layer.inputs], bound)?.to_dtype(layer.dtype)?;
    Ok([a, Tensor::zeros([layer.outputs, rank], layer.dtype, &layer.device)?])
}

/// s·x·Aᵀ·Bᵀ, from the right: the product of A and B is not formed. What has r numbers a token is scaled, not
/// what has as many as the layer.
pub(super) fn low_rank(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    x.linear(a, None)?.scale(scale)?.linear(b, None)
}

impl LinearAdapter for LoraAdapter {
    fn method(&self) -> &'static str {
        "lora"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let dropped = ctx.dropout(x, self.dropout)?;
        low_rank(&dropped, &self.a.tensor(ctx), &self.b.tensor(ctx), self.scale)
    }

    /// One operation, which has one x for both and no gradient for the weight; where dropout makes two of it or the
    /// weight is trained too, a sum.
    fn forward(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, ctx: &Context) -> Result<Tensor> {
        let dropped = self.dropout != 0.0 && ctx.dropout_key().is_some();
        if dropped || weight.is_tracked() {
            return self.beside(x, weight, bias, ctx);
        }
        lora_linear(x, weight, bias, [&self.a.tensor(ctx), &self.b.tensor(ctx)], self.scale)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("a", &self.a), ("b", &self.b)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("a", &mut self.a), ("b", &mut self.b)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        self.b.value().matmul(self.a.value())?.scale(self.scale)
    }
}
