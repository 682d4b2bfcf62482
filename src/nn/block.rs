//! The blocks that transformers are made of.

use std::sync::Arc;

use crate::error::Result;
use crate::nn::{
    AttentionConfig, Context, Init, Item, ItemMut, LayerNorm, Linear, Module, MultiHeadAttention, checkpoint,
    join,
};
use crate::tensor::Tensor;

/// A function of each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// See [`Tensor::relu`].
    Relu,
    /// See [`Tensor::gelu`].
    Gelu,
    /// See [`Tensor::gelu_tanh`].
    GeluTanh,
    /// See [`Tensor::silu`].
    Silu,
    /// See [`Tensor::tanh`].
    Tanh,
}

impl Activation {
    /// The activation that transformers' configurations (`hidden_act`) call by this name; None for a
    /// name that stands for no activation here.
    pub fn by_name(name: &str) -> Option<Activation> {
        match name {
            "relu" => Some(Activation::Relu),
            "gelu" | "gelu_python" => Some(Activation::Gelu),
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Some(Activation::GeluTanh),
            "silu" | "swish" => Some(Activation::Silu),
            "tanh" => Some(Activation::Tanh),
            _ => None,
        }
    }

    /// The function of every element of x.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activation::Relu => x.relu(),
            Activation::Gelu => x.gelu(),
            Activation::GeluTanh => x.gelu_tanh(),
            Activation::Silu => x.silu(),
            Activation::Tanh => x.tanh(),
        }
    }
}

/// Two linear layers with an activation between them.
#[derive(Clone, Debug)]
pub struct Mlp {
    up: Linear,
    activation: Activation,
    down: Linear,
}
crate::module!(Mlp { up, down });

impl Mlp {
    /// New layers `up` (hidden, width) and `down` (width, hidden).
    pub fn init(init: &Init, width: usize, hidden: usize, activation: Activation) -> Result<Mlp> {
        Mlp::named(init, width, hidden, activation, ["up", "down"])
    }

    fn named(
        init: &Init,
        width: usize,
        hidden: usize,
        activation: Activation,
        names: [&str; 2],
    ) -> Result<Mlp> {
        let up = Linear::init(&init.at(names[0]), width, hidden, true)?;
        Ok(Mlp { up, activation, down: Linear::init(&init.at(names[1]), hidden, width, true)? })
    }

    /// x (…, width) to the same shape.
    pub fn forward(&self, x: &Tensor, ctx: &Context) -> Result<Tensor> {
        let hidden = self.activation.forward(&self.up.forward(x, &ctx.enter(0))?)?;
        self.down.forward(&hidden, &ctx.enter(1))
    }
}

/// What the parts of a block are called, relative to the block: model families name the same parts
/// differently, and a model has the names of its checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockNames {
    /// The attention's query layer.
    pub query: &'static str,
    /// The attention's key layer.
    pub key: &'static str,
    /// The attention's value layer.
    pub value: &'static str,
    /// The attention's output layer.
    pub output: &'static str,
    /// The norm that belongs to the attention.
    pub norm1: &'static str,
    /// The first layer of the MLP.
    pub up: &'static str,
    /// The second layer of the MLP.
    pub down: &'static str,
    /// The norm that belongs to the MLP.
    pub norm2: &'static str,
}

impl Default for BlockNames {
    fn default() -> BlockNames {
        BlockNames {
            query: "attention.query",
            key: "attention.key",
            value: "attention.value",
            output: "attention.output",
            norm1: "norm1",
            up: "mlp.up",
            down: "mlp.down",
            norm2: "norm2",
        }
    }
}

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlace {
    /// x ← x + f(norm(x)), as in vision transformers and GPT-2.
    Pre,
    /// x ← norm(x + f(x)), as in the first transformer and in BERT.
    Post,
}

/// The sizes and the kind of an [`EncoderBlock`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockConfig {
    /// The attention, and the size of a row.
    pub attention: AttentionConfig,
    /// The size of a row between the two layers of the MLP.
    pub hidden: usize,
    /// What comes between them.
    pub activation: Activation,
    /// Where the block normalises.
    pub norm: NormPlace,
    /// What the norms add to the variance.
    pub eps: f64,
    /// The rate at which the outputs of the attention and the MLP are dropped in training.
    pub dropout: f64,
    /// What the parts are called.
    pub names: BlockNames,
}

/// Attention and an MLP, each with a norm and a way around it.
#[derive(Clone, Debug)]
pub struct EncoderBlock {
    attention: MultiHeadAttention,
    norm1: LayerNorm,
    mlp: Mlp,
    norm2: LayerNorm,
    config: BlockConfig,
}

impl EncoderBlock {
    /// A new block.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) where the attention's sizes do not divide.
    pub fn init(init: &Init, config: BlockConfig) -> Result<EncoderBlock> {
        let BlockConfig { attention, hidden, activation, eps, names: n, .. } = config;
        let names = [n.query, n.key, n.value, n.output];
        Ok(EncoderBlock {
            attention: MultiHeadAttention::named(init, attention, names)?,
            norm1: LayerNorm::init(&init.at(n.norm1), attention.width, eps)?,
            mlp: Mlp::named(init, attention.width, hidden, activation, [n.up, n.down])?,
            norm2: LayerNorm::init(&init.at(n.norm2), attention.width, eps)?,
            config,
        })
    }

    /// x (B, T, width) to the same shape; `keys` as in [`MultiHeadAttention::forward`]. Under a
    /// [`checkpoint`] where the context asks for it.
    pub fn forward(&self, x: &Tensor, keys: Option<&Arc<[bool]>>, ctx: &Context) -> Result<Tensor> {
        if !ctx.checkpoints() {
            return self.forward_of(x, x, keys, ctx);
        }
        let keys = keys.cloned();
        checkpoint(self, [x], ctx, move |block: &EncoderBlock, [x], ctx| {
            block.forward_of(x, x, keys.as_ref(), ctx)
        })
    }

    /// The block's output for `rows` (B, t, width) of x alone, which attend to all of x: all that the
    /// last block has to do where a model reads one place of it. Never under a checkpoint: backward
    /// begins with what the last block has saved, and would gain nothing where it is made again at once.
    pub fn forward_of(
        &self,
        rows: &Tensor,
        x: &Tensor,
        keys: Option<&Arc<[bool]>>,
        ctx: &Context,
    ) -> Result<Tensor> {
        let p = self.config.dropout;
        let attention = |rows: &Tensor, x: &Tensor| {
            ctx.enter(1).dropout(&self.attention.forward_of(rows, x, keys, &ctx.enter(0))?, p)
        };
        let mlp = |x: &Tensor| ctx.enter(3).dropout(&self.mlp.forward(x, &ctx.enter(2))?, p);
        match self.config.norm {
            NormPlace::Pre => {
                let of_x = self.norm1.forward(x, ctx)?;
                let of_rows =
                    if std::ptr::eq(rows, x) { of_x.clone() } else { self.norm1.forward(rows, ctx)? };
                let x = rows.add(&attention(&of_rows, &of_x)?)?;
                x.add(&mlp(&self.norm2.forward(&x, ctx)?)?)
            }
            NormPlace::Post => {
                let x = self.norm1.forward(&rows.add(&attention(rows, x)?)?, ctx)?;
                self.norm2.forward(&x.add(&mlp(&x)?)?, ctx)
            }
        }
    }
}

impl Module for EncoderBlock {
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        let (names, attention) = (&self.config.names, &self.attention);
        attention.query.visit(&join(path, names.query), f);
        attention.key.visit(&join(path, names.key), f);
        attention.value.visit(&join(path, names.value), f);
        attention.output.visit(&join(path, names.output), f);
        self.norm1.visit(&join(path, names.norm1), f);
        self.mlp.up.visit(&join(path, names.up), f);
        self.mlp.down.visit(&join(path, names.down), f);
        self.norm2.visit(&join(path, names.norm2), f);
    }

    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        let (names, attention) = (&self.config.names, &mut self.attention);
        attention.query.visit_mut(&join(path, names.query), f);
        attention.key.visit_mut(&join(path, names.key), f);
        attention.value.visit_mut(&join(path, names.value), f);
        attention.output.visit_mut(&join(path, names.output), f);
        self.norm1.visit_mut(&join(path, names.norm1), f);
        self.mlp.up.visit_mut(&join(path, names.up), f);
        self.mlp.down.visit_mut(&join(path, names.down), f);
        self.norm2.visit_mut(&join(path, names.norm2), f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::dtype::DType;
    use crate::gradcheck;

    fn config(norm: NormPlace) -> BlockConfig {
        let attention = AttentionConfig { dropout: 0.2, ..AttentionConfig::new(6, 2) };
        let names = BlockNames { norm1: "attention.output.norm", ..BlockNames::default() };
        BlockConfig {
            attention,
            hidden: 10,
            activation: Activation::Gelu,
            norm,
            eps: 1e-5,
            dropout: 0.1,
            names,
        }
    }

    #[test]
    fn activations_by_name() {
        let x = Tensor::from_vec(vec![1.0], [1], &Device::cpu()).unwrap();
        let at_one = |name| Activation::by_name(name).map(|a| a.forward(&x).unwrap().item().unwrap());
        // Φ(1) and 1/(1 + 1/e); the form by tanh differs from Φ in the fourth digit.
        let close = |name, want: f64| at_one(name).is_some_and(|y| (y - want).abs() < 1e-6);
        assert!(["gelu", "gelu_python"].into_iter().all(|name| close(name, 0.8413447)));
        assert!(["gelu_new", "gelu_fast", "gelu_pytorch_tanh"].into_iter().all(|n| close(n, 0.8411920)));
        assert!(["silu", "swish"].into_iter().all(|name| close(name, 0.7310586)));
        assert!(close("tanh", 0.7615942) && close("relu", 1.0));
        assert_eq!((at_one("quick_gelu"), at_one("GELU"), at_one("")), (None, None, None));
    }

    #[test]
    fn gradients_with_and_without_dropout() {
        let init = Init::seeded(6, &Device::cpu());
        let x = init.normal("x", [2, 4, 6], 1.0).unwrap().to_dtype(DType::F64).unwrap();
        for norm in [NormPlace::Pre, NormPlace::Post] {
            let mut block = EncoderBlock::init(&init, config(norm)).unwrap();
            block.cast(DType::F64).unwrap();
            gradcheck::model(&mut block, |m, ctx| m.forward(&x, None, ctx)).unwrap();
            gradcheck::model(&mut block, |m, _| m.forward(&x, None, &Context::train(3, 1))).unwrap();
        }
    }

    #[test]
    fn masks_are_repeated_and_differ() {
        let init = Init::seeded(6, &Device::cpu());
        let x = init.normal("x", [2, 4, 6], 1.0).unwrap();
        let block = EncoderBlock::init(&init, config(NormPlace::Pre)).unwrap();
        let run = |ctx: &Context| block.forward(&x, None, ctx).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(run(&Context::train(3, 1)), run(&Context::train(3, 1)));
        assert_ne!(run(&Context::train(3, 1)), run(&Context::train(3, 2)));
        assert_ne!(run(&Context::train(3, 1)), run(&Context::train(3, 1).enter(0)));
        assert_eq!(run(&Context::eval()), run(&Context::eval().tracked()));
    }

    #[test]
    fn parts_have_the_names_that_they_are_given() {
        let init = Init::seeded(6, &Device::cpu());
        let block = EncoderBlock::init(&init.at("a"), config(NormPlace::Post)).unwrap();
        let names: Vec<String> = block.parameters().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names[..2], ["attention.query.weight", "attention.query.bias"]);
        assert_eq!(names[8..10], ["attention.output.norm.weight", "attention.output.norm.bias"]);
        assert_eq!((names.len(), names[15].as_str()), (16, "norm2.bias"));
        // Each value is the one that belongs to the parameter's name.
        for (name, linear) in block.linears() {
            let std = 1.0 / (linear.inputs() as f64).sqrt();
            let own = init.at("a").at(&name).normal("weight", linear.weight().value().shape(), std).unwrap();
            assert_eq!(
                own.to_vec::<f32>().unwrap(),
                linear.weight().value().to_vec::<f32>().unwrap(),
                "{name}"
            );
        }
    }

    #[test]
    fn visits_agree() {
        let mut block = EncoderBlock::init(&Init::blank(&Device::cpu()), config(NormPlace::Pre)).unwrap();
        let names: Vec<String> = block.parameters().into_iter().map(|(name, _)| name).collect();
        let mut seen = Vec::new();
        block.visit_mut("", &mut |name, item| {
            if let ItemMut::Parameter(_) = item {
                seen.push(name.to_string());
            }
        });
        assert_eq!(seen, names);
    }
}
