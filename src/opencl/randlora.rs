//! The parts of RandLoRA that are no products of matrices.

use std::ops::Range;

use super::View;
use super::runtime::{Arg, ClBuffer, Grid, Source};
use crate::error::Result;

static SOURCE: Source = Source { name: "randlora.cl", text: include_str!("../../kernels/randlora.cl") };

/// A layer's A and diagonals, all with their elements one after another, and its sizes.
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

/// A part of C or of M: rows, of which each belongs to a column of B, and columns of the weight's smaller side.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

/// B of block bases, D×r.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocks<'a> {
    pub(crate) b: &'a ClBuffer,
    /// D.
    pub(crate) large: usize,
    /// n.
    pub(crate) bases: usize,
    /// r.
    pub(crate) rank: usize,
}

impl Diagonals<'_> {
    fn a_args(&self) -> [Arg<'_>; 2] {
        [Arg::Buffer(self.a.data), Arg::Size(self.a.layout.shape().last().copied().unwrap_or(0))]
    }

    /// The struct `Part` of randlora.cl.
    fn part(&self, part: &Part) -> [u32; 8] {
        let Part { rows, columns } = part;
        let sizes = [rows.start, rows.len(), columns.start, columns.len(), self.small, self.bases, self.rank];
        let [a, b, c, d, e, f, g] = sizes.map(|n| n as u32);
        [a, b, c, d, e, f, g, self.peft.into()]
    }

    /// A part of C, into the start of `c`.
    pub(crate) fn fill_c(&self, part: &Part, c: &ClBuffer) -> Result<()> {
        let (n, words) = (part.rows.len() * part.columns.len(), self.part(part));
        let args = [
            &self.a_args()[..],
            &self.lambda.in_order(),
            &self.gamma.in_order(),
            &[Arg::Buffer(c), Arg::Words(&words), Arg::Size(n)],
        ];
        c.runtime().launch(&SOURCE, "fill_c", &args.concat(), Grid::items(n))
    }

    /// Adds s·B·C[:, J] of block bases to the panel `w`.
    pub(crate) fn add_blocks(
        &self,
        part: &Part,
        blocks: &Blocks<'_>,
        scale: f64,
        w: &ClBuffer,
    ) -> Result<()> {
        let (n, words) = (blocks.large * part.columns.len(), self.part(part));
        let args = [
            &self.a_args()[..],
            &self.lambda.in_order(),
            &self.gamma.in_order(),
            &[
                Arg::Buffer(blocks.b),
                Arg::Buffer(w),
                Arg::F32(scale as f32),
                Arg::Words(&words),
                Arg::Size(n),
            ],
        ];
        w.runtime().launch(&SOURCE, "add_blocks", &args.concat(), Grid::items(n))
    }

    /// Adds what a part of M gives to the gradients of the diagonals.
    pub(crate) fn pull(
        &self,
        part: &Part,
        m: &ClBuffer,
        d_lambda: &ClBuffer,
        d_gamma: &ClBuffer,
    ) -> Result<()> {
        let (m_arg, n, words) = ([Arg::Buffer(m)], self.bases * part.columns.len(), self.part(part));
        let args = [
            &m_arg[..],
            &self.a_args(),
            &self.lambda.in_order(),
            &[Arg::Buffer(d_gamma), Arg::Words(&words), Arg::Size(n)],
        ];
        m.runtime().launch(&SOURCE, "pull_gamma", &args.concat(), Grid::items(n))?;
        let args = [
            &m_arg[..],
            &self.a_args(),
            &self.gamma.in_order(),
            &[Arg::Buffer(d_lambda), Arg::Words(&words)],
        ];
        m.runtime().launch(&SOURCE, "pull_lambda", &args.concat(), Grid::groups(part.rows.len()))
    }
}

impl Blocks<'_> {
    /// h ← v·B_Q, where rows of v have their elements side by side, and those of h too.
    pub(crate) fn collect(&self, q: &Range<usize>, v: View<'_>, h: View<'_>) -> Result<()> {
        let n = h.numel();
        let args = [
            &v.by_dimension()[..],
            &[Arg::Buffer(self.b)],
            &h.by_dimension(),
            &[q.start, q.len(), self.large, self.bases, self.rank, n].map(Arg::Size),
        ];
        h.runtime().launch(&SOURCE, "collect_blocks", &args.concat(), Grid::items(n))
    }

    /// v += s·z·B_Qᵀ, as above.
    pub(crate) fn spread(&self, q: &Range<usize>, z: View<'_>, scale: f64, v: View<'_>) -> Result<()> {
        let n = v.numel();
        let args = [
            &z.by_dimension()[..],
            &[Arg::Buffer(self.b), Arg::F32(scale as f32)],
            &v.by_dimension(),
            &[q.start, q.len(), self.large, self.bases, self.rank, n].map(Arg::Size),
        ];
        v.runtime().launch(&SOURCE, "spread_blocks", &args.concat(), Grid::items(n))
    }
}
