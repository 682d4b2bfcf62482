//! Normalisation of rows, with learned scales.

use crate::error::Result;
use crate::nn::{Context, Init, Parameter};
use crate::tensor::Tensor;

/// Each row shifted to mean 0 and scaled to variance 1, then scaled and shifted by learned numbers
/// (Ba, Kiros and Hinton, 2016). See [`Tensor::layer_norm`].
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Parameter,
    bias: Option<Parameter>,
    eps: f64,
}
crate::module!(LayerNorm { weight, bias });

impl LayerNorm {
    /// A norm over rows of `width` that changes their scale by nothing yet. `eps` is added to the
    /// variance.
    pub fn init(init: &Init, width: usize, eps: f64) -> Result<LayerNorm> {
        let weight = Parameter::new(init.constant([width], 1.0)?);
        Ok(LayerNorm { weight, bias: Some(Parameter::new(init.constant([width], 0.0)?)), eps })
    }

    /// x (…, width), normalised.
    pub fn forward(&self, x: &Tensor, ctx: &Context) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|b| b.tensor(ctx));
        x.layer_norm(Some(&self.weight.tensor(ctx)), bias.as_ref(), self.eps)
    }
}

/// Each row scaled to a root mean square of 1, then by learned numbers (Zhang and Sennrich, 2019).
/// See [`Tensor::rms_norm`].
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Parameter,
    eps: f64,
}
crate::module!(RmsNorm { weight });

impl RmsNorm {
    /// A norm over rows of `width` that changes their scale by nothing yet. `eps` is added to the
    /// mean square.
    pub fn init(init: &Init, width: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: Parameter::new(init.constant([width], 1.0)?), eps })
    }

    /// x (…, width), normalised.
    pub fn forward(&self, x: &Tensor, ctx: &Context) -> Result<Tensor> {
        x.rms_norm(Some(&self.weight.tensor(ctx)), self.eps)
    }
}
