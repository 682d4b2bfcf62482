//! Training on tokens without meaning: what it costs does not depend on them.

use std::path::Path;

use randlora::io::{Access, Checkpoint};
use randlora::models::{Bert, BertConfig, BertLoad};
use randlora::nn::{Context, TokenBatch, TokenIds};
use randlora::{DType, Device, Error, Result, Tensor};

use super::Failure;
use super::method::Settings;

/// The model of a folder with a new classifier, prepared for a method as `finetune` does it. Without a
/// number of labels the classifier has those of the model's own, or 2.
pub(crate) fn model(
    folder: &Path,
    access: Access,
    labels: Option<usize>,
    settings: &Settings<'_>,
    device: &Device,
) -> Result<Bert> {
    let checkpoint = Checkpoint::open(folder, access)?;
    let stored = BertConfig::of(&checkpoint)?.labels;
    let labels = labels.unwrap_or(if stored > 0 { stored } else { 2 });
    let (mut model, loaded) = Bert::load(&checkpoint, BertLoad { labels: Some(labels), seed: 0 }, device)?;
    settings.attach(&mut model, &loaded.fresh, &checkpoint)?;
    Ok(model)
}

/// An error where texts are longer than the model reads.
pub(crate) fn check_length(
    folder: &Path,
    length: usize,
    model: &BertConfig,
) -> std::result::Result<(), Failure> {
    match length > model.positions {
        true => {
            let (path, most) = (folder.display(), model.positions);
            Err(format!("--length {length}: the model in {path} reads {most} tokens at most").into())
        }
        false => Ok(()),
    }
}

/// So many texts of random tokens.
pub(crate) fn texts(count: usize, length: usize, model: &BertConfig) -> Vec<TokenIds> {
    let token = |i: usize| (i.wrapping_mul(0x9E37_79B1) % model.vocab) as u32;
    let text = |i: usize| TokenIds {
        ids: (i * length..(i + 1) * length).map(token).collect(),
        ..TokenIds::default()
    };
    (0..count).map(text).collect()
}

/// The loss of these texts, with answers that are as good as any.
pub(crate) fn loss(model: &Bert, texts: &[&TokenIds], ctx: &Context) -> Result<Tensor> {
    let logits = model.forward(&TokenBatch::pad(texts, model.config().pad)?, ctx)?;
    match model.config().labels {
        1 => logits.mse_loss(&Tensor::zeros(logits.shape(), DType::F32, logits.device())?),
        labels => {
            let targets: Vec<u32> = (0..texts.len()).map(|i| (i % labels) as u32).collect();
            logits.cross_entropy(&targets, None, 0.0)
        }
    }
}

/// The number that a loss is, if it is one.
pub(crate) fn finite(loss: &Tensor, step: usize) -> Result<f64> {
    let value = loss.item()?;
    match value.is_finite() {
        true => Ok(value),
        false => Err(Error::NonFinite { what: "the loss".into(), step }),
    }
}
