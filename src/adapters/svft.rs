//! SVFT (Lingam et al., NeurIPS 2024): ΔW = U·M·Vᵀ with the singular vectors of the weight, frozen, and a
//! sparse M between them that is trained.
//!
//! With W0 = U·Σ·Vᵀ, k = min(in, out) singular values, U (out×k) and V (in×k), M (k×k) has trained
//! numbers on 2w + 1 diagonals, −w to w: w = 0 changes the singular values alone ("plain" in the paper),
//! w > 0 lets near ones mix ("banded"). M starts at 0, so that ΔW = 0. There is no scale.
//!
//! What the adapter holds beside M is U and V, in all k·(in + out) numbers: for a square layer twice the
//! weight. M itself is never formed: with z = x·V, diagonal o gives zⱼ₊ₒ·mₒⱼ.

use crate::adapters::attach::{LayerInfo, Method, each};
use crate::adapters::recipe::recipe;
use crate::error::{Error, Result};
use crate::linalg::svd;
use crate::nn::{Context, LinearAdapter, Parameter, Recipe};
use crate::tensor::Tensor;

/// SVFT's settings.
///
/// ```
/// use randlora::adapters::{Svft, Targets, attach};
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::Device;
///
/// let mut layer = Linear::init(&Init::seeded(0, &Device::cpu()), 20, 30, true)?;
/// attach(&mut layer, &Svft { band: 1 }, &Targets::AllLinear, &[])?;
/// assert_eq!(layer.trainable_count(), 20 + 2 * 19);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Svft {
    /// w: how many diagonals are trained on each side of the main one. 0 by default.
    pub band: usize,
}

impl Method for Svft {
    fn name(&self) -> &'static str {
        "svft"
    }

    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
        each(layers, |layer| SvftAdapter::new(self, layer))
    }
}

/// One layer's diagonals, and the singular vectors around them.
#[derive(Clone, Debug)]
pub struct SvftAdapter {
    /// The diagonals one after the other: 0, 1, −1, 2, −2 …
    m: Parameter,
    /// U (out, k).
    u: Tensor,
    /// Vᵀ (k, in).
    v: Tensor,
    settings: Svft,
}

impl SvftAdapter {
    /// The adapter of a layer at its start.
    ///
    /// # Errors
    /// [`Error::Config`] for a band that is wider than M.
    pub fn new(settings: &Svft, layer: &LayerInfo) -> Result<SvftAdapter> {
        let (k, band) = (layer.small(), settings.band);
        if band >= k.max(1) {
            let message =
                format!("{band} diagonals beside the main one do not fit the {k}×{k} of `{}`", layer.name);
            return Err(Error::config("band", message));
        }
        let parts = svd(&layer.weight)?;
        let count = diagonals(k, band).map(|(_, _, len)| len).sum::<usize>();
        Ok(SvftAdapter {
            m: Parameter::new(Tensor::zeros([count], layer.dtype, &layer.device)?),
            u: parts.u.to_dtype(layer.dtype)?.contiguous()?,
            v: parts.v.t()?.to_dtype(layer.dtype)?.contiguous()?,
            settings: *settings,
        })
    }

    /// M·z for the z (…, k) of every token.
    fn mixed(&self, z: &Tensor, m: &Tensor) -> Result<Tensor> {
        let (last, k) = (z.rank() - 1, self.u.dims()[1]);
        let mut from = 0;
        let mut sum: Option<Tensor> = None;
        for (row, column, len) in diagonals(k, self.settings.band) {
            let part = z.slice(last, column..column + len)?.mul(&m.slice(0, from..from + len)?)?;
            from += len;
            let zeros = |size| Tensor::zeros(z.shape().with_dim(last, size)?, z.dtype(), z.device());
            let part = match len == k {
                true => part,
                false => Tensor::concat(&[&zeros(row)?, &part, &zeros(k - len - row)?], last)?,
            };
            sum = Some(match sum {
                Some(sum) => sum.add(&part)?,
                None => part,
            });
        }
        Ok(sum.unwrap_or_else(|| z.clone()))
    }
}

/// The first row, the first column and the length of each diagonal of a k×k matrix within the band.
fn diagonals(k: usize, band: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let beside = (1..=band).flat_map(move |o| [(0, o, k - o), (o, 0, k - o)]);
    [(0, 0, k)].into_iter().chain(beside)
}

impl LinearAdapter for SvftAdapter {
    fn method(&self) -> &'static str {
        "svft"
    }

    fn update(&self, x: &Tensor, _: &Tensor, ctx: &Context) -> Result<Tensor> {
        let mixed = self.mixed(&x.linear(&self.v, None)?, &self.m.tensor(ctx))?;
        mixed.linear(&self.u, None)
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        vec![("m", &self.m)]
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        vec![("m", &mut self.m)]
    }

    fn delta(&self, _: &Tensor) -> Result<Tensor> {
        // M·Vᵀ is M applied to the columns of Vᵀ.
        let mixed = self.mixed(&self.v.t()?, self.m.value())?;
        self.u.matmul(&mixed.t()?)
    }

    fn recipe(&self) -> Option<Recipe> {
        Some(recipe!(self.settings => band))
    }
}
