//! What a model's bases follow from.

use crate::adapters::bases::BasesSpec;
use crate::adapters::torch::TorchBases;
use crate::device::Device;
use crate::error::Result;
use crate::ops::randlora::Bases;

/// What bases follow from: enough to make them again instead of storing them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum BasesOrigin {
    /// This crate's own, fixed by its format.
    Spec(BasesSpec),
    /// Hugging Face PEFT's, drawn by torch.
    Torch(TorchBases),
}

impl BasesOrigin {
    /// Makes the bases, in f32.
    ///
    /// # Errors
    /// Those of [`BasesSpec::generate`] and [`TorchBases::generate`].
    pub fn generate(&self, device: &Device) -> Result<Bases> {
        match self {
            BasesOrigin::Spec(spec) => spec.generate(device),
            BasesOrigin::Torch(spec) => spec.generate(device),
        }
    }
}
