//! The factored way: the tokens go through the factors of ΔW̃ = s·B·C, a block Q of B's columns and a chunk of
//! the tokens at a time.

use std::ops::Range;

use super::layer::{ClLayer, Scratch};
use crate::dtype::DType;
use crate::error::Result;
use crate::opencl::View;
use crate::opencl::gemm::gemm;
use crate::opencl::randlora::Part;
use crate::shape::Layout;
use crate::tensor::Tensor;

/// The large side of the tokens in a backward: as it is, or h = v·B kept from the forward.
#[derive(Clone, Copy)]
pub(super) enum Large<'a> {
    Tokens(&'a Tensor),
    Kept(&'a Tensor),
}

/// Where a walk is, and its scratch: C_Q, and a chunk of h or z.
struct Walk<'a> {
    layer: &'a ClLayer<'a>,
    c: Scratch,
    h: Scratch,
}

/// Rows of a matrix.
fn rows(x: &Tensor, t: &Range<usize>) -> Result<Layout> {
    x.layout().slice(0, t.clone())
}

fn pieces(all: usize, piece: usize) -> impl Iterator<Item = Range<usize>> {
    (0..all).step_by(piece.max(1)).map(move |from| from..all.min(from + piece.max(1)))
}

impl<'a> Walk<'a> {
    fn new(layer: &'a ClLayer<'a>) -> Result<Walk<'a>> {
        let block = layer.plan.block.min(layer.sizes.columns());
        let chunk = layer.plan.chunk.min(layer.sizes.tokens);
        Ok(Walk { layer, c: layer.scratch(block * layer.sizes.small())?, h: layer.scratch(chunk * block)? })
    }

    fn blocks(&self) -> impl Iterator<Item = Part> + use<> {
        let small = self.layer.sizes.small();
        pieces(self.layer.sizes.columns(), self.layer.plan.block)
            .map(move |rows| Part { rows, columns: 0..small })
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        pieces(self.layer.sizes.tokens, self.layer.plan.chunk)
    }

    fn fill_c(&mut self, part: &Part) -> Result<()> {
        self.layer.fill_c(part, &mut self.c)
    }

    /// v[t] += s·(u[t]·C_Qᵀ)·B_Qᵀ.
    fn up(&mut self, q: &Range<usize>, t: &Range<usize>, u: &Tensor, v: &Tensor) -> Result<()> {
        self.h.shaped(t.len(), q.len())?;
        let (u_rows, v_rows, c) = (rows(u, t)?, rows(v, t)?, self.c.layout.permute(&[1, 0])?);
        let (u, c) = (View { layout: &u_rows, ..u.cl()? }, View { data: &self.c.data, layout: &c });
        gemm(1.0, u, (c, DType::F32), 0.0, (&self.h.data, &self.h.layout))?;
        self.layer.spread(q, self.h.view(), View { layout: &v_rows, ..v.cl()? })
    }

    /// h[t] = v[t]·B_Q.
    fn h(&mut self, q: &Range<usize>, t: &Range<usize>, v: &Tensor) -> Result<()> {
        self.h.shaped(t.len(), q.len())?;
        let rows = rows(v, t)?;
        self.layer.collect(q, View { layout: &rows, ..v.cl()? }, self.h.view())
    }

    /// u[t] += s·h[t]·C_Q.
    fn down(&self, t: &Range<usize>, h: View<'_>, u: &Tensor) -> Result<()> {
        gemm(self.layer.scale, h, (self.c.view(), DType::F32), 1.0, (u.cl()?.data, &rows(u, t)?))
    }

    /// M_Q += s·h[t]ᵀ·u[t]; the first chunk starts the sum.
    fn add_m(&self, t: &Range<usize>, h: View<'_>, u: &Tensor, m: &Scratch) -> Result<()> {
        let (turned, u_rows) = (h.layout.permute(&[1, 0])?, rows(u, t)?);
        let (h, u) = (View { layout: &turned, ..h }, View { layout: &u_rows, ..u.cl()? });
        let beta = if t.start == 0 { 0.0 } else { 1.0 };
        gemm(self.layer.scale, h, (u, DType::F32), beta, (&m.data, &m.layout))
    }
}

/// Rows and columns of h where it is kept whole.
fn part_of(h: &Tensor, q: &Range<usize>, t: &Range<usize>) -> Result<Layout> {
    rows(h, t)?.slice(1, q.clone())
}

impl ClLayer<'_> {
    /// v += s·(u·Cᵀ)·Bᵀ.
    pub(super) fn factored_up(&self, u: &Tensor, v: &Tensor) -> Result<()> {
        let mut walk = Walk::new(self)?;
        for part in walk.blocks() {
            walk.fill_c(&part)?;
            for t in walk.chunks() {
                walk.up(&part.rows, &t, u, v)?;
            }
        }
        Ok(())
    }

    /// u += s·(v·B)·C, and h = v·B in `keep` (T×c) if it is to be kept.
    pub(super) fn factored_down(&self, v: &Tensor, u: &Tensor, keep: Option<&Tensor>) -> Result<()> {
        let mut walk = Walk::new(self)?;
        for part in walk.blocks() {
            walk.fill_c(&part)?;
            for t in walk.chunks() {
                let Some(keep) = keep else {
                    walk.h(&part.rows, &t, v)?;
                    walk.down(&t, walk.h.view(), u)?;
                    continue;
                };
                let (v_rows, h) = (rows(v, &t)?, part_of(keep, &part.rows, &t)?);
                let h = View { layout: &h, ..keep.cl()? };
                self.collect(&part.rows, View { layout: &v_rows, ..v.cl()? }, h)?;
                walk.down(&t, h, u)?;
            }
        }
        Ok(())
    }

    /// dλ and dγ: M_Q = s·h_Qᵀ·u over all tokens, pulled to the diagonals; and dx, if wanted too, added to
    /// (down to the small side for in ≤ out, up to the large side for in > out).
    pub(super) fn factored_backward(
        &self,
        u: &Tensor,
        v: Large<'_>,
        dx: Option<&Tensor>,
    ) -> Result<[Tensor; 2]> {
        let to = self.no_gradients()?;
        if self.sizes.tokens == 0 {
            // No token starts the sums.
            return Ok(to);
        }
        let (mut walk, small) = (Walk::new(self)?, self.sizes.small());
        let mut m = self.scratch(self.plan.block.min(self.sizes.columns()) * small)?;
        for part in walk.blocks() {
            m.shaped(part.rows.len(), small)?;
            if dx.is_some() {
                walk.fill_c(&part)?;
            }
            for t in walk.chunks() {
                let kept;
                let h = match v {
                    Large::Tokens(v) => {
                        walk.h(&part.rows, &t, v)?;
                        walk.h.view()
                    }
                    Large::Kept(h) => {
                        kept = part_of(h, &part.rows, &t)?;
                        View { layout: &kept, ..h.cl()? }
                    }
                };
                walk.add_m(&t, h, u, &m)?;
                match dx {
                    Some(dx) if self.is_wide() => walk.up(&part.rows, &t, u, dx)?,
                    Some(dx) => walk.down(&t, h, dx)?,
                    None => {}
                }
            }
            self.pull(&part, &m, &to)?;
        }
        Ok(to)
    }
}
