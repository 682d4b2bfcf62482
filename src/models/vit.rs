//! The vision transformer.

use crate::error::{Error, Result};
use crate::nn::{
    Activation, AttentionConfig, BlockConfig, BlockNames, Context, EncoderBlock, Init, LayerNorm, Linear,
    NormPlace, Parameter,
};
use crate::tensor::Tensor;

/// The sizes and the kind of a [`Vit`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VitConfig {
    /// Pixels along a side of an image.
    pub image: usize,
    /// Pixels along a side of a patch.
    pub patch: usize,
    /// Numbers for a pixel: 1 for grey, 3 for colours.
    pub channels: usize,
    /// The size of a row.
    pub width: usize,
    /// The number of blocks.
    pub layers: usize,
    /// The heads of each attention.
    pub heads: usize,
    /// The size of a row between the two layers of each MLP.
    pub hidden: usize,
    /// The number of classes.
    pub classes: usize,
    /// What the MLPs apply.
    pub activation: Activation,
    /// What the norms add to the variance.
    pub eps: f64,
    /// The rate at which outputs are dropped in training.
    pub dropout: f64,
    /// The rate at which attention probabilities are dropped in training.
    pub attention_dropout: f64,
}

/// The parts' names in Hugging Face's checkpoints.
const NAMES: BlockNames = BlockNames {
    query: "attention.attention.query",
    key: "attention.attention.key",
    value: "attention.attention.value",
    output: "attention.output.dense",
    norm1: "layernorm_before",
    up: "intermediate.dense",
    down: "output.dense",
    norm2: "layernorm_after",
};

/// A transformer over the patches of an image (Dosovitskiy et al., 2021). It classifies by what
/// becomes of a learned token before the patches. Parameters have the names that they have in Hugging
/// Face's `ViTForImageClassification`.
///
/// ```
/// use randlora::models::{Vit, VitConfig};
/// use randlora::nn::{Activation, Context, Init, Module};
/// use randlora::{DType, Device, Tensor};
///
/// let device = Device::cpu();
/// let config = VitConfig {
///     image: 8, patch: 2, channels: 1, width: 32, layers: 2, heads: 4, hidden: 64, classes: 10,
///     activation: Activation::Gelu, eps: 1e-6, dropout: 0.0, attention_dropout: 0.0,
/// };
/// let model = Vit::init(&Init::seeded(0, &device), config)?;
/// let images = Tensor::zeros([5, 1, 8, 8], DType::F32, &device)?;
/// assert_eq!(model.forward(&images, &Context::eval())?.dims(), [5, 10]);
/// assert_eq!(model.parameters()[0].0, "vit.embeddings.cls_token");
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Debug)]
pub struct Vit {
    class_token: Parameter,
    positions: Parameter,
    patches: Linear,
    blocks: Vec<EncoderBlock>,
    norm: LayerNorm,
    head: Linear,
    config: VitConfig,
}
crate::module!(Vit {
    class_token => "vit.embeddings.cls_token",
    positions => "vit.embeddings.position_embeddings",
    patches => "vit.embeddings.patch_embeddings.projection",
    blocks => "vit.encoder.layer",
    norm => "vit.layernorm",
    head => "classifier",
});

impl Vit {
    /// A new model.
    ///
    /// # Errors
    /// [`Error::Config`] where the sizes do not divide.
    pub fn init(init: &Init, config: VitConfig) -> Result<Vit> {
        let VitConfig { image, patch, channels, width, layers, heads, hidden, classes, .. } = config;
        if patch == 0 || image % patch != 0 {
            let message = format!("patches of {patch} pixels do not tile images of {image}");
            return Err(Error::config("patch", message));
        }
        let block = BlockConfig {
            attention: AttentionConfig {
                dropout: config.attention_dropout,
                ..AttentionConfig::new(width, heads)
            },
            hidden,
            activation: config.activation,
            norm: NormPlace::Pre,
            eps: config.eps,
            dropout: config.dropout,
            names: NAMES,
        };
        let (places, embeddings) =
            ((image / patch).saturating_pow(2).saturating_add(1), init.at("vit.embeddings"));
        let pixels = channels.saturating_mul(patch).saturating_mul(patch);
        let blocks =
            (0..layers).map(|i| EncoderBlock::init(&init.at(&format!("vit.encoder.layer.{i}")), block));
        Ok(Vit {
            class_token: Parameter::new(embeddings.normal("cls_token", [1, 1, width], 0.02)?),
            positions: Parameter::new(embeddings.normal("position_embeddings", [1, places, width], 0.02)?),
            patches: Linear::init(&embeddings.at("patch_embeddings.projection"), pixels, width, true)?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: LayerNorm::init(&init.at("vit.layernorm"), width, config.eps)?,
            head: Linear::init(&init.at("classifier"), width, classes, true)?,
            config,
        })
    }

    /// Images (B, channels, image, image) to a score for each class (B, classes).
    ///
    /// # Errors
    /// [`Error::Shape`] for other images than the model is made for.
    pub fn forward(&self, images: &Tensor, ctx: &Context) -> Result<Tensor> {
        self.head.forward(&self.features(images, ctx)?.select(1, 0)?, &ctx.enter(0))
    }

    /// Images (B, channels, image, image) to a row for the class token and for each patch
    /// (B, 1 + patches, width).
    pub fn features(&self, images: &Tensor, ctx: &Context) -> Result<Tensor> {
        let patches = self.patches.forward(&self.unfold(images)?, &ctx.enter(1))?;
        let width = self.config.width;
        let token = self.class_token.tensor(ctx).broadcast_to([images.dims()[0], 1, width])?;
        let x = Tensor::concat(&[&token, &patches], 1)?.add(&self.positions.tensor(ctx))?;
        let mut x = ctx.enter(2).dropout(&x, self.config.dropout)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, None, &ctx.enter(3 + i as u64))?;
        }
        self.norm.forward(&x, ctx)
    }

    /// Each patch as a row (B, patches, channels·patch²), channel by channel.
    fn unfold(&self, images: &Tensor) -> Result<Tensor> {
        let VitConfig { image, patch, channels, .. } = self.config;
        let batch = match images.dims() {
            &[b, c, h, w] if [c, h, w] == [channels, image, image] => b,
            _ => {
                let message =
                    format!("images of {} where (B, {channels}, {image}, {image}) is needed", images.shape());
                return Err(Error::shape("vit", message));
            }
        };
        let side = image / patch;
        let tiles = images.reshape([batch, channels, side, patch, side, patch])?;
        tiles.permute(&[0, 2, 4, 1, 3, 5])?.reshape([batch, side * side, channels * patch * patch])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Batches, digits::Digits};
    use crate::device::Device;
    use crate::dtype::DType;
    use crate::gradcheck;
    use crate::nn::Module;
    use crate::optim::{AdamW, Decay, Schedule};
    use crate::train::{Flow, Trainer};

    fn small() -> VitConfig {
        VitConfig {
            image: 8,
            patch: 4,
            channels: 1,
            width: 8,
            layers: 2,
            heads: 2,
            hidden: 12,
            classes: 3,
            activation: Activation::Gelu,
            eps: 1e-6,
            dropout: 0.1,
            attention_dropout: 0.1,
        }
    }

    #[test]
    fn gradients() {
        let device = Device::cpu();
        let mut model = Vit::init(&Init::seeded(0, &device), small()).unwrap();
        model.cast(DType::F64).unwrap();
        let (images, labels) = Digits::embedded().batch(&[0, 1, 2, 11], &device).unwrap();
        let (images, labels) =
            (images.to_dtype(DType::F64).unwrap(), labels.iter().map(|l| l % 3).collect::<Vec<_>>());
        let loss = |m: &Vit, ctx: &Context| m.forward(&images, ctx)?.cross_entropy(&labels, None, 0.1);
        gradcheck::model(&mut model, loss).unwrap();
        gradcheck::model(&mut model, |m, _| loss(m, &Context::train(5, 0))).unwrap();
    }

    #[test]
    fn names_are_those_of_the_checkpoints() {
        let config =
            VitConfig { image: 28, patch: 7, width: 64, layers: 4, heads: 4, hidden: 128, ..small() };
        let model = Vit::init(&Init::blank(&Device::cpu()), config).unwrap();
        let shapes = model.state();
        let of = |name: &str| shapes[name].dims().to_vec();
        assert_eq!(shapes.len(), 4 + 4 * 16 + 4);
        assert_eq!(of("vit.embeddings.position_embeddings"), [1, 17, 64]);
        assert_eq!(of("vit.embeddings.patch_embeddings.projection.weight"), [64, 49]);
        assert_eq!(of("vit.encoder.layer.3.attention.attention.query.weight"), [64, 64]);
        assert_eq!(of("vit.encoder.layer.0.intermediate.dense.weight"), [128, 64]);
        assert_eq!(of("vit.encoder.layer.0.layernorm_before.bias"), [64]);
        assert_eq!(of("classifier.bias"), [3]);
    }

    #[test]
    fn patches_are_tiles_of_the_image() {
        let device = Device::cpu();
        let config = VitConfig { image: 4, patch: 2, channels: 2, ..small() };
        let model = Vit::init(&Init::blank(&device), config).unwrap();
        let images = Tensor::from_vec((0..32).map(|i| i as f32).collect(), [1, 2, 4, 4], &device).unwrap();
        let patches = model.unfold(&images).unwrap();
        assert_eq!(patches.dims(), [1, 4, 8]);
        let second = patches.slice(1, 1..2).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(second, [2.0, 3.0, 6.0, 7.0, 18.0, 19.0, 22.0, 23.0]);
    }

    #[test]
    fn evaluation_makes_no_nodes() {
        let device = Device::cpu();
        let model = Vit::init(&Init::seeded(0, &device), small()).unwrap();
        let (images, _) = Digits::embedded().batch(&[3, 4], &device).unwrap();
        let logits = model.forward(&images, &Context::eval()).unwrap();
        assert_eq!((device.nodes_made(), logits.is_tracked()), (0, false));
        assert!(model.forward(&images, &Context::train(0, 0)).unwrap().is_tracked());
        assert!(device.nodes_made() > 40);
    }

    #[test]
    fn wrong_images_and_sizes() {
        let device = Device::cpu();
        let model = Vit::init(&Init::seeded(0, &device), small()).unwrap();
        for dims in [&[1, 3, 8, 8][..], &[1, 1, 8, 4], &[8, 8]] {
            let images = Tensor::zeros(dims, DType::F32, &device).unwrap();
            assert!(matches!(model.forward(&images, &Context::eval()), Err(Error::Shape { .. })));
        }
        let nothing = Tensor::zeros([0, 1, 8, 8], DType::F32, &device).unwrap();
        assert_eq!(model.forward(&nothing, &Context::eval()).unwrap().dims(), [0, 3]);
        for patch in [0, 3] {
            let error = Vit::init(&Init::seeded(0, &device), VitConfig { patch, ..small() }).unwrap_err();
            assert!(matches!(error, Error::Config { .. }));
        }
    }

    /// Trains on digits and gives the bits of the model and the last loss.
    fn train(threads: usize) -> (Vec<u32>, f64) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (digits, device) = (Digits::embedded(), Device::cpu());
            let config = VitConfig { patch: 2, width: 32, heads: 4, hidden: 64, classes: 10, ..small() };
            let mut model = Vit::init(&Init::seeded(1, &device), config).unwrap();
            let schedule = Schedule { warmup: 4, decay: Decay::Cosine };
            let mut trainer =
                Trainer { schedule, clip: Some(1.0), seed: 9, ..Trainer::new(AdamW::new(), 3e-3, 1) };
            let mut last = 0.0;
            let loss = |m: &Vit, rows: &[usize], ctx: &Context| {
                let (images, labels) = digits.batch(rows, &device)?;
                m.forward(&images, ctx)?.cross_entropy(&labels, None, 0.0)
            };
            let batches = Batches::of(digits.split().train, 64, 2).unwrap();
            let on_step = |_: &Vit, progress: &crate::train::Progress| {
                last = progress.loss;
                Ok(Flow::Continue)
            };
            trainer.fit(&mut model, &batches, loss, on_step).unwrap();
            let bits = model.state().into_values().flat_map(|v| v.to_vec::<f32>().unwrap()).map(f32::to_bits);
            (bits.collect(), last)
        })
    }

    #[test]
    fn training_gives_the_same_bits_on_any_number_of_threads() {
        let one = train(1);
        assert!(one.1 < 2.2, "the loss is still {}", one.1);
        assert!([2, 3, 7].into_iter().all(|threads| train(threads) == one));
    }
}
