//! What trains the model's own parameters: all of them, or its biases.

use crate::adapters::attach::{LayerInfo, Method};
use crate::error::Result;
use crate::nn::LinearAdapter;

/// Full fine-tuning: no adapter, every parameter is trained. What the other methods are measured
/// against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Full;

impl Method for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn adapters(&self, _: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        Ok(None)
    }

    fn trains(&self, _: &str) -> bool {
        true
    }
}

/// BitFit (Ben Zaken et al., ACL 2022): y = x·W0ᵀ + b with b trained, and so every other bias of the
/// model, those of its normalisations among them.
///
/// A bias is a parameter called `bias`. There is no adapter, so it costs nothing in use; which layers
/// are named as targets makes no difference.
///
/// ```
/// use randlora::adapters::{BitFit, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &BitFit, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 30);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitFit;

impl Method for BitFit {
    fn name(&self) -> &'static str {
        "bitfit"
    }

    fn adapters(&self, _: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        Ok(None)
    }

    fn trains(&self, parameter: &str) -> bool {
        parameter.rsplit('.').next() == Some("bias")
    }
}
