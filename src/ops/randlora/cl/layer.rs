//! What both ways share on a device, in the letters of `ops::randlora::layer`: C, the products with B, and what M
//! gives to the diagonals.

use std::sync::Arc;

use super::bases::ClBases;
use crate::compute;
use crate::error::Result;
use crate::opencl::gemm::{Stored, gemm};
use crate::opencl::randlora::{Blocks, Diagonals, Part};
use crate::opencl::runtime::{ClBuffer, Runtime};
use crate::opencl::{self, View};
use crate::ops::randlora::bases::{Bases, Pairing, Structure};
use crate::ops::randlora::plan::{Plan, Sizes};
use crate::shape::{Layout, Shape};
use crate::tensor::Tensor;

/// A layer on a device: W̃0, its part of the bases, and its diagonals.
pub(super) struct ClLayer<'a> {
    pub(super) sizes: Sizes,
    pub(super) plan: &'a Plan,
    bases: &'a Bases,
    /// s, with what B as it is stored lacks.
    pub(super) scale: f64,
    /// W̃0 (D×m), a view, of any stored type but f64.
    pub(super) weight: Tensor,
    on_device: ClBases,
    /// How B lies there: D×c, or D×r of block bases.
    b: Layout,
    lambda: Tensor,
    gamma: Tensor,
}

/// A matrix in scratch, row after row.
pub(super) struct Scratch {
    pub(super) data: ClBuffer,
    pub(super) layout: Layout,
}

impl Scratch {
    /// The same memory for another number of rows and columns, at most as many elements.
    pub(super) fn shaped(&mut self, rows: usize, columns: usize) -> Result<()> {
        self.layout = Layout::contiguous(Shape::new(&[rows, columns])?);
        Ok(())
    }

    pub(super) fn view(&self) -> View<'_> {
        View { data: &self.data, layout: &self.layout }
    }
}

impl<'a> ClLayer<'a> {
    pub(super) fn new(
        sizes: Sizes,
        plan: &'a Plan,
        bases: &'a Bases,
        scale: f64,
        [weight, lambda, gamma]: [&Tensor; 3],
    ) -> Result<ClLayer<'a>> {
        bases.check(sizes)?;
        let on_device = bases.on_device(weight.device())?;
        let columns = if bases.structure() == Structure::Block { sizes.rank } else { sizes.columns() };
        let wide = sizes.inputs > sizes.outputs;
        Ok(ClLayer {
            sizes,
            plan,
            bases,
            scale: scale * on_device.value * bases.factor_of_b(sizes.bases()),
            weight: if wide { compute::transpose(weight)? } else { weight.detach() },
            b: on_device.layout.slice(0, 0..sizes.large())?.slice(1, 0..columns)?,
            on_device,
            lambda: compute::contiguous(lambda)?,
            gamma: compute::contiguous(gamma)?,
        })
    }

    pub(super) fn is_wide(&self) -> bool {
        self.sizes.inputs > self.sizes.outputs
    }

    pub(super) fn is_block(&self) -> bool {
        self.bases.structure() == Structure::Block
    }

    /// All columns of B.
    pub(super) fn all_columns(&self) -> std::ops::Range<usize> {
        0..self.sizes.columns()
    }

    pub(super) fn scratch(&self, elements: usize) -> Result<Scratch> {
        let data = opencl::floats(self.runtime()?, elements)?;
        Ok(Scratch { data, layout: Layout::contiguous(Shape::new(&[elements])?) })
    }

    fn runtime(&self) -> Result<&Arc<Runtime>> {
        Ok(self.lambda.cl()?.data.runtime())
    }

    fn diagonals(&self) -> Result<Diagonals<'_>> {
        Ok(Diagonals {
            a: self.on_device.a.cl()?,
            lambda: self.lambda.cl()?,
            gamma: self.gamma.cl()?,
            small: self.sizes.small(),
            bases: self.sizes.bases(),
            rank: self.sizes.rank,
            peft: self.bases.pairing() == Pairing::Peft,
        })
    }

    fn blocks(&self) -> Blocks<'_> {
        let Sizes { rank, .. } = self.sizes;
        Blocks { b: &self.on_device.b, large: self.sizes.large(), bases: self.sizes.bases(), rank }
    }

    /// A part of C, into scratch.
    pub(super) fn fill_c(&self, part: &Part, c: &mut Scratch) -> Result<()> {
        c.shaped(part.rows.len(), part.columns.len())?;
        self.diagonals()?.fill_c(part, &c.data)
    }

    /// What a part of M gives to the gradients of the diagonals.
    pub(super) fn pull(&self, part: &Part, m: &Scratch, to: &[Tensor; 2]) -> Result<()> {
        self.diagonals()?.pull(part, &m.data, to[0].cl()?.data, to[1].cl()?.data)
    }

    /// Gradients of the diagonals, all 0.
    pub(super) fn no_gradients(&self) -> Result<[Tensor; 2]> {
        let zeros = |like: &Tensor| Tensor::zeros(like.shape(), like.dtype(), like.device());
        Ok([zeros(&self.lambda)?, zeros(&self.gamma)?])
    }

    /// Columns of B, in rows for B and in columns for Bᵀ.
    fn b_of(&self, q: &std::ops::Range<usize>) -> Result<(Layout, Layout)> {
        let b = self.b.slice(1, q.clone())?;
        Ok((b, b.permute(&[1, 0])?))
    }

    fn b_view<'b>(&'b self, layout: &'b Layout) -> (View<'b>, Stored) {
        (View { data: &self.on_device.b, layout }, self.on_device.stored)
    }

    /// w += s·B·C_J for a panel w (D×|J|) of W̃, of which all is zero or the base.
    pub(super) fn add_update(&self, part: &Part, w: &Scratch, c: &mut Scratch) -> Result<()> {
        if self.is_block() {
            return self.diagonals()?.add_blocks(part, &self.blocks(), self.scale, &w.data);
        }
        self.fill_c(part, c)?;
        // B goes to the right, where it may be stored in less than f32: wᵀ += s·Cᵀ·Bᵀ.
        let (_, b) = self.b_of(&part.rows)?;
        let (c, w_turned) =
            (c.layout.permute(&[1, 0]).map(|turned| (&c.data, turned))?, w.layout.permute(&[1, 0])?);
        gemm(self.scale, View { data: c.0, layout: &c.1 }, self.b_view(&b), 1.0, (&w.data, &w_turned))
    }

    /// M_J = s·Bᵀ·G_J for a panel G_J of the dense gradient.
    pub(super) fn gradient_of_c(&self, g: &Scratch, m: &mut Scratch) -> Result<()> {
        let columns = g.layout.shape()[1];
        m.shaped(self.sizes.columns(), columns)?;
        let (b, _) = self.b_of(&self.all_columns())?;
        let (g_turned, m_turned) = (g.layout.permute(&[1, 0])?, m.layout.permute(&[1, 0])?);
        let g = View { data: &g.data, layout: &g_turned };
        gemm(self.scale, g, self.b_view(&b), 0.0, (&m.data, &m_turned))
    }

    /// h ← v·B_Q.
    pub(super) fn collect(&self, q: &std::ops::Range<usize>, v: View<'_>, h: View<'_>) -> Result<()> {
        if self.is_block() {
            return self.blocks().collect(q, v, h);
        }
        let (b, _) = self.b_of(q)?;
        gemm(1.0, v, self.b_view(&b), 0.0, (h.data, h.layout))
    }

    /// v += s·z·B_Qᵀ.
    pub(super) fn spread(&self, q: &std::ops::Range<usize>, z: View<'_>, v: View<'_>) -> Result<()> {
        if self.is_block() {
            return self.blocks().spread(q, z, self.scale, v);
        }
        let (_, b) = self.b_of(q)?;
        gemm(self.scale, z, self.b_view(&b), 1.0, (v.data, v.layout))
    }
}
