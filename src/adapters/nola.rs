//! NOLA (Koohpayegani et al., ICLR 2024): LoRA whose matrices are sums of random ones,
//!
//! > ΔW = s·B·A, A = Σᵢ αᵢ·Aᵢ, B = Σᵢ βᵢ·Bᵢ, i = 1 … k
//!
//! with random Aᵢ (r×in) and Bᵢ (out×r) and the coefficients α (k) and β (k) trained: 2k numbers a layer,
//! whatever its size and the rank.
//!
//! Entries of Aᵢ are uniform in ±1/√in and those of Bᵢ in ±1/√r, Kaiming's rule with a = √5. β starts at 0,
//! so that ΔW = 0, and α uniform with variance 1/k, so that A starts as large as one of the Aᵢ (and LoRA's
//! A). The scale s is LoRA's alpha/r. (The code of the RandLoRA paper starts all coefficients at 1/k, where
//! ΔW is not 0.)
//!
//! The 2k matrices are not held: they are made from the seed in each pass. A and B are formed, as LoRA has
//! them; their product is not.

use crate::adapters::attach::{LayerInfo, Method, at_least_rank_1, each, finite_scale};
use crate::adapters::lora::low_rank;
use crate::adapters::recipe::recipe;
use crate::error::{Error, Result};
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::ops::random_sum::random_sum;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// NOLA's settings.
///
/// ```
/// use randlora::adapters::{Nola, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &Nola { coefficients: 50, ..Nola::default() }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 2 * 50);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nola {
    /// r: the rank of the update.
    pub rank: usize,
    /// k: the coefficients of A, and of B.
    pub coefficients: usize,
    /// s; alpha/r in LoRA's terms. 2 by default.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What the random matrices and α follow from.
    pub seed: u64,
}

impl Default for Nola {
    fn default() -> Nola {
        Nola { rank: 8, coefficients: 64, scale: 2.0, dropout: 0.0, seed: 0 }
    }
}

impl Method for Nola {
    fn name(&self) -> &'static str {
        "nola"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        at_least_rank_1(self.rank)?;
        some_coefficients(self.coefficients)?;
        finite_scale(self.scale)?;
        check_rate(self.dropout)?;
        each(layers, |layer| NolaAdapter::new(self, layer))
    }
}

/// An error for no coefficients.
pub(super) fn some_coefficients(count: usize) -> Result<()> {
    match count {
        0 => Err(Error::config("coefficients", "0 leave nothing to train: there is at least 1")),
        _ => Ok(()),
    }
}

/// One layer's coefficients, and what their matrices follow from.
#[derive(Clone, Debug)]
pub struct NolaAdapter {
    alpha: Parameter,
    beta: Parameter,
    a: Source,
    b: Source,
    settings: Nola,
}

/// Random matrices of one shape.
#[derive(Clone, Copy, Debug)]
struct Source {
    shape: Shape,
    key: u64,
    bound: f64,
}

impl Source {
    fn sum(&self, coefficients: &Tensor) -> Result<Tensor> {
        random_sum(coefficients, self.shape, self.key, self.bound)
    }
}

impl NolaAdapter {
    /// The adapter of a layer at its start.
    pub fn new(settings: &Nola, layer: &LayerInfo) -> Result<NolaAdapter> {
        let Nola { rank, coefficients, seed, .. } = *settings;
        let init = layer.init(seed);
        let source = |name, dims: [usize; 2]| -> Result<Source> {
            let bound = 1.0 / (dims[1].max(1) as f64).sqrt();
            Ok(Source { shape: Shape::new(&dims)?, key: init.key(name), bound })
        };
        let alpha = init.uniform("nola.alpha", [coefficients], (3.0 / coefficients as f64).sqrt())?;
        Ok(NolaAdapter {
            alpha: Parameter::new(alpha.to_dtype(layer.dtype)?),
            beta: Parameter::new(Tensor::zeros([coefficients], layer.dtype, &layer.device)?),
            a: source("nola.a", [rank, layer.inputs])?,
            b: source("nola.b", [layer.outputs, rank])?,
            settings: *settings,
        })
    }
}

impl LinearAdapter for NolaAdapter {
    fn method(&self) -> &'static str {
        "nola"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let (a, b) = (self.a.sum(&self.alpha.tensor(ctx))?, self.b.sum(&self.beta.tensor(ctx))?);
        low_rank(&ctx.dropout(x, self.settings.dropout)?, &a, &b, self.settings.scale)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("alpha", &self.alpha), ("beta", &self.beta)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("alpha", &mut self.alpha), ("beta", &mut self.beta)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.a.sum(self.alpha.value())?, self.b.sum(self.beta.value())?);
        b.matmul(&a)?.scale(self.settings.scale)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => rank, coefficients, scale, dropout, seed))
    }
}
