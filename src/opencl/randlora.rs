//! The parts of RandLoRA that are no products of matrices.

use super::View;
use super::runtime::{Arg, ClBuffer, Grid, Source};
use crate::error::Result;

static SOURCE: Source = Source { name: "randlora.cl", text: include_str!("../../kernels/randlora.cl") };

/// A layer's bases and diagonals, all with their elements one after another, and its sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Diagonals<'a> {
    /// The shared A, whose rows may be longer than m.
    pub(crate) a: View<'a>,
    pub(crate) lambda: View<'a>,
    pub(crate) gamma: View<'a>,
    /// m.
    pub(crate) small: usize,
    /// n.
    pub(crate) bases: usize,
    /// r.
    pub(crate) rank: usize,
    /// Whether column q of B is paired as PEFT does it.
    pub(crate) peft: bool,
}

/// Columns of the weight's smaller side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns {
    pub(crate) from: usize,
    pub(crate) width: usize,
}

impl Diagonals<'_> {
    fn columns(&self) -> usize {
        self.bases * self.rank
    }

    fn a_args(&self) -> [Arg<'_>; 2] {
        [Arg::Buffer(self.a.data), Arg::Size(self.a.layout.shape().last().copied().unwrap_or(0))]
    }

    fn sizes<'b>(&self, j: Columns) -> [Arg<'b>; 5] {
        [j.from, j.width, self.small, self.bases, self.rank].map(Arg::Size)
    }

    fn pairing<'b>(&self) -> Arg<'b> {
        Arg::U32(self.peft.into())
    }

    /// C[:, J], into the start of `c`.
    pub(crate) fn fill_c(&self, j: Columns, c: &ClBuffer) -> Result<()> {
        let n = self.columns() * j.width;
        let args = [
            &self.a_args()[..],
            &self.lambda.in_order(),
            &self.gamma.in_order(),
            &[Arg::Buffer(c)],
            &self.sizes(j),
            &[self.pairing(), Arg::Size(n)],
        ];
        c.runtime().launch(&SOURCE, "fill_c", &args.concat(), Grid::items(n))
    }

    /// Adds s·B·C[:, J] of block bases `b` (`large` rows of them) to the panel `w`.
    pub(crate) fn add_blocks(
        &self,
        j: Columns,
        b: &ClBuffer,
        large: usize,
        scale: f64,
        w: &ClBuffer,
    ) -> Result<()> {
        let n = large * j.width;
        let args = [
            &self.a_args()[..],
            &self.lambda.in_order(),
            &self.gamma.in_order(),
            &[Arg::Buffer(b), Arg::Buffer(w), Arg::F32(scale as f32)],
            &self.sizes(j),
            &[Arg::Size(n)],
        ];
        w.runtime().launch(&SOURCE, "add_blocks", &args.concat(), Grid::items(n))
    }

    /// M = s·Bᵀ·G of block bases for a panel `g` of the dense gradient, into `m`.
    pub(crate) fn pull_blocks(
        &self,
        j: Columns,
        b: &ClBuffer,
        (g, large): (&ClBuffer, usize),
        scale: f64,
        m: &ClBuffer,
    ) -> Result<()> {
        let n = self.columns() * j.width;
        let sizes = [large, j.width, self.bases, self.rank, n].map(Arg::Size);
        let args = [&[Arg::Buffer(b), Arg::Buffer(g), Arg::Buffer(m), Arg::F32(scale as f32)][..], &sizes];
        m.runtime().launch(&SOURCE, "pull_blocks", &args.concat(), Grid::items(n))
    }

    /// What M[:, J] gives to the gradients of the diagonals: columns J of dγ, and added to dλ.
    pub(crate) fn pull(
        &self,
        j: Columns,
        m: &ClBuffer,
        d_lambda: &ClBuffer,
        d_gamma: &ClBuffer,
    ) -> Result<()> {
        let (m_arg, n) = ([Arg::Buffer(m)], self.bases * j.width);
        let args = [
            &m_arg[..],
            &self.a_args(),
            &self.lambda.in_order(),
            &[Arg::Buffer(d_gamma)],
            &self.sizes(j),
            &[self.pairing(), Arg::Size(n)],
        ];
        m.runtime().launch(&SOURCE, "pull_gamma", &args.concat(), Grid::items(n))?;
        let args = [
            &m_arg[..],
            &self.a_args(),
            &self.gamma.in_order(),
            &[Arg::Buffer(d_lambda)],
            &self.sizes(j),
            &[self.pairing()],
        ];
        m.runtime().launch(&SOURCE, "pull_lambda", &args.concat(), Grid::groups(self.columns()))
    }
}
