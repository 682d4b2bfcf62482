//! What PEFT's files say of a model's adapters.

use std::any::Any;

use crate::adapters::{LoraAdapter, RandLoraAdapter};
use crate::error::{Error, Result};
use crate::io::peft::PeftConfig;
use crate::io::peft::kind::Kind;
use crate::io::peft::shared::Shared;
use crate::nn::{Linear, LinearAdapter};

/// What PEFT's files say of one layer's adapter; None for one that PEFT does not have.
pub(super) fn of(adapter: &dyn LinearAdapter) -> Option<(PeftConfig, Option<Shared>)> {
    let any: &dyn Any = adapter;
    if let Some(a) = any.downcast_ref::<RandLoraAdapter>() {
        let config = PeftConfig::new(Kind::RandLora(None), a.bases().rank(), a.scale(), a.dropout());
        return Some((config, Some(Shared::RandLora(a.bases().clone(), a.origin()))));
    }
    if let Some(a) = any.downcast_ref::<LoraAdapter>() {
        return Some((PeftConfig::new(Kind::Lora, a.rank(), a.scale(), a.dropout()), None));
    }
    None
}

/// The settings, and the tensors that all adapters share.
///
/// # Errors
/// [`Error::Config`] for adapters that one of PEFT's files does not hold.
pub(super) fn describe(layers: &[(String, &Linear)]) -> Result<(PeftConfig, Option<Shared>)> {
    let mut common: Option<(PeftConfig, Option<Shared>)> = None;
    for (name, layer) in layers {
        let Some(adapter) = layer.adapter() else { continue };
        let Some((this, shared)) = of(adapter) else {
            let message = format!("`{name}` has one of {}, which has no form in PEFT here", adapter.method());
            return Err(Error::config("adapter", message));
        };
        let Some((config, first)) = &mut common else {
            common = Some((this, shared));
            continue;
        };
        let own = (this.rank, this.scale);
        let same_settings = own == (config.rank, config.scale) || config.form().patterns;
        if !(same_settings
            && config.kind == this.kind
            && config.dropout == this.dropout
            && Shared::same(first.as_ref(), shared.as_ref()))
        {
            let message =
                format!("`{name}` has other settings than the layers before it: PEFT's file holds one set");
            return Err(Error::config("adapter", message));
        }
        if own != (config.rank, config.scale) {
            config.layers.insert(name.clone(), own);
        }
    }
    common.ok_or_else(|| Error::config("adapter", "the model has none to save"))
}
