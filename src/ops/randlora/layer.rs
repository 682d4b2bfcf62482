//! One layer's ΔW = s·B·C, seen so that in < out and in > out are the same code.
//!
//! Let m be the smaller side of the weight and D the larger one. Write W̃ for the D×m matrix that is
//! W0 for in ≤ out and W0ᵀ for in > out, u for the tokens on the small side (T×m) and v for those
//! on the large side (T×D). Then a layer goes *up*, v = u·W̃ᵀ, or *down*, u = v·W̃:
//!
//! | | forward | dx | small side | large side |
//! |---|---|---|---|---|
//! | in ≤ out | up | down | x | dy |
//! | in > out | down | up | dy | x |
//!
//! ΔW̃ = s·B·C with B (D×c, c = n·r columns) random and C (c×m) made of the diagonals:
//! C[q, j] = λ[k, i]·A[k, j]·γ[i, j], where column q of B belongs to basis i and its rank k. In both
//! cases, with G = vᵀ·u over the tokens' large and small sides as in the table (the gradient of W̃),
//! M = ∂L/∂C = s·Bᵀ·G, and
//!
//! dλ[k, i] = Σ_j M[q, j]·A[k, j]·γ[i, j],   dγ[i, j] = Σ_k M[q, j]·λ[k, i]·A[k, j].
//!
//! What B is multiplied with goes through `block` for block bases, of which only the D×r entries of B that
//! are not zero are there, and through `whole` for others.

use std::ops::Range;
use std::sync::Arc;

use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, parallel};
use crate::device::{Buffer, CpuDevice};
use crate::error::Result;
use crate::ops::dropout::{DropoutKey, mask_range};
use crate::ops::linear::widen;
use crate::ops::matmul::matrix;
use crate::ops::randlora::bases::{B, Pairing};
use crate::ops::randlora::plan::Sizes;
use crate::ops::randlora::{block, whole};
use crate::shape::Layout;
use crate::storage::dispatch_stored;
use crate::tensor::Tensor;

/// A layer's part of the shared bases, its diagonals and its frozen weight.
pub(super) struct Layer<'a, T> {
    pub(super) sizes: Sizes,
    pub(super) pairing: Pairing,
    /// s, with what block bases made for another number of bases lack, or v of ternary ones.
    pub(super) scale: T,
    /// A: r×m.
    pub(super) a: Mat<'a, T>,
    /// B.
    pub(super) b: B<'a, T>,
    /// λ: r×n.
    pub(super) lambda: &'a [T],
    /// γ: n×m.
    pub(super) gamma: &'a [T],
    /// W0: out×in, of any stored type.
    pub(super) weight: &'a Tensor,
}

impl<T: Float> Layer<'_, T> {
    /// Whether in > out.
    pub(super) fn is_wide(&self) -> bool {
        self.sizes.inputs > self.sizes.outputs
    }

    /// The basis and the rank within it that column `q` of B belongs to.
    fn basis_and_rank(&self, q: usize) -> (usize, usize) {
        match self.pairing {
            Pairing::Paper => (q / self.sizes.rank, q % self.sizes.rank),
            Pairing::Peft => (q % self.sizes.bases(), q / self.sizes.bases()),
        }
    }

    /// The column of B for a basis and a rank within it.
    fn column(&self, basis: usize, rank: usize) -> usize {
        match self.pairing {
            Pairing::Paper => basis * self.sizes.rank + rank,
            Pairing::Peft => rank * self.sizes.bases() + basis,
        }
    }

    /// c ← alpha·a·b + what it is put onto, on all threads, in the precision that the device computes
    /// layers in.
    pub(super) fn gemm(
        &self,
        alpha: T,
        a: Mat<'_, T>,
        b: Mat<'_, T>,
        onto: Onto<'_, T>,
        c: MatMut<'_, T>,
    ) -> Result<()> {
        T::layer_gemm(self.weight.device().host(), alpha, a, b, onto, c)
    }

    /// h ← v·B_Q.
    pub(super) fn collect(&self, q: &Range<usize>, v: Mat<'_, T>, h: &mut [T]) -> Result<()> {
        match self.b {
            B::Block(b) => {
                block::collect(self, b, q, v, h);
                Ok(())
            }
            B::Whole(b) => whole::collect(self, b, q, v, h),
        }
    }

    /// v += s·z·B_Qᵀ, where v has rows of D elements.
    pub(super) fn spread(&self, q: &Range<usize>, z: Mat<'_, T>, v: &mut [T]) -> Result<()> {
        match self.b {
            B::Block(b) => {
                block::spread(self, b, q, z, v);
                Ok(())
            }
            B::Whole(b) => whole::spread(self, b, q, z, v),
        }
    }

    fn a_row(&self, rank: usize, columns: &Range<usize>) -> &[T] {
        &self.a.data[rank * self.a.row..][columns.clone()]
    }

    pub(super) fn gamma_row(&self, basis: usize, columns: &Range<usize>) -> &[T] {
        &self.gamma[basis * self.sizes.small()..][columns.clone()]
    }

    pub(super) fn lambda_at(&self, basis: usize, rank: usize) -> T {
        self.lambda[rank * self.sizes.bases() + basis]
    }

    /// What the elements of row q of C are products of: a row of A, a row of γ and a number of λ.
    #[inline(always)]
    pub(super) fn factors(&self, q: usize, columns: &Range<usize>) -> (&[T], &[T], T) {
        let (basis, rank) = self.basis_and_rank(q);
        (self.a_row(rank, columns), self.gamma_row(basis, columns), self.lambda_at(basis, rank))
    }

    /// Writes C[rows, columns], row after row.
    pub(super) fn fill_c(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [T]) {
        let width = columns.len();
        parallel::rows(out, width, width, &|first, out| {
            for (q, out) in (rows.start + first..).zip(out.chunks_mut(width)) {
                let (a, gamma, lambda) = self.factors(q, &columns);
                vectorize(FillC { out, a, gamma, lambda });
            }
        });
    }

    /// Adds what M[rows, columns] = ∂L/∂C gives to the gradients of the diagonals.
    pub(super) fn pull(&self, rows: Range<usize>, columns: Range<usize>, m: &[T], to: &mut Diagonals<T>) {
        let (small, rank, width) = (self.sizes.small(), self.sizes.rank, columns.len());
        let (lambda, gamma) = (&mut to.lambda[..], &mut to.gamma[..]);
        parallel::rows_of_two((lambda, rank), (gamma, small), rank * width, &|basis, d_lambda, d_gamma| {
            let d_gamma = &mut d_gamma[columns.clone()];
            for (k, d_lambda) in d_lambda.iter_mut().enumerate() {
                let q = self.column(basis, k);
                if rows.contains(&q) {
                    let m = &m[(q - rows.start) * width..][..width];
                    let (a, gamma) = (self.a_row(k, &columns), self.gamma_row(basis, &columns));
                    *d_lambda += vectorize(Pull { m, a, gamma, lambda: self.lambda_at(basis, k), d_gamma });
                }
            }
        });
    }

    /// Writes W̃0[d, j] as it lies in memory: d by j for in ≤ out, j by d for in > out.
    pub(super) fn read_weight(&self, d: Range<usize>, j: Range<usize>, out: &mut [T]) -> Result<()> {
        let layout = self.weight_layout(d, j)?;
        dispatch_stored!(self.weight.dtype(), S => widen::<S, T>(self.weight, &layout, out))
    }

    /// W̃0[d, j] where it lies in memory, if that is as rows of adjacent elements of type T.
    pub(super) fn weight_in_place(&self, d: Range<usize>, j: Range<usize>) -> Result<Option<Mat<'_, T>>> {
        let layout = self.weight_layout(d, j)?;
        if self.weight.dtype() != T::DTYPE || layout.strides()[1] != 1 {
            return Ok(None);
        }
        Ok(Some(matrix(self.weight.host()?, &layout, layout.offset())))
    }

    fn weight_layout(&self, d: Range<usize>, j: Range<usize>) -> Result<Layout> {
        let (rows, columns) = if self.is_wide() { (j, d) } else { (d, j) };
        self.weight.layout().slice(0, rows)?.slice(1, columns)
    }
}

/// out = λ·a∘γ.
pub(super) struct FillC<'a, T> {
    pub(super) out: &'a mut [T],
    pub(super) a: &'a [T],
    pub(super) gamma: &'a [T],
    pub(super) lambda: T,
}

impl<T: Float> Kernel for FillC<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for ((out, &a), &gamma) in self.out.iter_mut().zip(self.a).zip(self.gamma) {
            *out = self.lambda * a * gamma;
        }
    }
}

/// dγ += λ·m∘a, and returns Σ m∘a∘γ.
struct Pull<'a, T> {
    m: &'a [T],
    a: &'a [T],
    gamma: &'a [T],
    lambda: T,
    d_gamma: &'a mut [T],
}

impl<T: Float> Kernel for Pull<'_, T> {
    type Element = T;
    type Out = T;
    #[inline(always)]
    fn run(self) -> T {
        const LANES: usize = 16;
        let mut lanes = [T::ZERO; LANES];
        let n = self.m.len();
        let (a, gamma, d_gamma) = (&self.a[..n], &self.gamma[..n], &mut self.d_gamma[..n]);
        let mut at = 0;
        while at + LANES <= n {
            for (lane, sum) in lanes.iter_mut().enumerate() {
                let i = at + lane;
                let ma = self.m[i] * a[i];
                d_gamma[i] += self.lambda * ma;
                *sum += ma * gamma[i];
            }
            at += LANES;
        }
        let mut sum = lanes.into_iter().sum::<T>();
        for i in at..n {
            let ma = self.m[i] * a[i];
            d_gamma[i] += self.lambda * ma;
            sum += ma * gamma[i];
        }
        sum
    }
}

/// The gradients of the diagonals while they are summed up: λ as n×r (a basis's ranks side by
/// side, the transpose of how it is stored), γ as n×m.
pub(super) struct Diagonals<T: Float> {
    pub(super) lambda: Buffer<T>,
    pub(super) gamma: Buffer<T>,
}

impl<T: Float> Diagonals<T> {
    pub(super) fn zeros(sizes: Sizes, device: &Arc<CpuDevice>) -> Result<Self> {
        let mut lambda = device.buffer(sizes.bases() * sizes.rank)?;
        let mut gamma = device.buffer(sizes.bases() * sizes.small())?;
        lambda.fill(T::ZERO);
        gamma.fill(T::ZERO);
        Ok(Diagonals { lambda, gamma })
    }
}

/// The tokens on one side of the layer: a matrix of T rows, with the dropout that the adapter's
/// input goes through.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a, T> {
    pub(super) rows: &'a [T],
    pub(super) count: usize,
    pub(super) width: usize,
    pub(super) dropout: Option<(f64, DropoutKey)>,
}

impl<'a, T: Float> Tokens<'a, T> {
    /// Rows and columns of the matrix, dropped out if they are to be; `copy` is the place for that.
    pub(super) fn part<'b>(&self, rows: Range<usize>, columns: Range<usize>, copy: &'b mut [T]) -> Mat<'b, T>
    where
        'a: 'b,
    {
        let all = Mat::new(self.rows, self.count, self.width);
        let Some((p, key)) = self.dropout else {
            return all.rows(rows.start, rows.len()).columns(columns.start, columns.len());
        };
        let width = columns.len();
        let copy = &mut copy[..rows.len() * width];
        parallel::rows(copy, width, width * 8, &|first, copy| {
            for (t, copy) in (rows.start + first..).zip(copy.chunks_mut(width)) {
                let from = t * self.width + columns.start;
                mask_range(key, p, from as u64, copy);
                for (copy, &x) in copy.iter_mut().zip(&self.rows[from..from + width]) {
                    *copy = *copy * x;
                }
            }
        });
        Mat::new(copy, rows.len(), width)
    }

    /// Elements that [`Tokens::part`] needs room for.
    pub(super) fn copy_len(&self, rows: usize, columns: usize) -> usize {
        if self.dropout.is_some() { rows * columns } else { 0 }
    }
}

/// `0..all` in pieces.
pub(super) fn pieces(all: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..all).step_by(size.max(1)).map(move |from| from..all.min(from + size.max(1)))
}
