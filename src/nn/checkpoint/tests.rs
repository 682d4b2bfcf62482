use std::sync::Arc;

use super::*;
use crate::adapters::{self, Full, Lora, Method, RandLora, Targets};
use crate::data::digits::Digits;
use crate::device::Device;
use crate::dtype::DType;
use crate::grad::Gradients;
use crate::gradcheck;
use crate::models::{Bert, BertConfig, Vit, VitConfig};
use crate::nn::{
    Activation, AttentionConfig, BlockConfig, BlockNames, EncoderBlock, Init, Linear, NormPlace, TokenBatch,
    TokenIds,
};

const WIDTH: usize = 8;

fn config(norm: NormPlace) -> BlockConfig {
    let attention = AttentionConfig { dropout: 0.2, ..AttentionConfig::new(WIDTH, 2) };
    BlockConfig {
        attention,
        hidden: 12,
        activation: Activation::Gelu,
        norm,
        eps: 1e-5,
        dropout: 0.1,
        names: BlockNames::default(),
    }
}

fn init() -> Init {
    Init::seeded(6, &Device::cpu())
}

fn blocks(init: &Init, count: usize) -> Vec<EncoderBlock> {
    let block = |i: usize| EncoderBlock::init(&init.at(&i.to_string()), config(NormPlace::Post)).unwrap();
    (0..count).map(block).collect()
}

fn chain(blocks: &[EncoderBlock], x: &Tensor, ctx: &Context) -> Result<Tensor> {
    let each = |x: Tensor, (i, block): (usize, &EncoderBlock)| block.forward(&x, None, &ctx.enter(i as u64));
    blocks.iter().enumerate().try_fold(x.clone(), each)
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// The bits of every trained parameter's gradient, with its name.
fn all_bits<M: Module + ?Sized>(model: &M, gradients: &Gradients) -> Vec<(String, Option<Vec<u32>>)> {
    let trained = model.parameters().into_iter().filter(|(_, p)| p.is_trainable());
    trained.map(|(name, p)| (name, gradients.get(p.leaf()).map(bits))).collect()
}

#[test]
fn gradients_of_a_block_with_dropout() {
    let (init, ctx) = (init(), Context::train(3, 1).checkpointed());
    let x = init.normal("x", [2, 4, WIDTH], 1.0).unwrap().to_dtype(DType::F64).unwrap();
    for norm in [NormPlace::Pre, NormPlace::Post] {
        let mut block = EncoderBlock::init(&init, config(norm)).unwrap();
        block.cast(DType::F64).unwrap();
        gradcheck::model(&mut block, |m, _| m.forward(&x, None, &ctx)).unwrap();
        let of_x = gradcheck::function("x under a checkpoint", |x| block.forward(&x[0], None, &ctx));
        of_x.check(std::slice::from_ref(&x)).unwrap();
    }
}

fn bert(dropout: f64) -> (Bert, TokenBatch) {
    let config = BertConfig {
        vocab: 11,
        width: WIDTH,
        layers: 3,
        heads: 2,
        hidden: 12,
        positions: 6,
        dropout,
        attention_dropout: dropout,
        std: 0.5,
        ..BertConfig::default()
    };
    let long = TokenIds { ids: vec![1, 5, 2, 7, 2], ..TokenIds::default() };
    let short = TokenIds { ids: vec![1, 9, 2], ..TokenIds::default() };
    (Bert::init(&init(), config).unwrap(), TokenBatch::pad(&[&long, &short], 0).unwrap())
}

/// The first block's input needs no gradient in a frozen model, and does where embeddings are trained.
#[test]
fn models_have_the_same_bits_with_and_without() {
    let randlora = RandLora { rank: 3, dropout: 0.1, ..RandLora::default() };
    let lora = Lora { rank: 2, dropout: 0.1, ..Lora::default() };
    for method in [&randlora as &dyn Method, &lora, &Full] {
        for targets in [Targets::AllLinear, Targets::names(&["1.output.dense"])] {
            let (mut model, batch) = bert(0.1);
            adapters::attach(&mut model, method, &targets, &["classifier"]).unwrap();
            let run = |ctx: &Context| {
                let loss = model.forward(&batch, ctx).unwrap().cross_entropy(&[1, 0], None, 0.0).unwrap();
                (bits(&loss), all_bits(&model, &loss.backward().unwrap()))
            };
            let plain = run(&Context::train(4, 7));
            assert!(plain.1.iter().all(|(_, gradient)| gradient.is_some()));
            assert!(run(&Context::train(4, 7).checkpointed()) == plain, "{method:?} {targets:?}");
            assert!(run(&Context::train(4, 8).checkpointed()) != plain);
        }
    }
}

#[test]
fn a_vision_transformer_has_the_same_bits() {
    let config = VitConfig {
        image: 8,
        patch: 4,
        channels: 1,
        width: WIDTH,
        layers: 2,
        heads: 2,
        hidden: 12,
        classes: 10,
        activation: Activation::Gelu,
        eps: 1e-6,
        dropout: 0.1,
        attention_dropout: 0.1,
    };
    let model = Vit::init(&init(), config).unwrap();
    let (images, labels) = Digits::embedded().batch(&[0, 1, 2], &Device::cpu()).unwrap();
    let run = |ctx: &Context| {
        let loss = model.forward(&images, ctx).unwrap().cross_entropy(&labels, None, 0.0).unwrap();
        (bits(&loss), all_bits(&model, &loss.backward().unwrap()))
    };
    assert!(run(&Context::train(1, 2)) == run(&Context::train(1, 2).checkpointed()));
}

#[test]
fn evaluation_makes_no_nodes() {
    let (model, batch) = bert(0.1);
    let eval = model.forward(&batch, &Context::eval().checkpointed()).unwrap();
    assert_eq!(bits(&eval), bits(&model.forward(&batch, &Context::eval()).unwrap()));
    assert_eq!((eval.device().nodes_made(), eval.is_tracked()), (0, false));
}

/// What needs a gradient: x, the module, both, or nothing.
#[test]
fn only_what_is_trained_gets_a_gradient() {
    let (init, ctx) = (init(), Context::train(0, 0));
    let mut layer = Linear::init(&init, WIDTH, 3, true).unwrap();
    let x = init.normal("x", [4, WIDTH], 1.0).unwrap();
    let under = |layer: &Linear, x: &Tensor| {
        checkpoint(layer, [x], &ctx, |layer: &Linear, [x], ctx| layer.forward(x, ctx)?.gelu()).unwrap()
    };
    let plain = |layer: &Linear, x: &Tensor| layer.forward(x, &ctx).unwrap().gelu().unwrap();
    for trained in [true, false] {
        layer.set_trainable(trained);
        for x in [x.clone(), x.track()] {
            let (y, want) = (under(&layer, &x), plain(&layer, &x));
            assert_eq!((bits(&y), y.is_tracked()), (bits(&want), trained || x.is_tracked()));
            if !y.is_tracked() {
                continue;
            }
            let [got, want] = [y, want].map(|y| y.powf(2.0).unwrap().sum_all().unwrap().backward().unwrap());
            assert_eq!(got.len(), want.len());
            assert_eq!(all_bits(&layer, &got), all_bits(&layer, &want));
            assert_eq!(got.of(&x).ok().map(bits), want.of(&x).ok().map(bits));
        }
    }
}

/// A part of a module that this checkpoint has no use for may belong to another, or be a mistake that
/// the optimiser reports: it gets no gradient here.
#[test]
fn what_the_output_does_not_depend_on_gets_none() {
    let (init, ctx) = (init(), Context::train(0, 0));
    let layers = ["a", "b"].map(|n| Linear::init(&init.at(n), WIDTH, WIDTH, true).unwrap()).to_vec();
    let x = init.normal("x", [4, WIDTH], 1.0).unwrap();
    let (used, unused) = (x.track(), x.track());
    let y = checkpoint(&layers, [&unused, &used], &ctx, |layers: &Vec<Linear>, [_, x], ctx| {
        layers[1].forward(x, ctx)
    });
    let gradients = y.unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.len(), 3);
    assert!(gradients.of(&used).is_ok() && gradients.of(&unused).is_err());
    assert!(gradients.get(layers[0].weight().leaf()).is_none());
    assert!(gradients.get(layers[1].weight().leaf()).is_some());
}

/// As in ALBERT, whose blocks are one block.
#[test]
fn a_module_used_twice_and_a_tied_weight() {
    let (init, ctx) = (init(), Context::train(0, 0));
    let layer = Linear::init(&init, WIDTH, WIDTH, true).unwrap();
    let x = init.normal("x", [4, WIDTH], 1.0).unwrap();
    // The head reads the layer's weight: an input, since it does not belong to what is under the checkpoint.
    let head = Linear::init(&init.at("head"), WIDTH, WIDTH, true).unwrap();
    let run = |checkpointed: bool| {
        let once = |x: &Tensor| match checkpointed {
            true => checkpoint(&layer, [x], &ctx, |layer: &Linear, [x], ctx| layer.forward(x, ctx)?.gelu()),
            false => layer.forward(x, &ctx)?.gelu(),
        };
        let hidden = once(&once(&x).unwrap()).unwrap();
        let tied = layer.weight().tensor(&ctx);
        let tail = |head: &Linear, [x, w]: &[Tensor; 2], ctx: &Context| head.forward(x, ctx)?.linear(w, None);
        let y = match checkpointed {
            true => checkpoint(&head, [&hidden, &tied], &ctx, tail),
            false => tail(&head, &[hidden, tied], &ctx),
        };
        let gradients = y.unwrap().powf(2.0).unwrap().sum_all().unwrap().backward().unwrap();
        (gradients.len(), all_bits(&layer, &gradients), all_bits(&head, &gradients))
    };
    assert!(run(true) == run(false) && run(true).0 == 4);
}

#[test]
fn checkpoints_within_checkpoints() {
    let (init, ctx) = (init(), Context::train(5, 0));
    let model = blocks(&init, 4);
    let x = init.normal("x", [2, 4, WIDTH], 1.0).unwrap();
    let run = |y: &dyn Fn() -> Result<Tensor>| {
        let y = y().unwrap();
        let gradients = y.powf(2.0).unwrap().sum_all().unwrap().backward().unwrap();
        (bits(&y), all_bits(&model, &gradients))
    };
    let plain = run(&|| chain(&model, &x, &ctx));
    let nested =
        |ctx: Context| checkpoint(&model, [&x], &ctx, |m: &Vec<EncoderBlock>, [x], ctx| chain(m, x, ctx));
    assert!(run(&|| nested(ctx)) == plain);
    assert!(run(&|| nested(ctx.checkpointed())) == plain);
}

#[test]
fn what_is_not_an_input_is_refused_not_cut() {
    let (init, ctx) = (init(), Context::train(0, 0));
    let [layer, other] = ["a", "b"].map(|n| Linear::init(&init.at(n), WIDTH, WIDTH, true).unwrap());
    let x = init.normal("x", [4, WIDTH], 1.0).unwrap().track();
    let captured = x.scale(2.0).unwrap();
    let hidden = checkpoint(&layer, [&x], &ctx, move |layer: &Linear, [x], ctx| {
        layer.forward(&x.add(&captured)?, ctx)
    });
    let foreign = checkpoint(&layer, [&x], &ctx, move |layer: &Linear, [x], ctx| {
        other.forward(&layer.forward(x, ctx)?, ctx)
    });
    for result in [hidden, foreign] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Vjp { op: "checkpoint", .. }), "{error}");
        assert!(error.to_string().contains("pass it in `x`"), "{error}");
    }
    let error = checkpoint(&layer, [&x], &ctx, |layer: &Linear, [x], ctx| layer.forward(&x.t()?, ctx));
    assert!(matches!(error, Err(Error::Shape { .. })));
    let y = checkpoint(&layer, [&x], &ctx, |layer: &Linear, [x], ctx| layer.forward(x, ctx)).unwrap();
    let y = y.sum_all().unwrap();
    y.backward().unwrap();
    assert!(matches!(y.backward(), Err(Error::GraphUsed { .. })));
}

/// The gradient is that of the forward that was made, whatever the parameters have become since.
#[test]
fn backward_sees_the_values_of_the_forward() {
    let (init, ctx) = (init(), Context::train(2, 0));
    let mut block = EncoderBlock::init(&init, config(NormPlace::Pre)).unwrap();
    let x = init.normal("x", [2, 4, WIDTH], 1.0).unwrap();
    let loss = |block: &EncoderBlock, ctx: Context| {
        block.forward(&x, None, &ctx).unwrap().powf(2.0).unwrap().sum_all().unwrap()
    };
    let (plain, later) = (loss(&block, ctx).backward().unwrap(), loss(&block, ctx.checkpointed()));
    block
        .try_visit_mut(&mut |_, item| match item {
            crate::nn::ItemMut::Parameter(p) => {
                p.elements_mut::<f32>()?.iter_mut().for_each(|w| *w += 1.0);
                Ok(())
            }
            crate::nn::ItemMut::Linear(_) => Ok(()),
        })
        .unwrap();
    assert_eq!(all_bits(&block, &later.backward().unwrap()), all_bits(&block, &plain));
}

/// The bytes that are held between forward and backward, and the most at any time.
fn memory(model: &Vec<EncoderBlock>, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> (usize, usize) {
    let device = x.device();
    device.reset_peaks();
    let before = device.memory().live_bytes;
    let y = f(x).unwrap();
    let held = device.memory().live_bytes - before;
    let gradients = y.backward_from(&y.detach()).unwrap();
    assert!(gradients.len() == model.parameters().len());
    (held, device.memory().peak_bytes - before)
}

#[test]
fn memory_grows_with_what_is_between_blocks() {
    let init = init();
    let x = init.normal("x", [8, 32, WIDTH], 1.0).unwrap();
    let (plain, ctx) = (Context::train(5, 0), Context::train(5, 0).checkpointed());
    let models = [4, 8, 16].map(|count| blocks(&init.at(&count.to_string()), count));
    let boundary = 4 * x.numel();
    let gradients = |blocks: usize| 4 * blocks * models[0][0].parameter_count();

    let with: Vec<_> = models.iter().map(|m| memory(m, &x, |x| chain(m, x, &ctx))).collect();
    let without: Vec<_> = models.iter().map(|m| memory(m, &x, |x| chain(m, x, &plain))).collect();
    // The output of each block, and nothing from within.
    assert_eq!([with[0].0, with[1].0, with[2].0], [4 * boundary, 8 * boundary, 16 * boundary]);
    assert!(without[0].0 > 8 * with[0].0, "{without:?} {with:?}");
    // At most: one more boundary, and the gradients of one more block, for each block more.
    assert!(with[2].1 - with[1].1 <= 8 * boundary + gradients(8), "{with:?}");
    assert!(without[2].1 - without[1].1 > 8 * 8 * boundary, "{without:?}");

    // In √n parts of √n blocks: the parts' outputs, then the blocks' outputs in one part.
    let parts: Vec<Vec<EncoderBlock>> = models[2].chunks(4).map(<[_]>::to_vec).collect();
    let in_parts = |x: &Tensor| {
        parts.iter().enumerate().try_fold(x.clone(), |x, (i, part)| {
            checkpoint(part, [&x], &ctx.enter(i as u64), |m: &Vec<EncoderBlock>, [x], ctx| chain(m, x, ctx))
        })
    };
    let all: Vec<EncoderBlock> = parts.iter().flatten().cloned().collect();
    let nested = memory(&all, &x, in_parts);
    assert_eq!(nested.0, 4 * boundary);
    // 8 outputs fewer; dy of a part and gradients of its blocks more.
    assert!(nested.1 + 6 * boundary < with[2].1, "{nested:?} {with:?}");
}

/// Keys belong to the operation, not to the module.
#[test]
fn a_mask_comes_along() {
    let (init, ctx) = (init(), Context::train(5, 0));
    let block = EncoderBlock::init(&init, config(NormPlace::Post)).unwrap();
    let x = init.normal("x", [2, 4, WIDTH], 1.0).unwrap().track();
    let keys: Arc<[bool]> = (0..8).map(|i| i != 3).collect();
    let run = |keys, ctx: Context| {
        let y = block.forward(&x, keys, &ctx).unwrap();
        let gradients = y.powf(3.0).unwrap().sum_all().unwrap().backward().unwrap();
        (bits(&y), bits(gradients.of(&x).unwrap()))
    };
    assert_eq!(run(Some(&keys), ctx.checkpointed()), run(Some(&keys), ctx));
    assert_ne!(run(Some(&keys), ctx), run(None, ctx));
}
