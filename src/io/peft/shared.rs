//! The tensors that all layers share, as PEFT's file has them.

use std::sync::Arc;

use crate::adapters::BasesOrigin;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::randlora::{Bases, Pairing, Structure};
use crate::tensor::Tensor;

/// What all adapted layers of a model share.
pub(super) enum Shared {
    /// RandLoRA's bases, and what they follow from.
    RandLora(Arc<Bases>, Option<BasesOrigin>),
    /// VeRA's A and B.
    Vera(Arc<[Tensor; 2]>),
}

impl Shared {
    /// Whether two layers share the very same.
    pub(super) fn same(first: Option<&Shared>, second: Option<&Shared>) -> bool {
        match (first, second) {
            (Some(Shared::RandLora(a, _)), Some(Shared::RandLora(b, _))) => Arc::ptr_eq(a, b),
            (Some(Shared::Vera(a)), Some(Shared::Vera(b))) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        }
    }

    /// The two tensors at the sizes that PEFT makes them for layers of these inputs and outputs, in f32.
    ///
    /// # Errors
    /// [`Error::Config`] for bases that PEFT cannot express.
    pub(super) fn stored(&self, sizes: &[[usize; 2]]) -> Result<[Tensor; 2]> {
        match self {
            Shared::RandLora(bases, _) => stored_bases(bases, sizes),
            Shared::Vera(matrices) => {
                let [a, b] = &**matrices;
                let largest = |side: usize| sizes.iter().map(|sizes| sizes[side]).max().unwrap_or(0);
                let cut = |x: &Tensor, dim, size| x.slice(dim, 0..size)?.to_dtype(DType::F32);
                Ok([cut(a, 1, largest(0))?, cut(b, 0, largest(1))?])
            }
        }
    }
}

/// A (r, 1, MIN) and B (MAX, ⌈MIN/r⌉, r) at the sizes that PEFT makes them, block bases with their zeros;
/// what the bases lack no layer reads, and it is 0.
fn stored_bases(bases: &Bases, sizes: &[[usize; 2]]) -> Result<[Tensor; 2]> {
    if (bases.structure(), bases.pairing()) == (Structure::Dense, Pairing::Paper) {
        let message = "PEFT pairs the bases in its own way: attach with `pairing: Pairing::Peft`";
        return Err(Error::config("pairing", message));
    }
    let largest = |side: usize| sizes.iter().map(|sizes| sizes[side]).max().unwrap_or(0);
    let (inputs, outputs) = (largest(0), largest(1));
    let (small, large, rank) = (inputs.min(outputs), inputs.max(outputs), bases.rank());
    let mut counts = sizes.iter().map(|[inputs, outputs]| inputs.min(outputs).div_ceil(rank));
    let n = counts.next().unwrap_or(0);
    if bases.structure() == Structure::Block && counts.any(|other| other != n) {
        let message = "PEFT's file has one B, but which row of block bases is whose follows from a layer's smaller \
                       side, and these layers have several: use dense bases";
        return Err(Error::config("bases", message));
    }
    let fit = |x: &Tensor, dim: usize, size: usize| {
        let x = x.slice(dim, 0..size.min(x.dims()[dim]))?;
        pad(&x, dim, size)
    };
    let bases = bases.dense(n)?;
    let (a, b) = (bases.a().to_dtype(DType::F32)?, bases.b()?.to_dtype(DType::F32)?);
    let b = fit(&fit(&b, 0, large)?, 1, small.div_ceil(rank))?;
    Ok([fit(&a, 1, small)?.unsqueeze(1)?, b])
}

/// Zeros after a dimension until it has this size.
fn pad(x: &Tensor, dim: usize, size: usize) -> Result<Tensor> {
    let missing = x.shape().with_dim(dim, size - x.dims()[dim])?;
    Tensor::concat(&[x, &Tensor::zeros(missing, x.dtype(), x.device())?], dim)
}
