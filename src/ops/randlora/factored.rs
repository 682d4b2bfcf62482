//! The factored way: the tokens go through the factors of ΔW̃ = s·B·C, a block Q of B's columns at
//! a time. Neither C nor anything of W's size is ever made, only C_Q and a chunk of h or z.

use std::ops::Range;
use std::sync::Arc;

use super::layer::{Diagonals, Layer, Tokens, pieces};
use super::plan::Plan;
use crate::cpu::Float;
use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::device::{Buffer, CpuDevice};
use crate::error::Result;

/// What all four walks share: where they are and the scratch for it.
struct Walk<'a, T: Float> {
    layer: &'a Layer<'a, T>,
    plan: &'a Plan,
    /// C_Q: |Q|×m.
    c: Buffer<T>,
    /// A chunk of h or z: tokens × |Q|.
    h: Buffer<T>,
    /// A chunk of the input, dropped out.
    copy: Buffer<T>,
}

impl<'a, T: Float> Walk<'a, T> {
    fn new(
        layer: &'a Layer<'a, T>,
        plan: &'a Plan,
        device: &Arc<CpuDevice>,
        count: usize,
        copied: Tokens<'_, T>,
    ) -> Result<Self> {
        let (block, chunk) = (plan.block.min(layer.sizes.columns()), plan.chunk.min(count));
        Ok(Walk {
            layer,
            plan,
            c: device.scratch(block * layer.sizes.small())?,
            h: device.scratch(chunk * block)?,
            copy: device.scratch(copied.copy_len(chunk, copied.width))?,
        })
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<T> {
        pieces(self.layer.sizes.columns(), self.plan.block)
    }

    fn fill_c(&mut self, q: &Range<usize>) {
        let small = self.layer.sizes.small();
        self.layer.fill_c(q.clone(), 0..small, &mut self.c[..q.len() * small]);
    }

    /// v[t] += s·(u[t]·C_Qᵀ)·B_Qᵀ.
    fn up(&mut self, q: &Range<usize>, t: Range<usize>, u: Tokens<'_, T>, v: &mut [T]) -> Result<()> {
        let (small, large) = (self.layer.sizes.small(), self.layer.sizes.large());
        let c = Mat::new(&self.c[..q.len() * small], q.len(), small);
        let z = &mut self.h[..t.len() * q.len()];
        let part = u.part(t.clone(), 0..small, &mut self.copy);
        self.layer.gemm(T::ONE, part, c.t(), Onto::NOTHING, MatMut::new(z, t.len(), q.len()))?;
        let v = &mut v[t.start * large..t.end * large];
        self.layer.spread(q, Mat::new(z, t.len(), q.len()), v)
    }

    /// h[t] = v[t]·B_Q.
    fn h(&mut self, q: &Range<usize>, t: &Range<usize>, v: Tokens<'_, T>) -> Result<()> {
        let part = v.part(t.clone(), 0..v.width, &mut self.copy);
        self.layer.collect(q, part, &mut self.h[..t.len() * q.len()])
    }

    /// M_Q += s·h[t]ᵀ·u[t], with h the last one made or the one kept; the first chunk starts the sum.
    fn add_m(
        &mut self,
        q: &Range<usize>,
        t: Range<usize>,
        u: Tokens<'_, T>,
        v: Large<'_, T>,
        m: &mut [T],
    ) -> Result<()> {
        let small = self.layer.sizes.small();
        let h = match v {
            Large::Kept(h) => h.rows(t.start, t.len()).columns(q.start, q.len()),
            Large::Tokens(_) => Mat::new(&self.h[..t.len() * q.len()], t.len(), q.len()),
        };
        let onto = Onto::sum(t.start == 0);
        let part = u.part(t, 0..small, &mut self.copy);
        self.layer.gemm(self.layer.scale, h.t(), part, onto, MatMut::new(m, q.len(), small))
    }

    /// u[t] += s·h[t]·C_Q.
    fn down(&self, q: &Range<usize>, t: Range<usize>, h: Mat<'_, T>, u: MatMut<'_, T>) -> Result<()> {
        let small = self.layer.sizes.small();
        let c = Mat::new(&self.c[..q.len() * small], q.len(), small);
        self.layer.gemm(self.layer.scale, h, c, Onto::Itself(T::ONE), u.rows(t.start, t.len()))
    }
}

/// v += s·(u·Cᵀ)·Bᵀ.
pub(super) fn up<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    u: Tokens<'_, T>,
    v: &mut [T],
) -> Result<()> {
    let mut walk = Walk::new(layer, plan, device, u.count, u)?;
    for q in walk.blocks() {
        walk.fill_c(&q);
        for t in pieces(u.count, plan.chunk) {
            walk.up(&q, t, u, v)?;
        }
    }
    Ok(())
}

/// u += s·(v·B)·C, and h = v·B written to `keep` (T×c) if it is to be kept.
pub(super) fn down<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    v: Tokens<'_, T>,
    u: &mut [T],
    mut keep: Option<&mut [T]>,
) -> Result<()> {
    let (small, c) = (layer.sizes.small(), layer.sizes.columns());
    let mut walk = Walk::new(layer, plan, device, v.count, v)?;
    for q in walk.blocks() {
        walk.fill_c(&q);
        for t in pieces(v.count, plan.chunk) {
            walk.h(&q, &t, v)?;
            let h = Mat::new(&walk.h[..t.len() * q.len()], t.len(), q.len());
            walk.down(&q, t.clone(), h, MatMut::new(u, v.count, small))?;
            if let Some(keep) = &mut keep {
                for (row, h) in t.zip(h.data.chunks(q.len())) {
                    keep[row * c + q.start..][..q.len()].copy_from_slice(h);
                }
            }
        }
    }
    Ok(())
}

/// The large side of the tokens in a backward: as it is, or h = v·B kept from the forward.
#[derive(Clone, Copy)]
pub(super) enum Large<'a, T> {
    Tokens(Tokens<'a, T>),
    Kept(Mat<'a, T>),
}

/// The backward where the diagonals' gradients are wanted: M_Q = s·h_Qᵀ·u over all tokens, pulled
/// to the diagonals; and dx, if wanted too, added to (down to the small side for in ≤ out, up to
/// the large side for in > out).
pub(super) fn backward<T: Float>(
    layer: &Layer<'_, T>,
    plan: &Plan,
    device: &Arc<CpuDevice>,
    u: Tokens<'_, T>,
    v: Large<'_, T>,
    mut dx: Option<&mut [T]>,
    to: &mut Diagonals<T>,
) -> Result<()> {
    if u.count == 0 {
        // No token starts the sums.
        return Ok(());
    }
    let small = layer.sizes.small();
    let copied = match v {
        Large::Tokens(v) if v.dropout.is_some() => v,
        _ => u,
    };
    let mut walk = Walk::new(layer, plan, device, u.count, copied)?;
    let mut m = device.scratch::<T>(plan.block.min(layer.sizes.columns()) * small)?;
    for q in walk.blocks() {
        let m = &mut m[..q.len() * small];
        if dx.is_some() {
            walk.fill_c(&q);
        }
        for t in pieces(u.count, plan.chunk) {
            if let Large::Tokens(v) = v {
                walk.h(&q, &t, v)?;
            }
            walk.add_m(&q, t.clone(), u, v, m)?;
            match &mut dx {
                Some(dx) if layer.is_wide() => walk.up(&q, t, u, dx)?,
                Some(dx) => {
                    let h = Mat::new(&walk.h[..t.len() * q.len()], t.len(), q.len());
                    walk.down(&q, t, h, MatMut::new(dx, u.count, small))?;
                }
                None => {}
            }
        }
        layer.pull(q, 0..small, m, to);
    }
    Ok(())
}
