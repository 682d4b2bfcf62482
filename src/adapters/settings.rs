//! Methods by their names.

use crate::adapters::{
    AdaLora, BitFit, Dora, Full, HydraLora, Intrinsic, Lora, LoraXs, Method, Nola, Pissa, Pranc, RandLora,
    Start, Svft, Vera,
};
use crate::error::{Error, Result};

/// The settings that methods have in common; None for the method's default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Settings {
    /// r.
    pub rank: Option<usize>,
    /// What the update is multiplied by. The defaults are PEFT's or the paper's, 2 for LoRA; RandLoRA's is
    /// [`RandLora::balanced_scale`], with [`Start::LikeLora`]; one that is given goes with [`Start::Peft`].
    pub scale: Option<f64>,
    /// Dropout of the adapter's input.
    pub dropout: f64,
    /// What random matrices follow from.
    pub seed: u64,
    /// The coefficients that a layer trains, for the methods that combine random directions.
    pub coefficients: Option<usize>,
    /// The steps of the training, for AdaLoRA, which divides them.
    pub steps: Option<usize>,
}

/// The names that [`by_name`] knows.
pub const METHODS: [&str; 15] = [
    "randlora",
    "lora",
    "rslora",
    "dora",
    "vera",
    "bitfit",
    "pissa",
    "lora-xs",
    "nola",
    "svft",
    "adalora",
    "hydralora",
    "pranc",
    "intrinsic",
    "full",
];

/// The rank of a method of this name where none is asked for; None for one without a rank.
pub fn default_rank(name: &str) -> Option<usize> {
    Some(match name {
        "randlora" => RandLora::default().rank,
        "lora" | "rslora" => Lora::default().rank,
        "dora" => Dora::default().rank,
        "vera" => Vera::default().rank,
        "pissa" => Pissa::default().rank,
        "lora-xs" => LoraXs::default().rank,
        "nola" => Nola::default().rank,
        "adalora" => AdaLora::over(0).rank,
        "hydralora" => HydraLora::default().rank,
        _ => return None,
    })
}

impl Settings {
    /// An error for a setting that the method, one of [`METHODS`], does not have.
    fn check(&self, name: &str) -> Result<()> {
        let without = |what, given: bool, methods: &[&str]| match given && methods.contains(&name) {
            true => Err(Error::config(what, format!("{name} has none: leave it out"))),
            false => Ok(()),
        };
        let whole = ["bitfit", "full"];
        let ranked = ["svft", "pranc", "intrinsic"];
        without("rank", self.rank.is_some(), &[&whole[..], &ranked].concat())?;
        without("scale", self.scale.is_some(), &[&whole[..], &["vera", "svft", "intrinsic"]].concat())?;
        without("dropout", self.dropout != 0.0, &[&whole[..], &["svft", "intrinsic"]].concat())?;
        let combines = ["nola", "pranc", "intrinsic"].contains(&name);
        without("coefficients", self.coefficients.is_some() && !combines, &[name])
    }
}

/// A method by its name, one of [`METHODS`]. (aTLAS is not among them: it needs
/// [task vectors](crate::adapters::Atlas).)
///
/// # Errors
/// [`Error::NoMatch`] for another name, [`Error::Config`] for a setting that the method does not have or that
/// it needs.
pub fn by_name(name: &str, settings: &Settings) -> Result<Box<dyn Method>> {
    let Settings { dropout, seed, .. } = *settings;
    let known = METHODS.contains(&name);
    if known {
        settings.check(name)?;
    }
    let rank = |default| settings.rank.unwrap_or(default);
    let scale = |default| settings.scale.unwrap_or(default);
    let coefficients = |default| settings.coefficients.unwrap_or(default);
    Ok(match name {
        "randlora" => {
            let rank = rank(RandLora::default().rank);
            let start = if settings.scale.is_some() { Start::Peft } else { Start::LikeLora };
            let scale = scale(RandLora::balanced_scale(rank));
            Box::new(RandLora { rank, scale, start, dropout, seed, ..RandLora::default() })
        }
        "lora" => {
            let default = Lora::default();
            Box::new(Lora { rank: rank(default.rank), scale: scale(default.scale), dropout, seed })
        }
        "rslora" => {
            // The alpha of LoRA's default scale.
            let rank = rank(Lora::default().rank);
            let stabilised = Lora::stabilised(rank, Lora::default().scale * rank as f64);
            Box::new(Lora { scale: scale(stabilised.scale), dropout, seed, ..stabilised })
        }
        "dora" => {
            let default = Dora::default();
            Box::new(Dora { rank: rank(default.rank), scale: scale(default.scale), dropout, seed, ..default })
        }
        "vera" => {
            let default = Vera::default();
            Box::new(Vera { rank: rank(default.rank), dropout, seed, ..default })
        }
        "bitfit" => Box::new(BitFit),
        "pissa" => {
            let default = Pissa::default();
            Box::new(Pissa { rank: rank(default.rank), scale: scale(default.scale), dropout })
        }
        "lora-xs" => {
            let default = LoraXs::default();
            Box::new(LoraXs { rank: rank(default.rank), scale: scale(default.scale), dropout, seed })
        }
        "nola" => {
            let default = Nola::default();
            let coefficients = coefficients(default.coefficients);
            Box::new(Nola {
                rank: rank(default.rank),
                coefficients,
                scale: scale(default.scale),
                dropout,
                seed,
            })
        }
        "svft" => Box::new(Svft::default()),
        "adalora" => {
            let Some(steps) = settings.steps else {
                return Err(Error::config(
                    "steps",
                    "adalora divides the steps of a training: say how many there are",
                ));
            };
            let default = AdaLora::over(steps);
            let rank = rank(default.rank);
            let first_rank = rank + rank.div_ceil(2);
            Box::new(AdaLora { rank, first_rank, scale: scale(default.scale), dropout, seed, ..default })
        }
        "hydralora" => {
            let default = HydraLora::default();
            Box::new(HydraLora {
                rank: rank(default.rank),
                scale: scale(default.scale),
                dropout,
                seed,
                ..default
            })
        }
        "pranc" => {
            let default = Pranc::default();
            let coefficients = coefficients(default.coefficients);
            Box::new(Pranc { coefficients, scale: scale(default.scale), dropout, seed })
        }
        "intrinsic" => {
            Box::new(Intrinsic { coefficients: coefficients(Intrinsic::default().coefficients), seed })
        }
        "full" => Box::new(Full),
        _ => {
            let available = METHODS.map(String::from).to_vec();
            return Err(Error::NoMatch { wanted: format!("the method `{name}`"), available });
        }
    })
}
