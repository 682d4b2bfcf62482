//! BERT, the encoder of text.

mod load;
mod save;

use crate::error::{Error, Result};
use crate::nn::{
    Activation, AttentionConfig, BlockConfig, BlockNames, Context, Embedding, EncoderBlock, Init, LayerNorm,
    Linear, NormPlace, TokenBatch,
};
use crate::ops::dropout::check_rate;
use crate::ops::index::Ids;
use crate::tensor::Tensor;

pub use load::BertLoad;
pub use save::Head;

/// The sizes and the kind of a [`Bert`]. The default is `bert-base-uncased` with two labels, the
/// default of transformers' `BertConfig`, whose names for the fields stand in parentheses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BertConfig {
    /// The number of tokens (`vocab_size`).
    pub vocab: usize,
    /// The size of a row (`hidden_size`).
    pub width: usize,
    /// The number of blocks (`num_hidden_layers`).
    pub layers: usize,
    /// The heads of each attention (`num_attention_heads`).
    pub heads: usize,
    /// The size of a row between the two layers of each MLP (`intermediate_size`).
    pub hidden: usize,
    /// The most tokens in a row of a batch (`max_position_embeddings`).
    pub positions: usize,
    /// The number of segments (`type_vocab_size`).
    pub segments: usize,
    /// What the MLPs apply (`hidden_act`).
    pub activation: Activation,
    /// What the norms add to the variance (`layer_norm_eps`).
    pub eps: f64,
    /// The rate at which outputs are dropped in training (`hidden_dropout_prob`).
    pub dropout: f64,
    /// The rate at which attention probabilities are dropped in training
    /// (`attention_probs_dropout_prob`).
    pub attention_dropout: f64,
    /// The rate at which what the classifier reads is dropped in training; None for `dropout`
    /// (`classifier_dropout`).
    pub classifier_dropout: Option<f64>,
    /// The token that fills short rows of a batch (`pad_token_id`).
    pub pad: u32,
    /// The outputs of the classifier; 0 for a model without one (`num_labels`).
    pub labels: usize,
    /// The standard deviation of new weights (`initializer_range`).
    pub std: f64,
}

impl Default for BertConfig {
    fn default() -> BertConfig {
        BertConfig {
            vocab: 30522,
            width: 768,
            layers: 12,
            heads: 12,
            hidden: 3072,
            positions: 512,
            segments: 2,
            activation: Activation::Gelu,
            eps: 1e-12,
            dropout: 0.1,
            attention_dropout: 0.1,
            classifier_dropout: None,
            pad: 0,
            labels: 2,
            std: 0.02,
        }
    }
}

impl BertConfig {
    fn check(&self) -> Result<()> {
        let BertConfig { vocab, width, hidden, positions, segments, pad, std, .. } = *self;
        let sizes = [
            ("vocab", vocab),
            ("width", width),
            ("hidden", hidden),
            ("positions", positions),
            ("segments", segments),
        ];
        if let Some((what, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Error::config(what, "it is 0 where at least 1 is needed"));
        }
        if pad as usize >= vocab {
            return Err(Error::config("pad", format!("the token {pad} is not one of the {vocab} there are")));
        }
        if !(std >= 0.0 && std.is_finite()) {
            return Err(Error::config("std", format!("{std} is no standard deviation")));
        }
        if !(self.eps >= 0.0 && self.eps.is_finite()) {
            return Err(Error::config("eps", format!("{} cannot be added to a variance", self.eps)));
        }
        let rates = [Some(self.dropout), Some(self.attention_dropout), self.classifier_dropout];
        rates.into_iter().flatten().try_for_each(check_rate)?;
        Ok(())
    }

    fn block(&self) -> BlockConfig {
        BlockConfig {
            attention: AttentionConfig {
                dropout: self.attention_dropout,
                ..AttentionConfig::new(self.width, self.heads)
            },
            hidden: self.hidden,
            activation: self.activation,
            norm: NormPlace::Post,
            eps: self.eps,
            dropout: self.dropout,
            names: NAMES,
        }
    }
}

/// The parts' names in Hugging Face's checkpoints.
const NAMES: BlockNames = BlockNames {
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    output: "attention.output.dense",
    norm1: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    norm2: "output.LayerNorm",
};

/// A transformer that reads a text in both directions (Devlin et al., 2019). It classifies by what
/// becomes of the first token. Parameters have the names that they have in Hugging Face's
/// `BertForSequenceClassification`, and values are dropped in the same places.
///
/// ```
/// use randlora::Device;
/// use randlora::models::{Bert, BertConfig};
/// use randlora::nn::{Context, Init, Module, TokenBatch, TokenIds};
///
/// let config = BertConfig {
///     vocab: 100, width: 32, layers: 2, heads: 4, hidden: 64, positions: 16, labels: 3,
///     ..BertConfig::default()
/// };
/// let model = Bert::init(&Init::seeded(0, &Device::cpu()), config)?;
/// let text = |ids: &[u32]| TokenIds { ids: ids.to_vec(), ..TokenIds::default() };
/// let batch = TokenBatch::pad(&[&text(&[1, 7, 9, 2]), &text(&[1, 5, 2])], config.pad)?;
/// assert_eq!(model.forward(&batch, &Context::eval())?.dims(), [2, 3]);
/// assert_eq!(model.hidden(&batch, &Context::eval())?.dims(), [2, 4, 32]);
/// assert_eq!(model.parameters()[0].0, "bert.embeddings.word_embeddings.weight");
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Debug)]
pub struct Bert {
    words: Embedding,
    positions: Embedding,
    segments: Embedding,
    norm: LayerNorm,
    blocks: Vec<EncoderBlock>,
    pooler: Linear,
    classifier: Option<Linear>,
    config: BertConfig,
}
crate::module!(Bert {
    words => "bert.embeddings.word_embeddings",
    positions => "bert.embeddings.position_embeddings",
    segments => "bert.embeddings.token_type_embeddings",
    norm => "bert.embeddings.LayerNorm",
    blocks => "bert.encoder.layer",
    pooler => "bert.pooler.dense",
    classifier,
});

impl Bert {
    /// A new model. Its matrices are normal, its biases 0.
    ///
    /// # Errors
    /// [`Error::Config`] where a size is 0, the heads do not divide the width, the padding is no
    /// token, or a rate of dropping does not lie in 0 ≤ p < 1.
    pub fn init(init: &Init, config: BertConfig) -> Result<Bert> {
        config.check()?;
        let BertConfig { width, std, labels, .. } = config;
        let init = init.clone().with_linear_std(std);
        let embeddings = init.at("bert.embeddings");
        let table = |name: &str, count| Embedding::init(&embeddings.at(name), count, width, std);
        let block = |i| EncoderBlock::init(&init.at(&format!("bert.encoder.layer.{i}")), config.block());
        let classifier = || Linear::init(&init.at("classifier"), width, labels, true);
        Ok(Bert {
            words: table("word_embeddings", config.vocab)?,
            positions: table("position_embeddings", config.positions)?,
            segments: table("token_type_embeddings", config.segments)?,
            norm: LayerNorm::init(&embeddings.at("LayerNorm"), width, config.eps)?,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            pooler: Linear::init(&init.at("bert.pooler.dense"), width, width, true)?,
            classifier: (labels > 0).then(classifier).transpose()?,
            config,
        })
    }

    /// What the model was made with.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The classifier's output for each row of the batch (B, labels).
    ///
    /// # Errors
    /// As [`Bert::hidden`], and [`Error::Config`] for a model without a classifier.
    pub fn forward(&self, batch: &TokenBatch, ctx: &Context) -> Result<Tensor> {
        let Some(classifier) = &self.classifier else {
            let message = "it is 0, so that the model has no classifier: set it, or call `pooled`";
            return Err(Error::config("labels", message));
        };
        let rate = self.config.classifier_dropout.unwrap_or(self.config.dropout);
        let pooled = ctx.enter(2).dropout(&self.pooled(batch, ctx)?, rate)?;
        classifier.forward(&pooled, &ctx.enter(3))
    }

    /// What the pooler makes of the first token of each row (B, width).
    ///
    /// # Errors
    /// As [`Bert::hidden`].
    pub fn pooled(&self, batch: &TokenBatch, ctx: &Context) -> Result<Tensor> {
        // Nothing reads the last block's other places: most of its work is left out.
        let Some((last, before)) = self.blocks.split_last() else {
            let first = self.through(&[], batch, ctx)?.select(1, 0)?;
            return self.pooler.forward(&first, &ctx.enter(1))?.tanh();
        };
        let x = self.through(before, batch, ctx)?;
        let ctx_last = ctx.enter(4 + before.len() as u64);
        let first = last.forward_of(&x.slice(1, 0..1)?, &x, batch.keys.as_ref(), &ctx_last)?;
        self.pooler.forward(&first.squeeze(1)?, &ctx.enter(1))?.tanh()
    }

    /// A row for each token (B, T, width); what stands at padding means nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows of no token or more than `positions`, or where the parts of the
    /// batch differ in shape; [`Error::Data`] for a token or segment that the model has not.
    pub fn hidden(&self, batch: &TokenBatch, ctx: &Context) -> Result<Tensor> {
        self.through(&self.blocks, batch, ctx)
    }

    /// What comes out of these blocks, the model's first.
    fn through(&self, blocks: &[EncoderBlock], batch: &TokenBatch, ctx: &Context) -> Result<Tensor> {
        let x = self.norm.forward(&self.embed(batch, ctx)?, ctx)?;
        let mut x = ctx.enter(0).dropout(&x, self.config.dropout)?;
        for (i, block) in blocks.iter().enumerate() {
            x = block.forward(&x, batch.keys.as_ref(), &ctx.enter(4 + i as u64))?;
        }
        Ok(x)
    }

    /// The sum of each token's three embeddings (B, T, width).
    fn embed(&self, batch: &TokenBatch, ctx: &Context) -> Result<Tensor> {
        let places = self.places(batch)?;
        let positions = Ids::new((0..places as u32).collect::<Vec<_>>(), [places])?;
        let words = look_up(&self.words, "token", &batch.ids, ctx)?;
        let segments = look_up(&self.segments, "segment", &batch.segments, ctx)?;
        words.add(&segments)?.add(&self.positions.forward(&positions, ctx)?)
    }

    /// How many places the rows of a batch have, where its parts fit together and the model.
    fn places(&self, batch: &TokenBatch) -> Result<usize> {
        let (ids, segments, limit) = (batch.ids.shape(), batch.segments.shape(), self.config.positions);
        let &[rows, places] = ids.dims() else {
            return Err(Error::shape("bert", format!("ids of {ids} where (batch, places) is needed")));
        };
        if segments != ids {
            return Err(Error::shape("bert", format!("segments of {segments} for ids of {ids}")));
        }
        if let Some(keys) = batch.keys.as_ref().filter(|keys| keys.len() != rows * places) {
            return Err(Error::shape("bert", format!("a mask of {} places for ids of {ids}", keys.len())));
        }
        if places == 0 || places > limit {
            let message = format!(
                "rows of {places} tokens where the model reads 1 to {limit}: truncate what is longer"
            );
            return Err(Error::shape("bert", message));
        }
        Ok(places)
    }
}

/// The embeddings of ids, or an error that says whose ids do not fit.
fn look_up(table: &Embedding, what: &str, ids: &Ids, ctx: &Context) -> Result<Tensor> {
    table.forward(ids, ctx).map_err(|error| match error {
        Error::Index { index, size, .. } => Error::data(
            format!("{what} {index}"),
            format!("the model has {size}, from 0 on: was the text tokenised for another model?"),
        ),
        other => other,
    })
}

#[cfg(test)]
mod tests;
