//! LoRA (Hu et al., 2021): ΔW = s·B·A with A (r×in) and B (out×r), both trained.
//!
//! A starts uniform in ±1/√in (Kaiming's rule with a = √5, as in PEFT), B at 0, so that ΔW = 0.

use crate::adapters::attach::{LayerInfo, Method};
use crate::error::{Error, Result};
use crate::nn::{Context, Init, LinearAdapter, Parameter};
use crate::ops::dropout::check_rate;
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

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        if self.rank == 0 {
            return Err(Error::config("rank", "LoRA has at least rank 1"));
        }
        check_rate(self.dropout)?;
        let one =
            |layer: &LayerInfo| LoraAdapter::new(self, layer).map(|a| Box::new(a) as Box<dyn LinearAdapter>);
        layers.iter().map(one).collect::<Result<_>>().map(Some)
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
        let init = Init::seeded(settings.seed, &layer.device).at(&layer.name);
        let bound = 1.0 / (layer.inputs.max(1) as f64).sqrt();
        let a = init.uniform("lora.a", [settings.rank, layer.inputs], bound)?.to_dtype(layer.dtype)?;
        let b = Tensor::zeros([layer.outputs, settings.rank], layer.dtype, &layer.device)?;
        Ok(LoraAdapter {
            a: Parameter::new(a),
            b: Parameter::new(b),
            scale: settings.scale,
            dropout: settings.dropout,
        })
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

impl LinearAdapter for LoraAdapter {
    fn method(&self) -> &'static str {
        "lora"
    }

    fn forward(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, ctx: &Context) -> Result<Tensor> {
        let low = ctx.dropout(x, self.dropout)?.linear(&self.a.tensor(ctx), None)?;
        let update = low.linear(&self.b.tensor(ctx), None)?.scale(self.scale)?;
        x.linear(weight, bias)?.add(&update)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("a", &self.a), ("b", &self.b)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("a", &mut self.a), ("b", &mut self.b)]
    }

    fn delta(&self) -> Result<Tensor> {
        self.b.value().matmul(self.a.value())?.scale(self.scale)
    }
}
