//! Full fine-tuning: no adapter, every parameter is trained.

use crate::adapters::attach::{LayerInfo, Method};
use crate::error::Result;
use crate::nn::LinearAdapter;

/// Full fine-tuning: what the other methods are measured against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Full;

impl Method for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn adapters(&self, _: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        Ok(None)
    }
}
