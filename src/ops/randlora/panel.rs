//! The panel way: W̃ a few columns J at a time, W̃_J = W̃0_J + s·B·C_J, in scratch.
//!
//! The products with tokens are those of the frozen layer; building the panel is extra, and does
//! not depend on the number of tokens.

use std::ops::Range;
use std::sync::Arc;

use super::layer::{Diagonals, Layer, Tokens, pieces};
use super::plan::Plan;
use crate::cpu::Float;
use crate::cpu::gemm::{Mat, MatMut};
use crate::device::CpuDevice;
use crate::error::Result;

/// Calls `f(J, W̃_J)` for all panels. Without the base they are panels of ΔW̃ alone.
fn each_panel<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    base: bool,
    mut f: impl FnMut(Range<usize>, Mat<'_, T>) -> Result<()>,
) -> Result<()> {
    let (small, large, c) = (layer.sizes.small(), layer.sizes.large(), layer.sizes.columns());
    let widest = plan.panel.min(small);
    let (mut c_j, mut w_j) = (device.scratch::<T>(c * widest)?, device.scratch::<T>(large * widest)?);
    for j in pieces(small, plan.panel) {
        let width = j.len();
        let (c_j, w_j) = (&mut c_j[..c * width], &mut w_j[..large * width]);
        layer.fill_c(0..c, j.clone(), c_j);
        if base {
            layer.read_weight(j.clone(), w_j)?;
        }
        let beta = if base { T::ONE } else { T::ZERO };
        // In the order of the weight in memory, so that reading it above is a plain copy.
        let (w, c_j) =
            (if layer.is_wide() { (width, large) } else { (large, width) }, Mat::new(c_j, c, width));
        let out = MatMut::new(w_j, w.0, w.1);
        let out = if layer.is_wide() { out.t() } else { out };
        T::layer_gemm(device, layer.scale, layer.b, c_j, beta, out)?;
        let w_j = Mat::new(w_j, w.0, w.1);
        f(j, if layer.is_wide() { w_j.t() } else { w_j })?;
    }
    Ok(())
}

/// v ← u·W̃ᵀ + beta·v.
pub(super) fn up<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    base: bool,
    u: Tokens<'_, T>,
    beta: T,
    v: &mut [T],
) -> Result<()> {
    let chunk = chunk(plan, &u);
    let mut copy = device.scratch::<T>(u.copy_len(chunk, plan.panel))?;
    each_panel(layer, plan, device, base, |j, w_j| {
        let beta = if j.start == 0 { beta } else { T::ONE };
        for t in pieces(u.count, chunk) {
            let v = MatMut::new(v, u.count, layer.sizes.large()).rows(t.start, t.len());
            T::layer_gemm(device, T::ONE, u.part(t, j.clone(), &mut copy), w_j.t(), beta, v)?;
        }
        Ok(())
    })
}

/// u ← v·W̃ + beta·u.
pub(super) fn down<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    base: bool,
    v: Tokens<'_, T>,
    beta: T,
    u: &mut [T],
) -> Result<()> {
    let chunk = chunk(plan, &v);
    let mut copy = device.scratch::<T>(v.copy_len(chunk, v.width))?;
    each_panel(layer, plan, device, base, |j, w_j| {
        for t in pieces(v.count, chunk) {
            let u = MatMut::new(u, v.count, layer.sizes.small()).rows(t.start, t.len());
            let u = u.columns(j.start, j.len());
            T::layer_gemm(device, T::ONE, v.part(t, 0..v.width, &mut copy), w_j, beta, u)?;
        }
        Ok(())
    })
}

/// The gradients of the diagonals: G_J = vᵀ·u_J in the panel's place, M_J = s·Bᵀ·G_J in C's.
pub(super) fn pull<T: Float>(
    layer: &Layer<'_, T>,
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
    for j in pieces(small, plan.panel) {
        let (m_j, g_j) = (&mut m_j[..c * j.len()], &mut g_j[..large * j.len()]);
        g_j.fill(T::ZERO);
        for t in pieces(u.count, chunk) {
            let (u, v) = (u.part(t.clone(), j.clone(), &mut u_copy), v.part(t, 0..large, &mut v_copy));
            T::layer_gemm(device, T::ONE, v.t(), u, T::ONE, MatMut::new(g_j, large, j.len()))?;
        }
        let g_j = Mat::new(g_j, large, j.len());
        T::layer_gemm(device, layer.scale, layer.b.t(), g_j, T::ZERO, MatMut::new(m_j, c, j.len()))?;
        layer.pull(0..c, j, m_j, to);
    }
    Ok(())
}

/// Tokens are cut into chunks only where they are copied.
fn chunk<T>(plan: &Plan, tokens: &Tokens<'_, T>) -> usize {
    if tokens.dropout.is_some() { plan.chunk.min(tokens.count) } else { tokens.count }
}
