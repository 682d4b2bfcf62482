//! The fine-tuning methods, as the command line names them.

use std::collections::BTreeSet;

use randlora::adapters::{self, Attached, Distribution, Method, RandLora};
use randlora::models::Bert;
use randlora::nn::{Linear, Module};
use randlora::{Pairing, Result, Structure};

use super::targets;

/// The methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MethodName {
    /// Full-rank updates from random bases: the diagonals and the classifier are trained.
    Randlora,
    /// Low-rank updates: two thin matrices for each layer and the classifier are trained.
    Lora,
    /// LoRA whose scale is alpha/√r instead of alpha/r.
    Rslora,
    /// The length and the direction of each row of the weights apart.
    Dora,
    /// Two vectors for each layer between random matrices that all layers share.
    Vera,
    /// The biases alone, and the classifier.
    Bitfit,
    /// LoRA that starts from the largest singular values of the weights.
    Pissa,
    /// A small matrix for each layer between the largest singular vectors of its weight.
    LoraXs,
    /// LoRA whose matrices are sums of random ones.
    Nola,
    /// The singular values of the weights.
    Svft,
    /// LoRA whose ranks shrink where they matter least.
    Adalora,
    /// LoRA with several second matrices, weighed for each token; cannot be merged.
    Hydralora,
    /// Sums of random matrices.
    Pranc,
    /// A random subspace of each layer's weight.
    Intrinsic,
    /// Every number of the model is trained.
    Full,
    /// The classifier alone is trained.
    Head,
}

/// RandLoRA's random bases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BasesName {
    /// Dense, uniform entries: the paper's best.
    #[default]
    Uniform,
    /// Dense, normal entries.
    Normal,
    /// Dense, entries ±1.
    Signs,
    /// Two thirds of the entries are zero.
    Sparse,
    /// All but a share of 2/√m of the entries are zero.
    VerySparse,
    /// Each basis has rows of its own: nearly as fast as LoRA, and bases of a fraction of the size.
    Block,
}

impl BasesName {
    /// The name as it is typed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            BasesName::Uniform => "uniform",
            BasesName::Normal => "normal",
            BasesName::Signs => "signs",
            BasesName::Sparse => "sparse",
            BasesName::VerySparse => "very-sparse",
            BasesName::Block => "block",
        }
    }

    /// The entries and the structure, for a model whose layers' largest smaller side is `small`.
    pub(crate) fn kind(self, small: usize) -> (Distribution, Structure) {
        match self {
            BasesName::Uniform => (Distribution::Uniform, Structure::Dense),
            BasesName::Normal => (Distribution::Normal, Structure::Dense),
            BasesName::Signs => (Distribution::SIGNS, Structure::Dense),
            BasesName::Sparse => (Distribution::SPARSE, Structure::Dense),
            BasesName::VerySparse => (Distribution::very_sparse(small), Structure::Dense),
            BasesName::Block => (Distribution::Uniform, Structure::Block),
        }
    }
}

/// What is trained in every method.
pub(crate) const CLASSIFIER: &str = "classifier";

impl MethodName {
    /// The name as it is typed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            MethodName::Randlora => "randlora",
            MethodName::Lora => "lora",
            MethodName::Rslora => "rslora",
            MethodName::Dora => "dora",
            MethodName::Vera => "vera",
            MethodName::Bitfit => "bitfit",
            MethodName::Pissa => "pissa",
            MethodName::LoraXs => "lora-xs",
            MethodName::Nola => "nola",
            MethodName::Svft => "svft",
            MethodName::Adalora => "adalora",
            MethodName::Hydralora => "hydralora",
            MethodName::Pranc => "pranc",
            MethodName::Intrinsic => "intrinsic",
            MethodName::Full => "full",
            MethodName::Head => "head",
        }
    }

    /// The rank where none is asked for; None for a method without one.
    pub(crate) fn default_rank(self) -> Option<usize> {
        adapters::default_rank(self.name())
    }

    /// The scale that an alpha means at a rank.
    pub(crate) fn scale(self, alpha: f64, rank: usize) -> f64 {
        let rank = rank as f64;
        alpha / if self == MethodName::Rslora { rank.sqrt() } else { rank }
    }
}

/// A method with its settings; None for a method's default.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings<'a> {
    pub(crate) method: MethodName,
    pub(crate) targets: &'a str,
    pub(crate) rank: Option<usize>,
    pub(crate) scale: Option<f64>,
    pub(crate) bases: Option<BasesName>,
    pub(crate) dropout: f64,
    pub(crate) seed: u64,
    pub(crate) coefficients: Option<usize>,
    /// The steps of the training.
    pub(crate) steps: usize,
}

impl Settings<'_> {
    /// Freezes what the method does not train and attaches its adapters. The classifier is trained in every
    /// method, and so are `fresh` parameters: what has no value yet in the model's folder would be
    /// another random one there tomorrow. RandLoRA's bases are paired as in PEFT, so that the adapter can
    /// be saved for it.
    pub(crate) fn attach(&self, model: &mut Bert, fresh: &[String]) -> Result<Attached> {
        let Settings { dropout, seed, .. } = *self;
        let rank = self.rank.or(self.method.default_rank()).unwrap_or(0);
        let modules = fresh.iter().filter_map(|name| Some(name.rsplit_once('.')?.0));
        let whole: BTreeSet<&str> = modules.chain([CLASSIFIER]).collect();
        let whole: Vec<&str> = whole.into_iter().collect();
        let layers: Vec<String> = model.linears().into_iter().map(|(name, _)| name).collect();
        let targets = || targets::parse(self.targets, &layers);
        let method: Box<dyn Method> = match self.method {
            MethodName::Head => return adapters::train_only(model, &whole),
            MethodName::Full => {
                return adapters::attach(model, &adapters::Full, &adapters::Targets::AllLinear, &[]);
            }
            MethodName::Randlora => {
                let default = RandLora::default();
                let scale = self.scale.unwrap_or(default.scale);
                let smaller = |layer: &Linear| layer.inputs().min(layer.outputs());
                let targets = targets()?;
                let adapted = model.linears().into_iter().filter(|(name, _)| targets.matches(name));
                let small = adapted.map(|(_, layer)| smaller(layer)).max().unwrap_or(0);
                let (distribution, structure) = self.bases.unwrap_or_default().kind(small);
                let pairing = Pairing::Peft;
                Box::new(RandLora { rank, scale, dropout, seed, distribution, structure, pairing, ..default })
            }
            other => {
                let Settings { scale, coefficients, steps, .. } = *self;
                let rank = self.rank.or(other.default_rank());
                let settings =
                    adapters::Settings { rank, scale, dropout, seed, coefficients, steps: Some(steps) };
                adapters::by_name(other.name(), &settings)?
            }
        };
        adapters::attach(model, &*method, &targets()?, &whole)
    }
}
