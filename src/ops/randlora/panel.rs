//! The panel way: W̃ a few columns J (or rows) at a time, W̃_J = W̃0_J + s·B·C_J, in scratch.
//!
//! The products with tokens are those of the frozen layer; building the panel is extra, and does
//! not depend on the number of tokens.

use std::ops::Range;
use std::sync::Arc;

use super::bases::{B, Whole};
use super::layer::{Diagonals, Layer, Tokens, pieces};
use super::plan::Plan;
use super::{block, whole};
use crate::cpu::Float;
use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::device::{Buffer, CpuDevice};
use crate::error::Result;

/// Builds panels of W̃ = W̃0 + ΔW̃, or of ΔW̃ alone.
struct Builder<'a, T: Float> {
    layer: &'a Layer<'a, T>,
    with_base: bool,
    /// The panel.
    w: Buffer<T>,
    /// C_J: c×|J|; of block bases s·B∘λ for the panel's rows, of ternary ones nothing.
    factor: Buffer<T>,
    /// With block bases, W̃0 widened, where it is stored in a narrow type.
    widened: Buffer<T>,
}

impl<'a, T: Float> Builder<'a, T> {
    /// For panels of so many rows and columns of W̃ at most.
    fn new(
        layer: &'a Layer<'a, T>,
        device: &Arc<CpuDevice>,
        with_base: bool,
        (rows, columns): (usize, usize),
    ) -> Result<Self> {
        let (factor, widened) = match layer.b {
            B::Whole(Whole::Dense(_)) => (layer.sizes.columns() * columns, 0),
            B::Whole(Whole::Ternary(_)) => (0, 0),
            B::Block(_) if !with_base || layer.weight_in_place(0..rows, 0..columns)?.is_some() => {
                (rows * layer.sizes.rank, 0)
            }
            B::Block(_) => (rows * layer.sizes.rank, rows * columns),
        };
        Ok(Builder {
            layer,
            with_base,
            w: device.scratch(rows * columns)?,
            factor: device.scratch(factor)?,
            widened: device.scratch(widened)?,
        })
    }

    /// W̃[d, j]; but for block bases d is all rows.
    fn build(&mut self, d: Range<usize>, j: Range<usize>) -> Result<Mat<'_, T>> {
        let layer = self.layer;
        let w = &mut self.w[..d.len() * j.len()];
        // In the order of the weight in memory, so that reading it is a plain copy.
        let dims = if layer.is_wide() { (j.len(), d.len()) } else { (d.len(), j.len()) };
        match layer.b {
            B::Whole(b) => {
                let c_j = match b {
                    Whole::Dense(b) => &mut self.factor[..b.cols * j.len()],
                    Whole::Ternary(_) => &mut [][..],
                };
                whole::build(layer, b, j, self.with_base, c_j, w)?;
            }
            B::Block(b) => {
                let left = &mut self.factor[..d.len() * layer.sizes.rank];
                let base = match layer.weight_in_place(d.clone(), j.clone())? {
                    _ if !self.with_base => None,
                    Some(base) => Some(base),
                    None => {
                        let widened = &mut self.widened[..d.len() * j.len()];
                        layer.read_weight(d.clone(), j.clone(), widened)?;
                        Some(Mat::new(widened, dims.0, dims.1))
                    }
                };
                block::build(layer, b, (d, j), base, left, w);
            }
        }
        let w = Mat::new(w, dims.0, dims.1);
        Ok(if layer.is_wide() { w.t() } else { w })
    }
}

/// v ← u·W̃ᵀ + what it is put onto.
pub(super) fn up<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    base: bool,
    u: Tokens<'_, T>,
    onto: Onto<'_, T>,
    v: &mut [T],
) -> Result<()> {
    let (small, large, chunk) = (layer.sizes.small(), layer.sizes.large(), chunk(plan, &u));
    // By rows no sums are needed, by columns no mask is made twice.
    let by_rows = matches!(layer.b, B::Block(_)) && u.dropout.is_none();
    let (rows, columns) =
        if by_rows { (plan.rows.min(large), small) } else { (large, plan.panel.min(small)) };
    let mut builder = Builder::new(layer, device, base, (rows, columns))?;
    let mut copy = device.scratch::<T>(u.copy_len(chunk, columns))?;
    for d in pieces(large, rows) {
        for j in pieces(small, columns) {
            let w = builder.build(d.clone(), j.clone())?;
            let onto = if j.start == 0 { onto.columns(d.clone()) } else { Onto::Itself(T::ONE) };
            for t in pieces(u.count, chunk) {
                let v = MatMut::new(v, u.count, large).rows(t.start, t.len()).columns(d.start, d.len());
                layer.gemm(T::ONE, u.part(t, j.clone(), &mut copy), w.t(), onto, v)?;
            }
        }
    }
    Ok(())
}

/// u ← v·W̃ + what it is put onto.
pub(super) fn down<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    base: bool,
    v: Tokens<'_, T>,
    onto: Onto<'_, T>,
    u: &mut [T],
) -> Result<()> {
    let (small, large, chunk) = (layer.sizes.small(), layer.sizes.large(), chunk(plan, &v));
    let mut builder = Builder::new(layer, device, base, (large, plan.panel.min(small)))?;
    let mut copy = device.scratch::<T>(v.copy_len(chunk, large))?;
    for j in pieces(small, plan.panel) {
        let (w_j, onto) = (builder.build(0..large, j.clone())?, onto.columns(j.clone()));
        for t in pieces(v.count, chunk) {
            let u = MatMut::new(u, v.count, small).rows(t.start, t.len()).columns(j.start, j.len());
            layer.gemm(T::ONE, v.part(t, 0..large, &mut copy), w_j, onto, u)?;
        }
    }
    Ok(())
}

/// The gradients of the diagonals, but for block bases: G_J = vᵀ·u_J in the panel's place, M_J = s·Bᵀ·G_J
/// in C's.
pub(super) fn pull<T: Float>(
    layer: &Layer<'_, T>,
    b: Whole<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    u: Tokens<'_, T>,
    v: Tokens<'_, T>,
    to: &mut Diagonals<T>,
) -> Result<()> {
    let (small, large, c) = (layer.sizes.small(), layer.sizes.large(), layer.sizes.columns());
    let widest = plan.panel.min(small);
    let (mut m_j, mut g_j) = (device.scratch::<T>(c * widest)?, device.scratch::<T>(large * widest)?);
    let chunk = chunk(plan, &u).min(chunk(plan, &v));
    let mut u_copy = device.scratch::<T>(u.copy_len(chunk, widest))?;
    let mut v_copy = device.scratch::<T>(v.copy_len(chunk, large))?;
    if u.count == 0 {
        // No token starts the sums.
        return Ok(());
    }
    for j in pieces(small, plan.panel) {
        let (m_j, g_j) = (&mut m_j[..c * j.len()], &mut g_j[..large * j.len()]);
        for t in pieces(u.count, chunk) {
            let onto = Onto::sum(t.start == 0);
            let (u, v) = (u.part(t.clone(), j.clone(), &mut u_copy), v.part(t, 0..large, &mut v_copy));
            layer.gemm(T::ONE, v.t(), u, onto, MatMut::new(g_j, large, j.len()))?;
        }
        whole::pull(layer, b, Mat::new(g_j, large, j.len()), m_j)?;
        layer.pull(0..c, j, m_j, to);
    }
    Ok(())
}

/// Tokens are cut into chunks only where they are copied.
fn chunk<T>(plan: &Plan, tokens: &Tokens<'_, T>) -> usize {
    if tokens.dropout.is_some() { plan.chunk.min(tokens.count) } else { tokens.count }
}
