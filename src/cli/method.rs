//! The fine-tuning methods, as the command line names them.

use std::collections::BTreeSet;
use std::str::FromStr;

use randlora::adapters::{self, Atlas, Attached, Distribution, Method, RandLora, Start, Targets};
use randlora::io::Checkpoint;
use randlora::models::Bert;
use randlora::nn::{Linear, Module};
use randlora::{Error, Pairing, Result, Structure};

use super::targets;
use super::task_vectors::Folders;

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
    /// Sums of what other models have learned since the same base, weighted in each layer: see --task-vectors.
    Atlas,
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

/// What an update is multiplied by, and for RandLoRA where λ and γ start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Scale {
    /// The method's default.
    #[default]
    Auto,
    /// RandLoRA as PEFT has it.
    Peft,
    /// RandLoRA as the paper's code for language models has it.
    Paper,
    /// This number; RandLoRA then starts as in PEFT.
    Number(f64),
}

impl FromStr for Scale {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Scale, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Scale::Auto),
            ("peft", _) => Ok(Scale::Peft),
            ("paper", _) => Ok(Scale::Paper),
            (_, Ok(number)) if f64::is_finite(number) => Ok(Scale::Number(number)),
            _ => Err("auto, peft, paper or a finite number is needed".into()),
        }
    }
}

impl Scale {
    /// For RandLoRA of this rank, on a model whose layers' largest smaller side is `small`.
    fn of_randlora(self, rank: usize, small: usize) -> (f64, Start) {
        match self {
            Scale::Auto => (RandLora::balanced_scale(rank), Start::LikeLora),
            Scale::Peft => (RandLora::PEFT_SCALE, Start::Peft),
            Scale::Paper => (RandLora::paper_scale(rank, small), Start::Peft),
            Scale::Number(scale) => (scale, Start::Peft),
        }
    }

    /// For another method; None for its default.
    fn of_other(self, method: MethodName) -> Result<Option<f64>> {
        match self {
            Scale::Auto => Ok(None),
            Scale::Number(scale) => Ok(Some(scale)),
            Scale::Peft | Scale::Paper => {
                let message = format!("`peft` and `paper` are RandLoRA's: give {} a number", method.name());
                Err(Error::Config { what: "scale", message })
            }
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
            MethodName::Atlas => "atlas",
            MethodName::Full => "full",
            MethodName::Head => "head",
        }
    }

    /// The rank where none is asked for; None for a method without one.
    pub(crate) fn default_rank(self) -> Option<usize> {
        adapters::default_rank(self.name())
    }

    /// The highest learning rate where none is asked for, by the name of a method or of its adapters. RandLoRA's
    /// is LoRA's where its steps are as large, from an automatic scale.
    pub(crate) fn learning_rate(name: &str, scale: Scale) -> f64 {
        match name {
            "full" => 1e-4,
            "head" | "vera" | "nola" | "svft" | "pranc" | "intrinsic" | "atlas" => 1e-2,
            "lora" | "dora" | "adalora" | "hydralora" | "bitfit" | "lora-xs" => 1e-3,
            "randlora" if scale == Scale::Auto => 1e-3,
            _ => 3e-4,
        }
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
    pub(crate) scale: Scale,
    pub(crate) bases: Option<BasesName>,
    pub(crate) dropout: f64,
    pub(crate) seed: u64,
    pub(crate) coefficients: Option<usize>,
    /// The steps of the training.
    pub(crate) steps: usize,
    pub(crate) vectors: Folders<'a>,
}

impl Settings<'_> {
    /// Freezes what the method does not train and attaches its adapters. The classifier is trained in every
    /// method, and so are `fresh` parameters: what has no value yet in the model's folder would be
    /// another random one there tomorrow. RandLoRA's bases are paired as in PEFT, so that the adapter can
    /// be saved for it. The model is that of `from`.
    pub(crate) fn attach(&self, model: &mut Bert, fresh: &[String], from: &Checkpoint) -> Result<Attached> {
        self.check()?;
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
                let smaller = |layer: &Linear| layer.inputs().min(layer.outputs());
                let targets = targets()?;
                let adapted = model.linears().into_iter().filter(|(name, _)| targets.matches(name));
                let small = adapted.map(|(_, layer)| smaller(layer)).max().unwrap_or(0);
                let (distribution, structure) = self.bases.unwrap_or_default().kind(small);
                let (scale, start) = self.scale.of_randlora(rank, small);
                Box::new(RandLora {
                    rank,
                    scale,
                    start,
                    dropout,
                    seed,
                    distribution,
                    structure,
                    pairing: Pairing::Peft,
                    ways: None,
                })
            }
            MethodName::Atlas => {
                let targets = targets()?;
                let adapted = |name: &&String| targets.matches(name) && !whole.contains(&name.as_str());
                let adapted = Targets::Names(layers.iter().filter(adapted).cloned().collect());
                Box::new(Atlas { vectors: self.vectors.load(model, from, &adapted)? })
            }
            other => adapters::by_name(other.name(), &self.of_other()?)?,
        };
        adapters::attach(model, &*method, &targets()?, &whole)
    }

    /// An error for a setting that the method does not have, as far as that shows without the model.
    pub(crate) fn check(&self) -> Result<()> {
        self.vectors.check(self.method)?;
        // The settings of methods that have a name in the library are checked there.
        let atlas = self.method == MethodName::Atlas;
        let lacks = [
            ("bases", self.bases.is_some() && self.method != MethodName::Randlora),
            ("rank", self.rank.is_some() && atlas),
            ("scale", self.scale != Scale::Auto && atlas),
            ("dropout", self.dropout != 0.0 && atlas),
            ("coefficients", self.coefficients.is_some() && atlas),
        ];
        match lacks.into_iter().find(|(_, lacks)| *lacks) {
            Some((what, _)) => {
                Err(Error::Config { what, message: format!("{} has none: leave it out", self.method.name()) })
            }
            None => Ok(()),
        }
    }

    /// For another method than RandLoRA.
    fn of_other(&self) -> Result<adapters::Settings> {
        let Settings { dropout, seed, coefficients, steps, .. } = *self;
        let rank = self.rank.or(self.method.default_rank());
        let scale = self.scale.of_other(self.method)?;
        Ok(adapters::Settings { rank, scale, dropout, seed, coefficients, steps: Some(steps) })
    }
}
