//! BERT from a model folder of Hugging Face's.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::io::{Checkpoint, json::Object};
use crate::models::bert::{Bert, BertConfig};
use crate::models::load::{Loaded, load};
use crate::nn::{Activation, Init, ItemMut, Module};

/// What [`Bert::load`] makes beside what the checkpoint holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BertLoad {
    /// The outputs of a new classifier; None for the checkpoint's own, or none where it has none.
    pub labels: Option<usize>,
    /// What the first values of new parts follow from.
    pub seed: u64,
}

impl BertConfig {
    /// The configuration of a model folder.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for another family than BERT, or a field that is missing or
    /// means something that is not computed here.
    pub fn of(checkpoint: &Checkpoint) -> Result<BertConfig> {
        let file = checkpoint.config();
        check_family(file)?;
        let size = |name| file.needed(name, file.size(name)?);
        let default = BertConfig::default();
        let activation = file.text("hidden_act")?.unwrap_or("gelu");
        let Some(activation) = Activation::by_name(activation) else {
            return Err(file.error(format!("`hidden_act` is {activation}, which is not known here")));
        };
        let position = file.text("position_embedding_type")?.unwrap_or("absolute");
        if position != "absolute" {
            return Err(
                file.error(format!("`position_embedding_type` is {position}: only absolute is known here"))
            );
        }
        if file.flag("is_decoder")?.unwrap_or(false) {
            return Err(file.error("`is_decoder` is true: this is no encoder"));
        }
        Ok(BertConfig {
            vocab: size("vocab_size")?,
            width: size("hidden_size")?,
            layers: size("num_hidden_layers")?,
            heads: size("num_attention_heads")?,
            hidden: size("intermediate_size")?,
            positions: size("max_position_embeddings")?,
            segments: file.size("type_vocab_size")?.unwrap_or(default.segments),
            activation,
            eps: file.number("layer_norm_eps")?.unwrap_or(default.eps),
            dropout: file.number("hidden_dropout_prob")?.unwrap_or(default.dropout),
            attention_dropout: file
                .number("attention_probs_dropout_prob")?
                .unwrap_or(default.attention_dropout),
            classifier_dropout: file.number("classifier_dropout")?,
            pad: file.size("pad_token_id")?.unwrap_or(0).try_into().unwrap_or(u32::MAX),
            labels: checkpoint.sizes("classifier.bias").map_or(0, |sizes| sizes.iter().product()),
            std: file.number("initializer_range")?.unwrap_or(default.std),
        })
    }
}

/// The family of a model, by its `model_type` or its architecture.
fn check_family(file: &Object) -> Result<()> {
    let architectures = file.texts("architectures")?.unwrap_or_default();
    let bert = match file.text("model_type")? {
        Some(family) => family == "bert",
        None => architectures.iter().any(|name| name.starts_with("Bert")),
    };
    if bert {
        return Ok(());
    }
    let found = file.text("model_type")?.or(architectures.first().copied()).unwrap_or("unsaid");
    Err(file.error(format!("the model's family is {found}: only bert is known here")))
}

impl Bert {
    /// A model with the values of a checkpoint; its matrices stay in the type they are stored in. A pooler or
    /// classifier that the checkpoint lacks is new; what else is missing is an error.
    ///
    /// ```no_run
    /// use randlora::Device;
    /// use randlora::io::{Access, Checkpoint};
    /// use randlora::models::{Bert, BertLoad};
    ///
    /// let checkpoint = Checkpoint::open("all-MiniLM-L6-v2".as_ref(), Access::Map)?;
    /// let wanted = BertLoad { labels: Some(2), seed: 0 };
    /// let (model, loaded) = Bert::load(&checkpoint, wanted, &Device::cpu())?;
    /// assert_eq!(loaded.fresh, ["classifier.weight", "classifier.bias"]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`BertConfig::of`], and [`Error::Data`](crate::Error::Data) for tensors that are missing or
    /// have another shape than the configuration says.
    pub fn load(checkpoint: &Checkpoint, wanted: BertLoad, device: &Device) -> Result<(Bert, Loaded)> {
        let stored = BertConfig::of(checkpoint)?;
        let config = BertConfig { labels: wanted.labels.unwrap_or(stored.labels), ..stored };
        // Without this a number in a file could have blocks made without end.
        let tensors = checkpoint.entries().count();
        if config.layers > tensors {
            let message =
                format!("`num_hidden_layers` is {}, but there are {tensors} tensors", config.layers);
            return Err(checkpoint.config().error(message));
        }
        let mut model = Bert::init(&Init::blank(device), config).map_err(|error| match error {
            Error::Config { .. } | Error::Shape { .. } => checkpoint.config().error(error.to_string()),
            other => other,
        })?;
        let may_be_fresh = |name: &str| name.starts_with("bert.pooler.") || name.starts_with("classifier.");
        let names = |name: &str| match wanted.labels.is_some() && name.starts_with("classifier.") {
            true => vec![],
            false => names(name),
        };
        let loaded = load(&mut model, checkpoint, device, names, may_be_fresh)?;
        model.draw(&loaded.fresh, &Init::seeded(wanted.seed, device))?;
        Ok((model, loaded))
    }

    /// First values for these of the pooler's and the classifier's parameters.
    fn draw(&mut self, fresh: &[String], init: &Init) -> Result<()> {
        let std = self.config.std;
        self.try_visit_mut(&mut |name, item| match item {
            ItemMut::Parameter(parameter) if fresh.iter().any(|f| f == name) => {
                let shape = *parameter.value().shape();
                parameter.replace(match name.ends_with(".bias") {
                    true => init.constant(shape, 0.0)?,
                    false => init.normal(name, shape, std)?,
                })
            }
            _ => Ok(()),
        })
    }
}

/// What a parameter may be called in a checkpoint: with and without the wrapping model's prefix, and
/// as the first checkpoints, converted from TensorFlow, call the parts of a norm.
fn names(name: &str) -> Vec<String> {
    let inner = name.strip_prefix("bert.").unwrap_or(name);
    let old = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    };
    vec![name.into(), inner.into(), old(name), old(inner)]
}
