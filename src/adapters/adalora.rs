//! AdaLoRA (Zhang et al., ICLR 2023): ΔW = s·B·E·A with a diagonal E, whose entries are taken away, in all
//! layers together, where they matter least.
//!
//! A (r₀×in), B (out×r₀) and E (r₀) are trained: A's rows and B's columns stand for singular vectors, E for
//! the singular values. E starts at 0, so that ΔW = 0, A and B normal with standard deviation 0.02. The loss
//! gets what keeps the vectors orthonormal, w·mean(‖A·Aᵀ − I‖ + ‖Bᵀ·B − I‖) over the 2·L matrices of L
//! layers (the Frobenius norm; the paper squares it, PEFT does not, nor does this).
//!
//! **Importance.** Of an entry p with gradient g: I = |p·g|, Ī = β₁·Ī + (1 − β₁)·I, its uncertainty
//! Ū = β₂·Ū + (1 − β₂)·|I − Ī|, and S = Ī·Ū. A triplet k of row, value and column has
//! S(Eₖ) + mean S(Aₖ·) + mean S(B·ₖ).
//!
//! **Budget.** The triplets of all layers that may stay: b₀ = L·r₀ up to step tᵢ, then from b₀ to b₁ = L·r by
//! b₁ + (b₀ − b₁)·(1 − (t − tᵢ)/(T − tᵢ − t_f))³, and b₁ for the last t_f of T steps. Every ΔT steps the Eₖ of
//! all triplets but the b(t) most important are set to 0; they are trained on and may come back until the
//! last t_f steps, where they stay 0.
//!
//! Importance is taken after the optimiser's step from the new p and the step's g, as in PEFT. PEFT's s is
//! alpha/(r₀ + 1e-5).

use std::sync::{Arc, Mutex, PoisonError};

use crate::adapters::attach::{LayerInfo, Method, at_least_rank_1, finite_scale};
use crate::adapters::recipe::recipe;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::Gradients;
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::ops::dropout::check_rate;
use crate::ops::index::Ids;
use crate::tensor::Tensor;

/// AdaLoRA's settings. Steps are counted from 0.
///
/// ```
/// use randlora::adapters::{AdaLora, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// let method = AdaLora { rank: 4, first_rank: 6, ..AdaLora::over(1000) };
/// attach(&mut layer, &method, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 6 * (20 + 30 + 1));
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaLora {
    /// r: the mean rank at the end.
    pub rank: usize,
    /// r₀: the rank at the start.
    pub first_rank: usize,
    /// s; alpha/(r₀ + 1e-5) in PEFT's terms.
    pub scale: f64,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What A and B start from.
    pub seed: u64,
    /// T: the steps of the training.
    pub steps: usize,
    /// tᵢ: the first steps, that take nothing away.
    pub warmup: usize,
    /// t_f: the last steps, with the final ranks.
    pub fixed: usize,
    /// ΔT: from one taking away to the next.
    pub interval: usize,
    /// β₁: how slowly Ī follows.
    pub beta1: f64,
    /// β₂: how slowly Ū follows.
    pub beta2: f64,
    /// w: the weight of the orthogonality in the loss.
    pub orthogonality: f64,
}

impl AdaLora {
    /// PEFT's defaults (r₀ = 12, r = 8, alpha = 8) for a training of so many steps, of which a tenth warms up
    /// and the last half has the final ranks; ranks change a hundred times at most.
    pub fn over(steps: usize) -> AdaLora {
        AdaLora {
            rank: 8,
            first_rank: 12,
            scale: 8.0 / (12.0 + 1e-5),
            dropout: 0.0,
            seed: 0,
            steps,
            warmup: steps / 10,
            fixed: steps / 2,
            interval: (steps / 100).max(1),
            beta1: 0.85,
            beta2: 0.85,
            orthogonality: 0.5,
        }
    }

    fn check(&self) -> Result<()> {
        at_least_rank_1(self.rank)?;
        finite_scale(self.scale)?;
        check_rate(self.dropout)?;
        let wrong = |what, message: String| Err(Error::config(what, message));
        if self.rank > self.first_rank {
            return wrong("first_rank", format!("{} does not shrink to {}", self.first_rank, self.rank));
        }
        if self.warmup.saturating_add(self.fixed) >= self.steps {
            let message = format!(
                "{} to warm up and {} with fixed ranks leave none of {} to choose them: train longer, or shorten these",
                self.warmup, self.fixed, self.steps
            );
            return wrong("steps", message);
        }
        if self.interval == 0 {
            return wrong("interval", "ranks change at most once a step: 1 is the least".into());
        }
        let (a, b) = (self.beta1, self.beta2);
        if ![a, b].iter().all(|beta| (0.0..1.0).contains(beta)) {
            return wrong("betas", format!("{a} and {b} do not lie in 0 ≤ β < 1"));
        }
        if !(self.orthogonality.is_finite() && self.orthogonality >= 0.0) {
            return wrong("orthogonality", format!("{} is no weight from 0", self.orthogonality));
        }
        Ok(())
    }

    /// The first step with the final ranks.
    fn end(&self) -> usize {
        self.steps.saturating_sub(self.fixed)
    }

    /// How many of all triplets may stay after a step; None where it takes nothing away.
    fn budget(&self, step: usize, layers: usize) -> Option<usize> {
        let (first, last) = (layers * self.first_rank, layers * self.rank);
        if step >= self.end() {
            return (step == self.end()).then_some(last);
        }
        if step <= self.warmup || !step.is_multiple_of(self.interval) {
            return None;
        }
        let left = 1.0 - (step - self.warmup) as f64 / (self.end() - self.warmup) as f64;
        Some(((first - last) as f64 * left.powi(3) + last as f64) as usize)
    }
}

impl Method for AdaLora {
    fn name(&self) -> &'static str {
        "adalora"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        self.check()?;
        let scores = Arc::new(Mutex::new(vec![vec![]; layers.len()]));
        let one = |(place, layer)| {
            let shared = Shared { scores: scores.clone(), place, layers: layers.len() };
            Ok(Box::new(AdaLoraAdapter::new(self, layer, shared)?) as Box<dyn LinearAdapter>)
        };
        layers.iter().enumerate().map(one).collect::<Result<_>>().map(Some)
    }
}

/// The scores of the triplets of all layers, and which of them are one layer's. Copies of a model share
/// them: all are written anew after a step before any is read.
#[derive(Clone, Debug)]
struct Shared {
    scores: Arc<Mutex<Vec<Vec<f64>>>>,
    place: usize,
    layers: usize,
}

/// Ī and Ū of the entries of a parameter.
#[derive(Clone, Debug)]
struct Importance(Vec<(f64, f64)>);

impl Importance {
    fn of(parameter: &Parameter) -> Importance {
        Importance(vec![(0.0, 0.0); parameter.value().numel()])
    }

    fn update(&mut self, parameter: &Parameter, gradients: &Gradients, (b1, b2): (f64, f64)) -> Result<()> {
        let Some(gradient) = gradients.get(parameter.leaf()) else { return Ok(()) };
        let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.to_vec::<f64>();
        let (p, g) = (numbers(parameter.value())?, numbers(gradient)?);
        for ((mean, spread), (p, g)) in self.0.iter_mut().zip(p.iter().zip(&g)) {
            let now = (p * g).abs();
            *mean = b1 * *mean + (1.0 - b1) * now;
            *spread = b2 * *spread + (1.0 - b2) * (now - *mean).abs();
        }
        Ok(())
    }

    /// The mean of Ī·Ū over those of the entries that belong to each of `count` triplets.
    fn means(&self, count: usize, triplet: impl Fn(usize) -> usize) -> Vec<f64> {
        let mut sums = vec![0.0; count];
        self.0.iter().enumerate().for_each(|(i, (mean, spread))| sums[triplet(i)] += mean * spread);
        let each = (self.0.len() / count.max(1)).max(1) as f64;
        sums.into_iter().map(|sum| sum / each).collect()
    }
}

/// One layer's A, B and E, and how much their entries have mattered.
#[derive(Clone, Debug)]
pub struct AdaLoraAdapter {
    a: Parameter,
    b: Parameter,
    /// (r₀, 1), as in PEFT.
    e: Parameter,
    settings: AdaLora,
    importance: [Importance; 3],
    shared: Shared,
    /// Which of the r₀ triplets stay to the end, once that is decided. An adapter that was read has no others
    /// any more.
    kept: Option<Vec<bool>>,
}

/// The standard deviation of A and B at the start, as in the paper.
const STD: f64 = 0.02;

impl AdaLoraAdapter {
    fn new(settings: &AdaLora, layer: &LayerInfo, shared: Shared) -> Result<AdaLoraAdapter> {
        let (init, rank) = (layer.init(settings.seed), settings.first_rank);
        let draw =
            |name, dims: [usize; 2]| Ok(Parameter::new(init.normal(name, dims, STD)?.to_dtype(layer.dtype)?));
        let a = draw("adalora.a", [rank, layer.inputs])?;
        let b = draw("adalora.b", [layer.outputs, rank])?;
        let e = Parameter::new(Tensor::zeros([rank, 1], layer.dtype, &layer.device)?);
        let importance = [&a, &b, &e].map(Importance::of);
        Ok(AdaLoraAdapter { a, b, e, settings: *settings, importance, shared, kept: None })
    }

    /// An adapter whose ranks are settled: of the r₀ triplets it has those alone that `kept` says, at 0 until they
    /// get their values, and it takes none of them away. `layers` is the number of adapted layers.
    ///
    /// # Errors
    /// [`Error::Config`] where `kept` does not say it of each of the r₀.
    pub fn settled(
        settings: &AdaLora,
        layer: &LayerInfo,
        kept: Vec<bool>,
        layers: usize,
    ) -> Result<AdaLoraAdapter> {
        finite_scale(settings.scale)?;
        check_rate(settings.dropout)?;
        if kept.len() != settings.first_rank {
            let message = format!("{} triplets are no {}", kept.len(), settings.first_rank);
            return Err(Error::config("kept", message));
        }
        let rank = kept.iter().filter(|&&kept| kept).count();
        let zeros = |dims: [usize; 2]| Tensor::zeros(dims, layer.dtype, &layer.device).map(Parameter::new);
        let (a, b, e) = (zeros([rank, layer.inputs])?, zeros([layer.outputs, rank])?, zeros([rank, 1])?);
        let importance = [&a, &b, &e].map(Importance::of);
        let shared = Shared { scores: Arc::default(), place: 0, layers };
        Ok(AdaLoraAdapter { a, b, e, settings: *settings, importance, shared, kept: Some(kept) })
    }

    /// Which of the r₀ triplets stay to the end, once that is decided.
    pub fn kept(&self) -> Option<&[bool]> {
        self.kept.as_deref()
    }

    /// A, B and E without the triplets that are taken away for good: the same update.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there is no room.
    pub fn left(&self) -> Result<[Tensor; 3]> {
        let [a, b, e] = [&self.a, &self.b, &self.e].map(|parameter| parameter.value().clone());
        let Some(kept) = self.kept.as_ref().filter(|kept| kept.len() == self.triplets()) else {
            return Ok([a, b, e]);
        };
        let rows: Vec<u32> = (0..).zip(kept).filter(|(_, kept)| **kept).map(|(row, _)| row).collect();
        let rows = Ids::new(rows.clone(), [rows.len()])?;
        Ok([a.embedding(&rows)?, b.t()?.embedding(&rows)?.t()?.contiguous()?, e.embedding(&rows)?])
    }

    /// How many triplets there are, those that are taken away included.
    fn triplets(&self) -> usize {
        self.e.value().dims()[0]
    }

    /// The rank that is left: the triplets whose E is not 0.
    ///
    /// # Errors
    /// Those of reading E.
    pub fn rank(&self) -> Result<usize> {
        let e = self.e.value().to_dtype(DType::F64)?.to_vec::<f64>()?;
        Ok(e.iter().filter(|&&e| e != 0.0).count())
    }

    /// Its settings.
    pub fn settings(&self) -> &AdaLora {
        &self.settings
    }

    /// The importance of each triplet.
    fn scores(&self) -> Vec<f64> {
        let (rank, inputs) = (self.triplets(), self.a.value().dims()[1].max(1));
        let [a, b, e] = &self.importance;
        let (a, b, e) = (a.means(rank, |i| i / inputs), b.means(rank, |i| i % rank), e.means(rank, |i| i));
        a.iter().zip(b).zip(e).map(|((a, b), e)| a + b + e).collect()
    }

    /// The triplets of this layer that are among the `budget` most important of all layers.
    fn best(&self, budget: usize) -> Vec<bool> {
        let scores = self.shared.scores.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<f64> = scores.iter().flatten().copied().collect();
        all.sort_by(f64::total_cmp);
        // What is as important as the last that goes, goes too.
        let last = all.len().checked_sub(budget + 1).map(|last| all[last]);
        scores[self.shared.place].iter().map(|&score| last.is_none_or(|last| score > last)).collect()
    }

    /// Sets the E of all but these triplets to 0.
    fn keep(&mut self, kept: &[bool]) -> Result<()> {
        if kept.len() != self.triplets() {
            return Ok(());
        }
        let mask = kept.iter().map(|&kept| f64::from(u8::from(kept))).collect();
        let e = self.e.value();
        let mask = Tensor::from_vec::<f64>(mask, e.shape(), e.device())?.to_dtype(e.dtype())?;
        self.e.set(e.mul(&mask)?)
    }
}

impl LinearAdapter for AdaLoraAdapter {
    fn method(&self) -> &'static str {
        "adalora"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let low = ctx.dropout(x, self.settings.dropout)?.linear(&self.a.tensor(ctx), None)?;
        let values = self.e.tensor(ctx).squeeze(1)?;
        low.mul(&values)?.linear(&self.b.tensor(ctx), None)?.scale(self.settings.scale)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("a", &self.a), ("b", &self.b), ("e", &self.e)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("a", &mut self.a), ("b", &mut self.b), ("e", &mut self.e)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        let inner = self.a.value().mul(self.e.value())?;
        self.b.value().matmul(&inner)?.scale(self.settings.scale)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(
            recipe!(self.settings => rank, first_rank, scale, dropout, seed, steps, warmup, fixed, interval, beta1, beta2, orthogonality),
        )
    }

    fn regulariser(&self, ctx: &Context) -> Result<Option<Tensor>> {
        if self.settings.orthogonality == 0.0 {
            return Ok(None);
        }
        let (a, b) = (self.a.tensor(ctx), self.b.tensor(ctx));
        let rank = self.triplets();
        let identity = (0..rank * rank).map(|i| f64::from(u8::from(i / rank == i % rank))).collect();
        let identity = Tensor::from_vec::<f64>(identity, [rank, rank], a.device())?.to_dtype(a.dtype())?;
        let far = |product: Tensor| product.sub(&identity)?.powf(2.0)?.sum_all()?.sqrt();
        let sum = far(a.matmul(&a.t()?)?)?.add(&far(b.t()?.matmul(&b)?)?)?;
        sum.scale(self.settings.orthogonality / (2 * self.shared.layers) as f64).map(Some)
    }

    fn after_step(&mut self, step: usize, gradients: &Gradients) -> Result<()> {
        if self.kept.is_some() {
            return Ok(());
        }
        if step < self.settings.end() {
            let betas = (self.settings.beta1, self.settings.beta2);
            for (importance, parameter) in self.importance.iter_mut().zip([&self.a, &self.b, &self.e]) {
                importance.update(parameter, gradients, betas)?;
            }
        }
        if self.settings.budget(step, self.shared.layers).is_some() {
            let own = self.scores();
            self.shared.scores.lock().unwrap_or_else(PoisonError::into_inner)[self.shared.place] = own;
        }
        Ok(())
    }

    fn settle(&mut self, step: usize) -> Result<()> {
        if let Some(kept) = self.kept.take() {
            self.keep(&kept)?;
            self.kept = Some(kept);
        } else if let Some(budget) = self.settings.budget(step, self.shared.layers) {
            let best = self.best(budget);
            self.keep(&best)?;
            self.kept = (step == self.settings.end()).then_some(best);
        }
        Ok(())
    }
}
