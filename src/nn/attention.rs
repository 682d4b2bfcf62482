//! Attention between the places of a sequence.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::nn::{Context, Init, Linear};
use crate::ops::attention::AttentionOptions;
use crate::tensor::Tensor;

/// The sizes and the kind of a [`MultiHeadAttention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// The size of a row.
    pub width: usize,
    /// The parts that queries are cut into.
    pub heads: usize,
    /// The parts that keys and values are cut into: `heads`, or fewer where several heads of queries
    /// share one.
    pub kv_heads: usize,
    /// Whether the query, key and value layers have biases.
    pub bias: bool,
    /// The rate at which probabilities are dropped in training.
    pub dropout: f64,
    /// Whether each place sees only itself and the places before it.
    pub causal: bool,
}

impl AttentionConfig {
    /// Every place sees every other, all heads have their own keys, with biases, without dropout.
    pub fn new(width: usize, heads: usize) -> AttentionConfig {
        AttentionConfig { width, heads, kv_heads: heads, bias: true, dropout: 0.0, causal: false }
    }
}

/// y = concat(headᵢ)·Wᵒ with headᵢ = attention(x·Wᵢq, x·Wᵢk, x·Wᵢv) (Vaswani et al., 2017). See
/// [`Tensor::attention`].
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    config: AttentionConfig,
}
crate::module!(MultiHeadAttention { query, key, value, output });

impl MultiHeadAttention {
    /// New layers `query`, `key`, `value` and `output`.
    ///
    /// # Errors
    /// [`Error::Config`] where the sizes do not divide.
    pub fn init(init: &Init, config: AttentionConfig) -> Result<MultiHeadAttention> {
        MultiHeadAttention::named(init, config, ["query", "key", "value", "output"])
    }

    /// The same with other names for the layers.
    pub(crate) fn named(
        init: &Init,
        config: AttentionConfig,
        names: [&str; 4],
    ) -> Result<MultiHeadAttention> {
        let AttentionConfig { width, heads, kv_heads, bias, .. } = config;
        if heads == 0 || width % heads != 0 || kv_heads == 0 || heads % kv_heads != 0 {
            let message = format!("{kv_heads} must divide {heads} heads, and {heads} the width {width}");
            return Err(Error::config("heads", message));
        }
        let narrow = width / heads * kv_heads;
        let layer = |name: &str, inputs, outputs, bias| Linear::init(&init.at(name), inputs, outputs, bias);
        Ok(MultiHeadAttention {
            query: layer(names[0], width, width, bias)?,
            key: layer(names[1], width, narrow, bias)?,
            value: layer(names[2], width, narrow, bias)?,
            output: layer(names[3], width, width, true)?,
            config,
        })
    }

    /// x (B, T, width) to the same shape. `keys` says for each place of each element of the batch,
    /// (B, T) in order, whether it may be attended to: false for padding.
    pub fn forward(&self, x: &Tensor, keys: Option<&Arc<[bool]>>, ctx: &Context) -> Result<Tensor> {
        self.forward_of(x, x, keys, ctx)
    }

    /// The outputs for `rows` (B, t, width), which attend to all of x (B, T, width). With a causal mask
    /// the last row attends to all, and each before it to one place less.
    pub fn forward_of(
        &self,
        rows: &Tensor,
        x: &Tensor,
        keys: Option<&Arc<[bool]>>,
        ctx: &Context,
    ) -> Result<Tensor> {
        let AttentionConfig { heads, kv_heads, dropout, causal, .. } = self.config;
        let q = split(&self.query.forward(rows, &ctx.enter(0))?, heads)?;
        let k = split(&self.key.forward(x, &ctx.enter(1))?, kv_heads)?;
        let v = split(&self.value.forward(x, &ctx.enter(2))?, kv_heads)?;
        let dropout = ctx.enter(3).dropout_key().filter(|_| dropout != 0.0).map(|key| (dropout, key));
        let options =
            AttentionOptions { causal, keys: keys.cloned(), dropout, ..AttentionOptions::default() };
        self.output.forward(&join(&q.attention(&k, &v, &options)?)?, &ctx.enter(4))
    }
}

/// (B, T, heads·d) to (B, heads, T, d): a view.
fn split(x: &Tensor, heads: usize) -> Result<Tensor> {
    let &[b, t, width] = x.dims() else {
        return Err(Error::shape("attention", format!("{} is not (batch, places, width)", x.shape())));
    };
    x.reshape([b, t, heads, width / heads])?.transpose(1, 2)
}

/// (B, heads, T, d) to (B, T, heads·d).
fn join(x: &Tensor) -> Result<Tensor> {
    let x = x.transpose(1, 2)?;
    let outer = [x.dims()[0], x.dims()[1]];
    x.reshape([outer[0], outer[1], x.dims()[2] * x.dims()[3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::dtype::DType;
    use crate::gradcheck;
    use crate::nn::Module;

    fn attention(config: AttentionConfig) -> (MultiHeadAttention, Tensor) {
        let init = Init::seeded(4, &Device::cpu());
        let mut attention = MultiHeadAttention::init(&init, config).unwrap();
        attention.cast(DType::F64).unwrap();
        (attention, init.normal("x", [2, 5, config.width], 1.0).unwrap().to_dtype(DType::F64).unwrap())
    }

    #[test]
    fn gradients() {
        let plain = AttentionConfig::new(8, 4);
        let keys: Arc<[bool]> = (0..10).map(|i| i % 5 < 3).collect();
        for config in [plain, AttentionConfig { causal: true, kv_heads: 2, bias: false, ..plain }] {
            let (mut model, x) = attention(config);
            for keys in [None, Some(&keys)] {
                gradcheck::model(&mut model, |m, ctx| m.forward(&x, keys, ctx)).unwrap();
            }
        }
        let (mut model, x) = attention(AttentionConfig { dropout: 0.3, ..plain });
        gradcheck::model(&mut model, |m, _| m.forward(&x, None, &Context::train(1, 2))).unwrap();
    }

    #[test]
    fn a_place_sees_what_it_may() {
        let config = AttentionConfig { causal: true, ..AttentionConfig::new(8, 2) };
        let (attention, x) = attention(config);
        let run = |x: &Tensor, keys| attention.forward(x, keys, &Context::eval()).unwrap();
        let rows = |y: &Tensor, range| y.slice(1, range).unwrap().to_vec::<f64>().unwrap();
        // Neither a later place nor a padded one changes the first three.
        let other = Tensor::concat(&[&x.slice(1, 0..3).unwrap(), &x.slice(1, 0..2).unwrap()], 1).unwrap();
        assert_eq!(rows(&run(&x, None), 0..3), rows(&run(&other, None), 0..3));
        assert_ne!(rows(&run(&x, None), 3..5), rows(&run(&other, None), 3..5));
        let keys: Arc<[bool]> = vec![true; 10].into();
        assert_eq!(rows(&run(&x, Some(&keys)), 0..5), rows(&run(&x, None), 0..5));
    }

    #[test]
    fn sizes_that_do_not_divide() {
        let init = Init::blank(&Device::cpu());
        let plain = AttentionConfig::new(8, 4);
        for (width, heads, kv_heads) in [(8, 3, 3), (8, 0, 0), (8, 4, 3), (8, 4, 0)] {
            let config = AttentionConfig { width, heads, kv_heads, ..plain };
            assert!(matches!(MultiHeadAttention::init(&init, config), Err(Error::Config { .. })));
        }
        let (attention, x) = attention(plain);
        assert!(attention.forward(&x.select(0, 0).unwrap(), None, &Context::eval()).is_err());
        assert!(attention.forward(&x.slice(2, 0..7).unwrap(), None, &Context::eval()).is_err());
        let nobody = x.slice(0, 0..0).unwrap();
        assert_eq!(attention.forward(&nobody, None, &Context::eval()).unwrap().dims(), [0, 5, 8]);
    }
}
