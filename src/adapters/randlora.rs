//! RandLoRA (Albert et al., ICLR 2025): ΔW = s·Σᵢ Bᵢ Λᵢ A Γᵢ with random A and Bᵢ that all layers
//! share, and trained diagonals λ (r×n) and γ (n×m) in each.
//!
//! One of λ and γ starts at 0, so that ΔW does; the other at a constant.
//!
//! # Where they start
//!
//! PEFT starts λ at 0 and γ at 1/m. The first step then moves the n·r numbers of λ alone, and since A is
//! shared, ΔW has rank r after it. [`Start::LikeLora`] starts γ at 0 and λ at λ₀, as the paper's code for
//! vision does: the n·m numbers of γ move from the first step on, ΔW has full rank after it, and γ takes the
//! place of LoRA's B. λ₀ makes the first steps as large as LoRA's.
//!
//! Adam's first step moves every number by the learning rate η, whatever its gradient. Take the signs for
//! random. Entries of the bases have variance 1, of whatever kind they are, and an entry of ΔW is a sum of
//! n·r terms s·B·λ·A·γ. LoRA's A has variance 1/(3·in). At rank r′ and scale s′,
//!
//! > RandLoRA: |ΔW| ≈ s·λ₀·η·√(n·r),   LoRA: |ΔW| ≈ s′·η·√(r′/(3·in)).
//!
//! They are equal, with s′ = 2 and the r′ that has as many trained numbers, r′·(in + out) = n·(r + m), for
//!
//! > λ₀ = (2/s)·√((r + m)/(3·r·in·(in + out))).
//!
//! What a step of λ adds grows with γ as what a step of LoRA's A adds grows with its B. Both keep their balance
//! where a step is the same share of λ₀ as of LoRA's A, that is for λ₀ = 1/√(3·in), which is
//! s = √(2/r) in square layers with r ≪ m ([`RandLora::balanced_scale`]).
//!
//! All layers share s, as PEFT's one alpha/r wants it; what differs from layer to layer is in λ's start alone.
//! PEFT reads λ and γ from the file and does not start them, so an adapter that began here is an ordinary one
//! there. docs/scale.md has the whole derivation and the measurements.
//!
//! The arithmetic is in [`ops::randlora`](crate::randlora_linear).

use std::sync::Arc;

use crate::adapters::attach::{LayerInfo, Method};
use crate::adapters::bases::{BasesSpec, Distribution};
use crate::adapters::origin::BasesOrigin;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Context, LinearAdapter, Parameter};
use crate::ops::dropout::check_rate;
use crate::ops::randlora::{Bases, Pairing, RandLoraOptions, Sizes, Structure, Way, randlora_linear};
use crate::tensor::Tensor;

/// Where λ and γ start, and with them how large the update's first steps are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// λ at 0 and γ at 1/max(n, m), as in PEFT and in the paper's code for language models.
    Peft,
    /// γ at 0, and λ where the first steps are as large as those of a LoRA with as many trained numbers and
    /// scale 2, whatever the scale is: that one then says how far a step moves λ.
    #[default]
    LikeLora,
}

/// RandLoRA's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandLora {
    /// r: the rank of one basis. The update has full rank whatever r is; a smaller r trains more
    /// numbers: n·(r + m) per layer with n = ⌈m/r⌉.
    pub rank: usize,
    /// s; [`RandLora::balanced_scale`] of the rank by default. PEFT has 20 (alpha = 640 at r = 32); the paper's
    /// code 10/r for CLIP and 2/√n for language models: with [`Start::Peft`] they differ by a factor of 100.
    pub scale: f64,
    /// Where λ and γ start.
    pub start: Start,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What the bases follow from.
    pub seed: u64,
    /// What the entries of the bases look like.
    pub distribution: Distribution,
    /// Which rows of B a basis has: all, or with block bases some for itself, which makes the layer
    /// nearly as cheap as LoRA.
    pub structure: Structure,
    /// Which row of the scaled A meets which column of B; for block bases, whether the adapter is to
    /// be saved for PEFT.
    pub pairing: Pairing,
    /// These ways of computing instead of the cheapest.
    pub ways: Option<(Way, Way)>,
}

impl Default for RandLora {
    fn default() -> RandLora {
        RandLora {
            rank: 32,
            scale: RandLora::balanced_scale(32),
            start: Start::LikeLora,
            dropout: 0.0,
            seed: 0,
            distribution: Distribution::Uniform,
            structure: Structure::Dense,
            pairing: Pairing::Paper,
            ways: None,
        }
    }
}

impl RandLora {
    /// How many numbers a layer of these sizes trains: n·(r + m).
    ///
    /// ```
    /// use randlora::adapters::RandLora;
    ///
    /// let method = RandLora { rank: 6, ..RandLora::default() };
    /// assert_eq!(method.trained(768, 3072), 128 * (6 + 768));
    /// ```
    pub fn trained(&self, inputs: usize, outputs: usize) -> usize {
        let sizes = Sizes { tokens: 0, inputs, outputs, rank: self.rank.max(1) };
        sizes.bases() * (sizes.rank + sizes.small())
    }

    /// PEFT's scale: 20, with [`Start::Peft`].
    pub const PEFT_SCALE: f64 = 20.0;

    /// The scale of this rank at which a step is about the same share of λ as it is of LoRA's A: √(2/r), with
    /// alpha = √(2·r) rounded to a whole number, which PEFT's is. λ's start makes up for the rounding.
    ///
    /// ```
    /// use randlora::adapters::RandLora;
    ///
    /// assert_eq!(RandLora::balanced_scale(32), 8.0 / 32.0);
    /// assert_eq!(RandLora::balanced_scale(16), 6.0 / 16.0);
    /// ```
    pub fn balanced_scale(rank: usize) -> f64 {
        let rank = rank.max(1) as f64;
        (2.0 * rank).sqrt().round() / rank
    }

    /// The scale of the paper's code for language models: 2/√n, for layers whose largest smaller side is
    /// `small`; with [`Start::Peft`].
    pub fn paper_scale(rank: usize, small: usize) -> f64 {
        2.0 / (small.div_ceil(rank.max(1)).max(1) as f64).sqrt()
    }

    /// The constants that λ and γ start at in a layer of these sizes.
    ///
    /// ```
    /// use randlora::adapters::RandLora;
    ///
    /// // λ at about 1/√(3·in), as LoRA's A.
    /// let method = RandLora { rank: 16, scale: RandLora::balanced_scale(16), ..RandLora::default() };
    /// let [lambda, gamma] = method.starts(384, 384);
    /// assert!((lambda * (3.0f64 * 384.0).sqrt() - 1.0).abs() < 0.05 && gamma == 0.0);
    /// ```
    pub fn starts(&self, inputs: usize, outputs: usize) -> [f64; 2] {
        let sizes = Sizes { tokens: 0, inputs, outputs, rank: self.rank.max(1) };
        let (n, small) = (sizes.bases(), sizes.small());
        match self.start {
            Start::Peft => [0.0, 1.0 / n.max(small).max(1) as f64],
            Start::LikeLora => {
                let [rank, small, inputs, outputs] =
                    [sizes.rank, small, inputs, outputs].map(|size| size.max(1) as f64);
                let share = (rank + small) / (3.0 * rank * inputs * (inputs + outputs));
                [2.0 / self.scale * share.sqrt(), 0.0]
            }
        }
    }

    /// What the bases that fit all these layers follow from.
    pub fn spec(&self, layers: &[LayerInfo]) -> BasesSpec {
        BasesSpec {
            seed: self.seed,
            distribution: self.distribution,
            structure: self.structure,
            rank: self.rank,
            small: layers.iter().map(LayerInfo::small).max().unwrap_or(0),
            large: layers.iter().map(LayerInfo::large).max().unwrap_or(0),
            pairing: self.pairing,
        }
    }

    /// The bases that fit all these layers, in f32.
    pub fn bases(&self, layers: &[LayerInfo]) -> Result<Option<Bases>> {
        let Some(first) = layers.first() else { return Ok(None) };
        self.spec(layers).generate(&first.device).map(Some)
    }
}

impl RandLora {
    /// An error for block bases that are meant for PEFT and layers that PEFT cannot give them to: whose
    /// row of B a row is follows from a layer's number of bases, and PEFT's file has one B for all.
    fn check_savable(&self, layers: &[LayerInfo]) -> Result<()> {
        let bases = |layer: &LayerInfo| layer.small().div_ceil(self.rank);
        let other = layers.iter().find(|layer| bases(layer) != bases(&layers[0]));
        match other {
            Some(other) if (self.structure, self.pairing) == (Structure::Block, Pairing::Peft) => {
                let (a, b) = (&layers[0], other);
                let message = format!(
                    "`{}` has {} bases and `{}` has {}, which PEFT cannot tell apart in block bases: adapt \
                     layers of one smaller side, or use dense bases",
                    a.name,
                    bases(a),
                    b.name,
                    bases(b)
                );
                Err(Error::config("bases", message))
            }
            _ => Ok(()),
        }
    }
}

impl Method for RandLora {
    fn name(&self) -> &'static str {
        "randlora"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        if self.rank == 0 {
            return Err(Error::config("rank", "a basis has at least rank 1"));
        }
        if !self.scale.is_finite() || (self.scale == 0.0 && self.start == Start::LikeLora) {
            let message = format!("{} leaves λ no place to start at: give a finite number but 0", self.scale);
            return Err(Error::config("scale", message));
        }
        check_rate(self.dropout)?;
        self.check_savable(layers)?;
        let Some(bases) = self.bases(layers)? else { return Ok(Some(vec![])) };
        // Layers of both types would each want the bases in their own.
        let wide = layers.iter().any(|layer| layer.dtype == DType::F64);
        let wide = if wide { Some(Arc::new(bases.to_dtype(DType::F64)?)) } else { None };
        let narrow = Arc::new(bases);
        let origin = BasesOrigin::Spec(self.spec(layers));
        let one = |layer: &LayerInfo| {
            let bases = match &wide {
                Some(wide) if layer.dtype == DType::F64 => wide,
                _ => &narrow,
            };
            let adapter = RandLoraAdapter::new(self, layer, bases.clone())?.with_origin(Some(origin));
            Ok(Box::new(adapter) as Box<dyn LinearAdapter>)
        };
        layers.iter().map(one).collect::<Result<_>>().map(Some)
    }
}

/// One layer's diagonals, and the bases that it shares.
#[derive(Clone, Debug)]
pub struct RandLoraAdapter {
    lambda: Parameter,
    gamma: Parameter,
    bases: Arc<Bases>,
    origin: Option<BasesOrigin>,
    inputs: usize,
    outputs: usize,
    scale: f64,
    dropout: f64,
    ways: Option<(Way, Way)>,
}

impl RandLoraAdapter {
    /// The adapter of a layer at its start.
    pub fn new(settings: &RandLora, layer: &LayerInfo, bases: Arc<Bases>) -> Result<RandLoraAdapter> {
        let sizes = Sizes { tokens: 0, inputs: layer.inputs, outputs: layer.outputs, rank: bases.rank() };
        let (n, small) = (sizes.bases(), sizes.small());
        bases.check(sizes)?;
        let settings = RandLora { rank: sizes.rank, ..*settings };
        let [lambda, gamma] = settings.starts(layer.inputs, layer.outputs);
        let lambda = Tensor::full(lambda, [sizes.rank, n], layer.dtype, &layer.device)?;
        let gamma = Tensor::full(gamma, [n, small], layer.dtype, &layer.device)?;
        Ok(RandLoraAdapter {
            lambda: Parameter::new(lambda),
            gamma: Parameter::new(gamma),
            bases,
            origin: None,
            inputs: layer.inputs,
            outputs: layer.outputs,
            scale: settings.scale,
            dropout: settings.dropout,
            ways: settings.ways,
        })
    }

    /// The same adapter, which says what its bases follow from.
    pub fn with_origin(self, origin: Option<BasesOrigin>) -> RandLoraAdapter {
        RandLoraAdapter { origin, ..self }
    }

    /// What the bases follow from, if that is known: a file may hold them and not say.
    pub fn origin(&self) -> Option<BasesOrigin> {
        self.origin
    }

    /// The bases.
    pub fn bases(&self) -> &Arc<Bases> {
        &self.bases
    }

    /// Another copy of the same bases.
    pub(super) fn set_bases(&mut self, bases: Arc<Bases>) {
        self.bases = bases;
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

impl LinearAdapter for RandLoraAdapter {
    fn method(&self) -> &'static str {
        "randlora"
    }

    fn forward(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, ctx: &Context) -> Result<Tensor> {
        let options = RandLoraOptions {
            bases: self.bases.clone(),
            scale: self.scale,
            dropout: ctx.dropout_key().map(|key| (self.dropout, key)),
            ways: self.ways,
        };
        randlora_linear(x, weight, bias, &self.lambda.tensor(ctx), &self.gamma.tensor(ctx), &options)
    }

    /// The layer of a weight of 0: one product of the panels that hold ΔW alone.
    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let (dtype, device) = (self.lambda.value().dtype(), self.lambda.value().device());
        let zero = Tensor::scalar(0.0, dtype, device)?.broadcast_to([self.outputs, self.inputs])?;
        self.forward(x, &zero, None, ctx)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("lambda", &self.lambda), ("gamma", &self.gamma)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("lambda", &mut self.lambda), ("gamma", &mut self.gamma)]
    }

    /// The update of the identity's rows: ΔW = (I·(0 + ΔW)ᵀ)ᵀ.
    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        let (dtype, device) = (self.lambda.value().dtype(), self.lambda.value().device());
        let mut identity = vec![0.0; self.inputs * self.inputs];
        identity.iter_mut().step_by(self.inputs + 1).for_each(|one| *one = 1.0);
        let identity = Tensor::from_vec(identity, [self.inputs, self.inputs], device)?.to_dtype(dtype)?;
        self.update(&identity, &identity, &Context::eval())?.t()
    }
}
