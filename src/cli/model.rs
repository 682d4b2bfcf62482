//! A model with its adapter, tokenizer and task, ready to be used.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use randlora::adapters::Adapted;
use randlora::io::{Access, Adapter, Checkpoint};
use randlora::models::{Bert, BertConfig, BertLoad};
use randlora::nn::{Context, TokenBatch, TokenIds};
use randlora::{DType, Device, Error, Result, Tensor};

use super::about::About;
use super::encode::Encoder;
use super::labels::LabelSet;
use super::precision::PrecisionArgs;
use super::several::{MixArgs, Named, Use, note_models};
use super::table::wrong;
use super::task::Task;

/// Where a model is and how it comes into memory.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// The model's folder: config.json, model.safetensors, tokenizer.json.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// An adapter's folder, as this program or PEFT wrote it; of several each with a name, or called by its folder.
    #[arg(long, value_name = "[NAME=]DIR")]
    pub(crate) adapter: Vec<Named>,
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
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct PeftDraw {
    /// The type that PEFT drew the bases in, for a RandLoRA that it saved without them: bf16, or f16 on a machine
    /// that has no bf16.
    #[arg(long, value_enum, default_value = "bf16", value_name = "TYPE")]
    peft_draw: Half,
}

/// A type that PEFT draws in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Half {
    #[default]
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
    ///
    /// # Errors
    /// [`Error::Config`] where there are several, and as [`Adapter::open`].
    pub(crate) fn open_adapter(&self) -> Result<Option<Adapter>> {
        if self.adapter.len() > 1 {
            let message = format!("there are {}: name the one that is meant", self.adapter.len());
            return Err(Error::Config { what: "--adapter", message });
        }
        self.adapter.first().map(|named| self.draw.open(&named.folder)).transpose()
    }

    /// Opens all adapters' folders.
    ///
    /// # Errors
    /// [`Error::Config`] where two have one name, and as [`Adapter::open`].
    pub(crate) fn open_adapters(&self) -> Result<Vec<(String, Adapter)>> {
        let mut opened: Vec<(String, Adapter)> = Vec::new();
        for named in &self.adapter {
            let name = named.name();
            if opened.iter().any(|(other, _)| *other == name) {
                let message =
                    format!("two are called `{name}`: give each a name, as in `--adapter a={name}`");
                return Err(Error::Config { what: "--adapter", message });
            }
            opened.push((name, self.draw.open(&named.folder)?));
        }
        note_models(&opened);
        Ok(opened)
    }

    /// Opens the model folder.
    pub(crate) fn checkpoint(&self) -> Result<Checkpoint> {
        Checkpoint::open(&self.model, self.access())
    }

    /// How models come into memory.
    pub(crate) fn access(&self) -> Access {
        if self.no_mmap { Access::Read } else { Access::Map }
    }

    /// Runs `f` with the threads that were asked for.
    pub(crate) fn with_threads<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        with_threads(self.threads, f)
    }
}

/// Whether this is the folder of an adapter.
pub(crate) fn is_adapter(folder: &Path) -> bool {
    ["adapter_config.json", "compact.safetensors"].iter().any(|name| folder.join(name).is_file())
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

/// A model that is ready to be used, with one or several adapters or none.
#[derive(Debug)]
pub(crate) struct Classifier {
    model: Adapted<Bert>,
    /// What it is used with, each with what that is for.
    uses: Vec<(Use, About)>,
    /// By the length that texts are cut to.
    encoders: BTreeMap<usize, Encoder>,
    folder: PathBuf,
    /// The parameters that the model's folder lacks.
    fresh: Vec<String>,
}

/// A model as it is used with one of its adapters, or with what there is.
pub(crate) struct InUse<'a> {
    /// What that is called, where there are several.
    pub(crate) name: Option<&'a str>,
    pub(crate) about: &'a About,
    pub(crate) encoder: &'a Encoder,
    model: &'a Bert,
}

impl Classifier {
    /// Opens a trained model, or a model with trained adapters.
    ///
    /// # Errors
    /// As the parts' own; [`Error::Data`] for a model without a classifier and no adapter that has one.
    pub(crate) fn open(args: &ModelArgs, mix: &MixArgs, device: &Device) -> Result<Classifier> {
        let checkpoint = args.checkpoint()?;
        let opened = args.open_adapters()?;
        let uses = mix.uses(args, &opened)?;
        let (mut model, fresh) = with_adapters(&checkpoint, &by_name(&opened), device)?;
        let config = *model.model().config();
        let (mut ready, mut encoders) = (Vec::new(), BTreeMap::new());
        for one in uses {
            let about = about_of(&one.folder, &args.model, &checkpoint, config.labels)?;
            one.turn_on(&mut model, &fresh, &args.model)?;
            if let Entry::Vacant(place) = encoders.entry(about.max_length) {
                place.insert(Encoder::open(&args.model, &config, about.max_length)?);
            }
            ready.push((one, about));
        }
        Ok(Classifier { model, uses: ready, encoders, folder: args.model.clone(), fresh })
    }

    /// How many ways of using it there are: one for each adapter, or one.
    pub(crate) fn count(&self) -> usize {
        self.uses.len()
    }

    /// The adapters' names in that order; none of a sum.
    pub(crate) fn names(&self) -> Vec<&str> {
        self.uses.iter().filter_map(|(one, _)| one.adapter()).collect()
    }

    /// The model in one of these ways.
    ///
    /// # Errors
    /// As [`Use::turn_on`].
    pub(crate) fn turn_to(&mut self, place: usize) -> Result<InUse<'_>> {
        let (one, about) = &self.uses[place];
        one.turn_on(&mut self.model, &self.fresh, &self.folder)?;
        let encoder = &self.encoders[&about.max_length];
        Ok(InUse { name: one.name.as_deref(), about, encoder, model: self.model.model() })
    }
}

impl InUse<'_> {
    /// The logits of all texts, a row of outputs each.
    pub(crate) fn logits(&self, texts: &[TokenIds]) -> Result<Vec<f32>> {
        logits(self.model, texts, self.about.task.outputs())
    }
}

/// What a model, or its adapter, was trained for.
///
/// # Errors
/// [`Error::Data`] where neither has a classifier, or another one than randlora.json says.
pub(crate) fn about(args: &ModelArgs, checkpoint: &Checkpoint, adapter: Option<&Adapter>) -> Result<About> {
    let config = BertConfig::of(checkpoint)?;
    let labels = outputs(adapter, &config)?.unwrap_or(config.labels);
    let folder = args.adapter.first().map_or(&args.model, |named| &named.folder);
    about_of(folder, &args.model, checkpoint, labels)
}

/// What the folder of an adapter or a model says of a model with so many outputs, or else the model itself.
fn about_of(folder: &Path, model: &Path, checkpoint: &Checkpoint, labels: usize) -> Result<About> {
    if labels == 0 {
        let message = "the model has no classifier: name an adapter with `--adapter` that has one, or train with `finetune`";
        return Err(wrong(model, message));
    }
    let config = BertConfig::of(checkpoint)?;
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
    let named: Vec<(&str, &Adapter)> = adapter.into_iter().map(|adapter| ("adapter", adapter)).collect();
    let (mut model, fresh) = with_adapters(checkpoint, &named, device)?;
    named.first().map_or(Ok(()), |(name, _)| model.activate(name))?;
    check_complete(&model, &fresh, checkpoint.folder())?;
    Ok(model.into_model())
}

/// An error for a parameter that neither the model's folder nor an active adapter has.
pub(crate) fn check_complete(model: &Adapted<Bert>, fresh: &[String], folder: &Path) -> Result<()> {
    match fresh.iter().find(|name| !model.whole().any(|held| held == *name)) {
        Some(name) => {
            let message =
                format!("there is no tensor `{name}`, here or in an adapter: train it with `finetune`");
            Err(wrong(folder, message))
        }
        None => Ok(()),
    }
}

/// A model with these adapters, none of them active, and its parameters that the checkpoint lacks.
///
/// # Errors
/// [`Error::Config`] for adapters whose classifiers have different numbers of outputs, and as [`Bert::load`] and
/// [`Adapter::attach`].
pub(crate) fn with_adapters(
    checkpoint: &Checkpoint,
    adapters: &[(&str, &Adapter)],
    device: &Device,
) -> Result<(Adapted<Bert>, Vec<String>)> {
    let config = BertConfig::of(checkpoint)?;
    let mut labels: Option<(&str, usize)> = None;
    for &(name, adapter) in adapters {
        match (outputs(Some(adapter), &config)?, labels) {
            (Some(own), Some((other, theirs))) if own != theirs => {
                let message = format!(
                    "the classifier of `{other}` has {theirs} outputs, that of `{name}` {own}: use them in runs of \
                     their own"
                );
                return Err(Error::Config { what: "--adapter", message });
            }
            (own, _) => labels = labels.or(own.map(|own| (name, own))),
        }
    }
    let wanted = BertLoad { labels: labels.map(|(_, labels)| labels), seed: 0 };
    let (model, loaded) = Bert::load(checkpoint, wanted, device)?;
    let mut model = Adapted::new(model)?;
    for &(name, adapter) in adapters {
        model.add(name, |model| adapter.attach(model))?;
    }
    Ok((model, loaded.fresh))
}

/// Adapters as [`with_adapters`] takes them.
pub(crate) fn by_name(opened: &[(String, Adapter)]) -> Vec<(&str, &Adapter)> {
    opened.iter().map(|(name, adapter)| (name.as_str(), adapter)).collect()
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
