//! What `randlora finetune` is told.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::TypedValueParser;
use randlora::optim::Decay;
use randlora::{Error, Result};

use crate::cli::columns::ColumnArgs;
use crate::cli::device::DeviceArgs;
use crate::cli::method::{BasesName, MethodName, Scale, Settings};
use crate::cli::model::ModelArgs;
use crate::cli::targets;
use crate::cli::task::Kind;
use crate::cli::task_vectors::{self, Folders};

/// Fine-tune a Hugging Face BERT on a file of examples.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  randlora finetune --model all-MiniLM-L6-v2 --train train.tsv --eval validation.tsv --out sst2
  randlora finetune --model all-MiniLM-L6-v2 --train stsb/train.csv --eval stsb/dev.csv --task regress \\
      --text 1 --pair 2 --label 3 --no-header --out stsb
  randlora finetune --model all-MiniLM-L6-v2 --train train.jsonl --method lora --rank 8 --targets all-linear --out lora
  randlora finetune --model all-MiniLM-L6-v2 --train train.tsv --method atlas --task-vectors news/best,mail/best \\
      --out atlas
  randlora finetune --model all-MiniLM-L6-v2 --train more.tsv --adapter sst2/best --lr 1e-4 --out sst2-more

What is written to OUT: best and last (adapters with randlora.json, as PEFT reads them where it has the
method; whole models for --method full, bitfit and head), metrics.jsonl, curves.svg.")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// The examples to learn from: TSV, CSV or JSONL. JSONL rows may have `input_ids` instead of texts.
    #[arg(long, value_name = "FILE")]
    pub(crate) train: PathBuf,
    /// The examples to evaluate on after each epoch; the best epoch is kept. Without it the last is.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval: Option<PathBuf>,
    /// What is learned: classes or numbers. With `--adapter`, what it was trained for.
    #[arg(long, value_enum, default_value = "classify", conflicts_with = "adapter")]
    pub(crate) task: Kind,
    /// How it is learned. With `--adapter`, that adapter's method goes on.
    #[arg(long, value_enum, default_value = "randlora", conflicts_with = "adapter")]
    pub(crate) method: MethodName,
    /// The folder to write to.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Write into a folder that exists; its best, last, metrics.jsonl and curves.svg are replaced.
    #[arg(long)]
    pub(crate) force: bool,
    /// Print the results as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// What separates several labels in one cell: each example may then have any number of classes.
    #[arg(long, value_name = "TEXT", help_heading = "Columns", conflicts_with = "adapter")]
    pub(crate) separator: Option<String>,

    #[arg(
        long,
        default_value = targets::DEFAULT,
        help = targets::HELP,
        help_heading = "Adapter",
        conflicts_with = "adapter"
    )]
    targets: String,
    /// r [default: 32 for RandLoRA, where fewer train more; 8 for LoRA and its like, 25 for LoRA-XS, 256 for VeRA].
    #[arg(long, value_name = "R", help_heading = "Adapter", conflicts_with = "adapter", value_parser = at_least(1))]
    rank: Option<usize>,
    /// The update is multiplied by alpha/r; for rsLoRA by alpha/√r.
    #[arg(long, help_heading = "Adapter", conflicts_with_all = ["scale", "adapter"], value_parser = finite)]
    alpha: Option<f64>,
    /// The update is multiplied by this: a number, or RandLoRA's `peft` (20) or `paper` (2/√n, n = ⌈m/r⌉). By
    /// `auto`, RandLoRA's first steps are as large as those of a LoRA of its size; other methods have their
    /// defaults, LoRA 2 [default: auto].
    #[arg(long, value_name = "SCALE", help_heading = "Adapter", conflicts_with = "adapter")]
    scale: Option<Scale>,
    /// RandLoRA's random bases [default: uniform].
    #[arg(long, value_name = "NAME", value_enum, help_heading = "Adapter", conflicts_with = "adapter")]
    bases: Option<BasesName>,
    /// The share of the adapter's inputs that is dropped in training.
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Adapter", conflicts_with = "adapter", value_parser = share)]
    dropout: f64,

    /// The numbers that a layer trains by --method nola (twice as many), pranc and intrinsic [default: 64, 64, 256].
    #[arg(long, value_name = "K", help_heading = "Adapter", conflicts_with = "adapter", value_parser = at_least(1))]
    coefficients: Option<usize>,
    #[arg(
        long,
        value_name = "DIR,…",
        value_delimiter = ',',
        help = task_vectors::HELP,
        help_heading = "Adapter",
        conflicts_with = "adapter"
    )]
    task_vectors: Vec<PathBuf>,

    /// The highest learning rate [default: 1e-3 for RandLoRA, LoRA and its like, 3e-4 for rslora, pissa and
    /// RandLoRA of another scale than auto or that goes on from an adapter, 1e-4 for full, 1e-2 for head and for methods with few numbers].
    #[arg(long, value_name = "RATE", help_heading = "Training", value_parser = from_zero)]
    lr: Option<f64>,
    /// How many times every example is seen.
    #[arg(long, default_value_t = 3, help_heading = "Training", value_parser = at_least(1))]
    pub(crate) epochs: usize,
    /// Examples in a batch.
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Training", value_parser = at_least(1))]
    pub(crate) batch_size: usize,
    /// Batches in a step: their gradients add up.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Training", value_parser = at_least(1))]
    pub(crate) accumulate: usize,
    /// The steps over which the learning rate rises: a number of them, or below 1 a share of all.
    #[arg(long, value_name = "STEPS", default_value = "0.06", help_heading = "Training")]
    pub(crate) warmup: Warmup,
    /// What the learning rate does after that.
    #[arg(long, value_enum, default_value = "linear", help_heading = "Training")]
    pub(crate) schedule: ScheduleName,
    /// AdamW's weight decay.
    #[arg(long, value_name = "W", default_value_t = 0.0, help_heading = "Training", value_parser = from_zero)]
    pub(crate) weight_decay: f64,
    /// The largest norm of all gradients; 0 for no limit.
    #[arg(long, value_name = "NORM", default_value_t = 1.0, help_heading = "Training", value_parser = from_zero)]
    pub(crate) clip: f64,
    /// The most tokens of a text; longer ones are cut [default: 128, or what the adapter was trained with].
    #[arg(long, value_name = "N", help_heading = "Training", value_parser = at_least(3))]
    pub(crate) max_length: Option<usize>,
    /// Put texts of similar length into a batch: less padding, so less time.
    #[arg(long, help_heading = "Training")]
    pub(crate) group_by_length: bool,
    /// Forget what is computed within the model's blocks, and compute it again when it is needed: less memory,
    /// more time, the same files.
    #[arg(long, help_heading = "Training")]
    pub(crate) checkpoint_activations: bool,
    /// What all random numbers follow from. The same seed gives the same files.
    #[arg(long, default_value_t = 0, help_heading = "Training")]
    pub(crate) seed: u64,
}

impl Args {
    /// The steps of a training with so many examples.
    pub(crate) fn steps(&self, examples: usize) -> usize {
        examples.div_ceil(self.batch_size).div_ceil(self.accumulate) * self.epochs
    }

    /// The method with its settings, for a training with so many examples.
    pub(crate) fn settings(&self, examples: usize) -> Settings<'_> {
        let Args { method, rank, bases, dropout, seed, coefficients, .. } = *self;
        let (targets, scale, steps) = (&*self.targets, self.scale(), self.steps(examples));
        let vectors = self.vectors();
        Settings { method, targets, rank, scale, bases, dropout, seed, coefficients, steps, vectors }
    }

    /// An error for a setting that the method does not have.
    pub(crate) fn check(&self) -> Result<()> {
        if self.alpha.is_some() && self.method.default_rank().is_none() {
            let message = format!("{} has no alpha: leave it out", self.method.name());
            return Err(Error::Config { what: "--alpha", message });
        }
        self.settings(0).check()
    }

    fn vectors(&self) -> Folders<'_> {
        Folders { folders: &self.task_vectors, draw: self.model.draw, access: self.model.access() }
    }

    fn scale(&self) -> Scale {
        let rank = self.rank.or(self.method.default_rank());
        let of_alpha = self.alpha.zip(rank).map(|(alpha, rank)| self.method.scale(alpha, rank));
        self.scale.or(of_alpha.map(Scale::Number)).unwrap_or_default()
    }

    /// The highest learning rate for the method of this name. An adapter that training goes on from may have any
    /// scale: RandLoRA's is then the lower one.
    pub(crate) fn learning_rate(&self, method: &str) -> f64 {
        let scale = if self.model.adapter.is_empty() { self.scale() } else { Scale::Peft };
        self.lr.unwrap_or(MethodName::learning_rate(method, scale))
    }
}

/// What the learning rate does after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ScheduleName {
    /// It stays.
    Constant,
    /// A straight line to 0.
    Linear,
    /// Half a wave to 0.
    Cosine,
}

impl ScheduleName {
    pub(crate) fn decay(self) -> Decay {
        match self {
            ScheduleName::Constant => Decay::Constant,
            ScheduleName::Linear => Decay::Linear,
            ScheduleName::Cosine => Decay::Cosine,
        }
    }
}

/// The length of the warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Warmup {
    Steps(usize),
    Share(f64),
}

impl Warmup {
    /// In steps.
    pub(crate) fn steps(self, total: usize) -> usize {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Share(share) => (share * total as f64) as usize,
        }
    }
}

impl FromStr for Warmup {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Warmup, String> {
        if let Ok(steps) = text.parse() {
            return Ok(Warmup::Steps(steps));
        }
        let share = text.parse().ok().filter(|share| (0.0..1.0).contains(share));
        share
            .map(Warmup::Share)
            .ok_or("a number of steps, or a share of all from 0 to below 1, is needed".into())
    }
}

fn at_least(least: u64) -> impl TypedValueParser<Value = usize> {
    // What is counted stays countable: epochs times batches do not overflow.
    clap::value_parser!(u64).range(least..=u32::MAX.into()).map(|n| usize::try_from(n).unwrap_or(usize::MAX))
}

fn finite(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or("a finite number is needed".into())
}

fn from_zero(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.0);
    number.ok_or("a number from 0 is needed".into())
}

fn share(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x| (0.0..1.0).contains(x)).ok_or("a share from 0 to below 1 is needed".into())
}
