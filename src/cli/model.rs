//! A model with its adapter, tokenizer and task, ready to be used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use randlora::io::{Access, Adapter, Checkpoint};
use randlora::models::{Bert, BertConfig, BertLoad};
use randlora::nn::{Context, Module, TokenBatch, TokenIds};
use randlora::{DType, Device, Error, Result, Tensor};

use super::about::About;
use super::encode::Encoder;
use super::labels::LabelSet;
use super::precision::PrecisionArgs;
use super::table::wrong;
use super::task::Task;

/// Where a model is and how it comes into memory.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// The model's folder: config.json, model.safetensors, tokenizer.json.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// An adapter's folder, as this program or PEFT wrote it.
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) draw: PeftDraw,
    /// Read the model's tensors instead of mapping the file: for network file systems.
    #[arg(long)]
    pub(crate) no_mmap: bool,
    /// The threads to compute with; all cores by default. The results are the same for any number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    #[command(flatten)]
    pub(crate) precision: PrecisionArgs,
}

/// How an adapter of PEFT's without bases is read.
#[derive(Debug, clap::Args)]
pub(crate) struct PeftDraw {
    /// The type that PEFT drew the bases in, for a RandLoRA that it saved without them: bf16, or f16 on a machine
    /// that has no bf16.
    #[arg(long, value_enum, default_value = "bf16", value_name = "TYPE")]
    peft_draw: Half,
}

/// A type that PEFT draws in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Half {
    Bf16,
    F16,
}

impl PeftDraw {
    /// Opens an adapter's folder.
    pub(crate) fn open(&self, folder: &Path) -> Result<Adapter> {
        Ok(Adapter::open(folder)?.drawn_in(match self.peft_draw {
            Half::Bf16 => DType::BF16,
            Half::F16 => DType::F16,
        }))
    }
}

impl ModelArgs {
    /// Opens the adapter's folder, if there is one.
    pub(crate) fn open_adapter(&self) -> Result<Option<Adapter>> {
        self.adapter.as_deref().map(|folder| self.draw.open(folder)).transpose()
    }

    /// Opens the model folder.
    pub(crate) fn checkpoint(&self) -> Result<Checkpoint> {
        Checkpoint::open(&self.model, if self.no_mmap { Access::Read } else { Access::Map })
    }

    /// Runs `f` with the threads that were asked for.
    pub(crate) fn with_threads<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        with_threads(self.threads, f)
    }
}

/// Runs `f` with so many threads, or one on each core.
pub(crate) fn with_threads<T: Send>(threads: Option<u16>, f: impl FnOnce() -> T + Send) -> Result<T> {
    let error = |message: String| Error::Config { what: "threads", message };
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0).into());
    Ok(builder.build().map_err(|e| error(e.to_string()))?.install(f))
}

/// The examples of a batch that nothing is learned from. Constant: how examples are put together into
/// batches shows in the last bits of their logits.
const BATCH: usize = 64;

/// A model that is ready to be used.
#[derive(Debug)]
pub(crate) struct Classifier {
    pub(crate) model: Bert,
    pub(crate) about: About,
    pub(crate) encoder: Encoder,
}

impl Classifier {
    /// Opens a trained model, or a model with a trained adapter.
    ///
    /// # Errors
    /// As the parts' own; [`Error::Data`] for a model without a classifier and no adapter that has one.
    pub(crate) fn open(args: &ModelArgs, device: &Device) -> Result<Classifier> {
        let checkpoint = args.checkpoint()?;
        let adapter = args.open_adapter()?;
        let about = about(args, &checkpoint, adapter.as_ref())?;
        let model = adapted(&checkpoint, adapter.as_ref(), device)?;
        let encoder = Encoder::open(&args.model, model.config(), about.max_length)?;
        Ok(Classifier { model, about, encoder })
    }

    /// The logits of all texts, a row of outputs each.
    pub(crate) fn logits(&self, texts: &[TokenIds]) -> Result<Vec<f32>> {
        logits(&self.model, texts, self.about.task.outputs())
    }
}

/// What a model, or its adapter, was trained for.
///
/// # Errors
/// [`Error::Data`] where neither has a classifier, or another one than randlora.json says.
pub(crate) fn about(args: &ModelArgs, checkpoint: &Checkpoint, adapter: Option<&Adapter>) -> Result<About> {
    let config = BertConfig::of(checkpoint)?;
    let labels = outputs(adapter, &config)?.unwrap_or(config.labels);
    if labels == 0 {
        let message = "the model has no classifier: name an adapter with `--adapter` that has one, or train with `finetune`";
        return Err(wrong(&args.model, message));
    }
    let folder = args.adapter.as_deref().unwrap_or(&args.model);
    let about = About::read(folder)?.map_or_else(|| guess(checkpoint, &config, labels), Ok)?;
    match about.task.outputs() == labels {
        true => Ok(about),
        false => {
            let message =
                format!("randlora.json names {} outputs, the classifier has {labels}", about.task.outputs());
            Err(wrong(folder, message))
        }
    }
}

/// The outputs of the classifier that an adapter has, if it has one.
fn outputs(adapter: Option<&Adapter>, config: &BertConfig) -> Result<Option<usize>> {
    let Some(adapter) = adapter else { return Ok(None) };
    match adapter.whole().into_iter().find(|(name, _)| *name == "classifier.weight") {
        None => Ok(None),
        Some((_, &[outputs, width])) if outputs > 0 && width == config.width => Ok(Some(outputs)),
        Some((name, sizes)) => {
            let message = format!("`{name}` is {sizes:?} where the model needs (outputs, {})", config.width);
            Err(adapter.error(message))
        }
    }
}

/// A model with an adapter that is its own, if there is one. Nothing of it is left to chance.
///
/// # Errors
/// [`Error::Data`] for a part of the model that neither its folder nor the adapter has, and as
/// [`Bert::load`] and [`Adapter::attach`].
pub(crate) fn adapted(checkpoint: &Checkpoint, adapter: Option<&Adapter>, device: &Device) -> Result<Bert> {
    let labels = outputs(adapter, &BertConfig::of(checkpoint)?)?;
    let (mut model, loaded) = Bert::load(checkpoint, BertLoad { labels, seed: 0 }, device)?;
    let mut given = BTreeSet::new();
    if let Some(adapter) = adapter {
        adapter.attach(&mut model)?;
        given.extend(model.parameters().into_iter().filter(|(_, p)| p.is_trainable()).map(|(name, _)| name));
    }
    match loaded.fresh.iter().find(|name| !given.contains(*name)) {
        Some(name) => {
            let message =
                format!("there is no tensor `{name}`, here or in an adapter: train it with `finetune`");
            Err(wrong(checkpoint.folder(), message))
        }
        None => Ok(model),
    }
}

/// What a model that this program did not write is for.
fn guess(checkpoint: &Checkpoint, config: &BertConfig, outputs: usize) -> Result<About> {
    let mut names = checkpoint.labels()?;
    if names.len() != outputs {
        names = (0..outputs).map(|i| format!("LABEL_{i}")).collect();
    }
    let task = match checkpoint.problem()? {
        Some("multi_label_classification") => Task::Several(LabelSet::from_names(names)?, ",".into()),
        Some("regression") => Task::Regress,
        _ if outputs == 1 => Task::Regress,
        _ => Task::Classify(LabelSet::from_names(names)?),
    };
    if task == Task::Regress && outputs != 1 {
        let message = format!("a regression with {outputs} outputs is not known here");
        return Err(wrong(checkpoint.folder(), message));
    }
    Ok(About { task, max_length: config.positions })
}

/// The logits of all texts in their order. Texts of similar length share a batch, so that little of it
/// is padding.
pub(crate) fn logits(model: &Bert, texts: &[TokenIds], outputs: usize) -> Result<Vec<f32>> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&i| texts[i].ids.len());
    let mut logits = vec![0.0; texts.len() * outputs];
    for places in order.chunks(BATCH) {
        let batch = batch(texts, places, model)?;
        let rows = model.forward(&batch, &Context::eval())?.to_vec::<f32>()?;
        for (&place, row) in places.iter().zip(rows.chunks(outputs)) {
            logits[place * outputs..][..outputs].copy_from_slice(row);
        }
    }
    Ok(logits)
}

/// The texts at these places as one batch.
pub(crate) fn batch(texts: &[TokenIds], places: &[usize], model: &Bert) -> Result<TokenBatch> {
    let rows: Vec<&TokenIds> = places.iter().map(|&i| &texts[i]).collect();
    TokenBatch::pad(&rows, model.config().pad)
}

/// Writes logits as a tensor (rows, outputs) of that name.
pub(crate) fn save_logits(path: &Path, logits: Vec<f32>, outputs: usize) -> Result<()> {
    let rows = logits.len() / outputs;
    let tensor = Tensor::from_vec(logits, [rows, outputs], &Device::cpu())?;
    randlora::io::save_safetensors(path, &[("logits".into(), tensor)], &[])
}
