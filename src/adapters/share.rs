//! One copy of bases that several adapters of a model have: the same seed and sizes give the same numbers.

use std::any::Any;
use std::sync::Arc;

use crate::adapters::randlora::RandLoraAdapter;
use crate::dtype::DType;
use crate::error::Result;
use crate::nn::LinearAdapter;
use crate::ops::randlora::{Bases, Structure};
use crate::tensor::Tensor;

/// The RandLoRA that this is, if it is one.
fn randlora(adapter: &dyn LinearAdapter) -> Option<&RandLoraAdapter> {
    let any: &dyn Any = adapter;
    any.downcast_ref()
}

/// Lets adapters that are new have the bases of others where they are equal to their own, bit for bit.
pub(super) fn share_bases<'a>(
    new: impl Iterator<Item = &'a mut Box<dyn LinearAdapter>>,
    others: &[&dyn LinearAdapter],
) -> Result<()> {
    // Layers of one adapter share theirs already: what has been compared is kept with what was found.
    let mut known: Vec<(Arc<Bases>, Arc<Bases>)> = Vec::new();
    for adapter in new {
        let any: &mut dyn Any = &mut **adapter;
        let Some(adapter) = any.downcast_mut::<RandLoraAdapter>() else { continue };
        let own = adapter.bases().clone();
        let found = known.iter().find(|(from, _)| Arc::ptr_eq(from, &own)).map(|(_, to)| to.clone());
        let shared = match found {
            Some(shared) => shared,
            None => {
                let equal = equal_to(adapter, others)?.unwrap_or(own.clone());
                known.push((own, equal.clone()));
                equal
            }
        };
        adapter.set_bases(shared);
    }
    Ok(())
}

/// The bases of the first of the others that has equal ones.
fn equal_to(adapter: &RandLoraAdapter, others: &[&dyn LinearAdapter]) -> Result<Option<Arc<Bases>>> {
    let mut unequal: Vec<&Arc<Bases>> = Vec::new();
    for other in others.iter().filter_map(|other| randlora(*other)) {
        let bases = other.bases();
        if unequal.iter().any(|seen| Arc::ptr_eq(seen, bases)) {
            continue;
        }
        // Block bases have a factor too, which follows from what they were drawn for.
        let same_kind = bases.structure() == Structure::Dense
            || other.origin().is_some() && other.origin() == adapter.origin();
        if same_kind && equal(adapter.bases(), bases)? {
            return Ok(Some(bases.clone()));
        }
        unequal.push(bases);
    }
    Ok(None)
}

fn equal(a: &Bases, b: &Bases) -> Result<bool> {
    let alike = (a.structure(), a.pairing()) == (b.structure(), b.pairing());
    Ok(alike && same_bits(a.a(), b.a())? && same_bits(&a.b()?, &b.b()?)?)
}

fn same_bits(a: &Tensor, b: &Tensor) -> Result<bool> {
    if (a.dtype(), a.shape()) != (b.dtype(), b.shape()) {
        return Ok(false);
    }
    if a.dtype() == DType::F64 {
        let (a, b) = (a.to_vec::<f64>()?, b.to_vec::<f64>()?);
        return Ok(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    let (a, b) = (a.to_vec::<f32>()?, b.to_vec::<f32>()?);
    Ok(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()))
}
