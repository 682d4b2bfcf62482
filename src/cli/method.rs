//! The fine-tuning methods, as the command line names them.

use std::collections::BTreeSet;

use randlora::adapters::{self, Attached, Lora, Method, RandLora};
use randlora::models::Bert;
use randlora::nn::Module;
use randlora::{Pairing, Result};

use super::targets;

/// The methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MethodName {
    /// Full-rank updates from random bases: the diagonals and the classifier are trained.
    Randlora,
    /// Low-rank updates: two thin matrices for each layer and the classifier are trained.
    Lora,
    /// Every number of the model is trained.
    Full,
    /// The classifier alone is trained.
    Head,
}

/// What is trained in every method.
pub(crate) const CLASSIFIER: &str = "classifier";

impl MethodName {
    /// The name as it is typed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            MethodName::Randlora => "randlora",
            MethodName::Lora => "lora",
            MethodName::Full => "full",
            MethodName::Head => "head",
        }
    }

    /// The rank where none is asked for; None for a method without one.
    pub(crate) fn default_rank(self) -> Option<usize> {
        match self {
            MethodName::Randlora => Some(RandLora::default().rank),
            MethodName::Lora => Some(Lora::default().rank),
            MethodName::Full | MethodName::Head => None,
        }
    }
}

/// A method with its settings; None for a method's default.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings<'a> {
    pub(crate) method: MethodName,
    pub(crate) targets: &'a str,
    pub(crate) rank: Option<usize>,
    pub(crate) scale: Option<f64>,
    pub(crate) dropout: f64,
    pub(crate) seed: u64,
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
        let method: Box<dyn Method> = match self.method {
            MethodName::Head => return adapters::train_only(model, &whole),
            MethodName::Full => {
                return adapters::attach(model, &adapters::Full, &adapters::Targets::AllLinear, &[]);
            }
            MethodName::Lora => {
                Box::new(Lora { rank, scale: self.scale.unwrap_or(Lora::default().scale), dropout, seed })
            }
            MethodName::Randlora => {
                let default = RandLora::default();
                let scale = self.scale.unwrap_or(default.scale);
                Box::new(RandLora { rank, scale, dropout, seed, pairing: Pairing::Peft, ..default })
            }
        };
        let layers: Vec<String> = model.linears().into_iter().map(|(name, _)| name).collect();
        adapters::attach(model, &*method, &targets::parse(self.targets, &layers)?, &whole)
    }
}
