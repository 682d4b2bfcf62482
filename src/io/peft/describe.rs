//! What PEFT's files say of a model's adapters.

use std::any::Any;

use crate::adapters::{AdaLoraAdapter, DoraAdapter, LoraAdapter, PissaAdapter, RandLoraAdapter, VeraAdapter};
use crate::error::{Error, Result};
use crate::io::peft::PeftConfig;
use crate::io::peft::kind::Kind;
use crate::io::peft::shared::Shared;
use crate::nn::{Linear, LinearAdapter};
use crate::tensor::Tensor;

/// What PEFT's files say of one layer's adapter; None for one that PEFT does not have.
fn of(name: &str, adapter: &dyn LinearAdapter) -> Option<(PeftConfig, Option<Shared>)> {
    let any: &dyn Any = adapter;
    if let Some(a) = any.downcast_ref::<RandLoraAdapter>() {
        let config = PeftConfig::new(Kind::RandLora(None), a.bases().rank(), a.scale(), a.dropout());
        return Some((config, Some(Shared::RandLora(a.bases().clone(), a.origin()))));
    }
    if let Some(a) = any.downcast_ref::<LoraAdapter>() {
        return Some((PeftConfig::new(Kind::Lora, a.rank(), a.scale(), a.dropout()), None));
    }
    if let Some(a) = any.downcast_ref::<DoraAdapter>() {
        let settings = a.settings();
        let config = PeftConfig::new(Kind::Dora, settings.rank, settings.scale, settings.dropout);
        // PEFT takes the lengths of the rows for constant.
        return (!settings.through_norm).then_some((config, None));
    }
    if let Some(a) = any.downcast_ref::<PissaAdapter>() {
        let settings = a.settings();
        return Some((PeftConfig::new(Kind::Pissa, settings.rank, settings.scale, settings.dropout), None));
    }
    if let Some(a) = any.downcast_ref::<VeraAdapter>() {
        let settings = a.settings();
        let kind = Kind::Vera { d_initial: settings.d_initial, key: 0 };
        let config = PeftConfig::new(kind, settings.rank, 1.0, settings.dropout);
        return Some((config, Some(Shared::Vera(a.shared().clone()))));
    }
    if let Some(a) = any.downcast_ref::<AdaLoraAdapter>() {
        let settings = *a.settings();
        let kind = Kind::AdaLora(settings);
        let mut config = PeftConfig::new(kind, settings.first_rank, settings.scale, settings.dropout);
        config.kept.extend(a.kept().map(|kept| (name.to_string(), kept.to_vec())));
        // PEFT has no other scale.
        return (settings.scale > 0.0).then_some((config, None));
    }
    None
}

/// Whether PEFT has a form for an adapter.
pub(in crate::io) fn has_form(adapter: &dyn LinearAdapter) -> bool {
    of("", adapter).is_some()
}

/// The tensors of a layer's adapter that are stored, in the order of its form.
pub(super) fn values(adapter: &dyn LinearAdapter) -> Result<Vec<Tensor>> {
    let any: &dyn Any = adapter;
    match any.downcast_ref::<AdaLoraAdapter>() {
        Some(adapter) => Ok(adapter.left()?.to_vec()),
        None => {
            Ok(adapter.parameters().into_iter().map(|(_, parameter)| parameter.value().clone()).collect())
        }
    }
}

/// The settings, and the tensors that all adapters share.
///
/// # Errors
/// [`Error::Config`] for adapters that one of PEFT's files does not hold.
pub(super) fn describe(layers: &[(String, &Linear)]) -> Result<(PeftConfig, Option<Shared>)> {
    let mut common: Option<(PeftConfig, Option<Shared>)> = None;
    for (name, layer) in layers {
        let Some(adapter) = layer.adapter() else { continue };
        let Some((this, shared)) = of(name, adapter) else {
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
        config.kept.extend(this.kept);
        if own != (config.rank, config.scale) {
            config.layers.insert(name.clone(), own);
        }
    }
    common.ok_or_else(|| Error::config("adapter", "the model has none to save"))
}
