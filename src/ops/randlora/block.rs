//! Products with block bases, of whose B (D×c) only the entries that are not zero are there (D×r):
//! row d is that of basis ⌊d/r⌋ mod n in the columns of that basis.
//!
//! So W̃[d, :] = W̃0[d, :] + s·((B[d, :]∘λ_i)·A)∘γ_i with i the basis of row d: one product with A for
//! any rows and columns of W̃, and no C.

use std::ops::Range;

use super::layer::Layer;
use crate::cpu::gemm::{Mat, MatMut, Threads, gemm};
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, parallel};

/// Tokens that a thread works on at a time: enough for a product's own costs, and some for each thread.
fn tokens_at_once(count: usize) -> usize {
    (count / 4).clamp(64, 256)
}

/// A block of rows of B that belong to one basis.
struct Block {
    rows: Range<usize>,
    basis: usize,
}

/// The blocks of these rows of B, the first and the last one cut off where the rows end.
fn blocks<T: Float>(layer: &Layer<'_, T>, rows: Range<usize>) -> impl Iterator<Item = Block> + use<T> {
    let (rank, bases) = (layer.sizes.rank, layer.sizes.bases());
    (rows.start / rank..rows.end.div_ceil(rank)).map(move |i| Block {
        rows: rows.start.max(i * rank)..rows.end.min((i + 1) * rank),
        basis: i % bases,
    })
}

/// The blocks whose columns are among `q`, with the columns that are: their place in `q` and in the block.
fn blocks_of<'a, T: Float>(
    layer: &'a Layer<'_, T>,
    q: &'a Range<usize>,
) -> impl Iterator<Item = (Block, Range<usize>, Range<usize>)> + use<'a, T> {
    let rank = layer.sizes.rank;
    blocks(layer, 0..layer.sizes.large()).filter_map(move |block| {
        let first = block.basis * rank;
        let (from, to) = (q.start.max(first), q.end.min(first + rank));
        (from < to).then(|| (block, from - q.start..to - q.start, from - first..to - first))
    })
}

/// h ← v·B_Q.
pub(super) fn collect<T: Float>(
    layer: &Layer<'_, T>,
    b: Mat<'_, T>,
    q: &Range<usize>,
    v: Mat<'_, T>,
    h: &mut [T],
) {
    let (rank, bases, at_once) = (layer.sizes.rank, layer.sizes.bases(), tokens_at_once(v.rows));
    parallel::chunks(h, at_once * q.len(), &|i, h| {
        let count = h.len() / q.len();
        let v = v.rows(i * at_once, count);
        for (block, place, columns) in blocks_of(layer, q) {
            let b = b.rows(block.rows.start, block.rows.len()).columns(columns.start, columns.len());
            let v = v.columns(block.rows.start, block.rows.len());
            let h = MatMut::new(h, count, q.len()).columns(place.start, place.len());
            // The first block of a basis begins its sums.
            let beta = if block.rows.start < bases * rank { T::ZERO } else { T::ONE };
            gemm(T::ONE, v, b, beta, h, Threads::One);
        }
    });
}

/// v += s·z·B_Qᵀ.
pub(super) fn spread<T: Float>(
    layer: &Layer<'_, T>,
    b: Mat<'_, T>,
    q: &Range<usize>,
    z: Mat<'_, T>,
    v: &mut [T],
) {
    let (large, at_once) = (layer.sizes.large(), tokens_at_once(z.rows));
    parallel::chunks(v, at_once * large, &|i, v| {
        let count = v.len() / large;
        let z = z.rows(i * at_once, count);
        for (block, place, columns) in blocks_of(layer, q) {
            let b = b.rows(block.rows.start, block.rows.len()).columns(columns.start, columns.len());
            let v = MatMut::new(v, count, large).columns(block.rows.start, block.rows.len());
            gemm(layer.scale, z.columns(place.start, place.len()), b.t(), T::ONE, v, Threads::One);
        }
    });
}

/// Writes W̃[d, j] as it lies in memory, d by j for in ≤ out and j by d for in > out: `base`, which has
/// rows of adjacent elements, plus ΔW̃; or ΔW̃ alone. `left` has room for |d|·r elements.
pub(super) fn build<T: Float>(
    layer: &Layer<'_, T>,
    b: Mat<'_, T>,
    (d, j): (Range<usize>, Range<usize>),
    base: Option<Mat<'_, T>>,
    left: &mut [T],
    out: &mut [T],
) {
    let (rank, bases) = (layer.sizes.rank, layer.sizes.bases());
    parallel::rows(left, rank, rank, &|first, left| {
        for (row, left) in (d.start + first..).zip(left.chunks_mut(rank)) {
            let (basis, b) = (row / rank % bases, &b.data[row * b.row..]);
            for (k, left) in left.iter_mut().enumerate() {
                *left = layer.scale * b[k] * layer.lambda_at(basis, k);
            }
        }
    });
    let (left, a) = (Mat::new(left, d.len(), rank), layer.a.columns(j.start, j.len()));
    let (left, a, rows, width) = match layer.is_wide() {
        false => (left, a, d.len(), j.len()),
        true => (a.t(), left.t(), j.len(), d.len()),
    };
    let pool = Threads::Pool(layer.weight.device().host());
    gemm(T::ONE, left, a, T::ZERO, MatMut::new(out, rows, width), pool);
    parallel::rows(out, width, width, &|first, out| {
        for (row, out) in (first..).zip(out.chunks_mut(width)) {
            let base = base.map(|base| &base.data[row * base.row..][..width]);
            if !layer.is_wide() {
                let gamma = layer.gamma_row((d.start + row) / rank % bases, &j);
                vectorize(TimesRow { out, factors: gamma, base });
                continue;
            }
            for block in blocks(layer, d.clone()) {
                let here = block.rows.start - d.start..block.rows.end - d.start;
                let gamma = layer.gamma_row(block.basis, &j)[row];
                let base = base.map(|base| &base[here.clone()]);
                vectorize(Times { out: &mut out[here], factor: gamma, base });
            }
        }
    });
}

/// out ← base + factors∘out, without the base if there is none.
struct TimesRow<'a, T> {
    out: &'a mut [T],
    factors: &'a [T],
    base: Option<&'a [T]>,
}

impl<T: Float> Kernel for TimesRow<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let factors = self.out.iter_mut().zip(self.factors);
        match self.base {
            Some(base) => factors.zip(base).for_each(|((out, &factor), &base)| *out = base + factor * *out),
            None => factors.for_each(|(out, &factor)| *out = factor * *out),
        }
    }
}

/// out ← base + factor·out, without the base if there is none.
struct Times<'a, T> {
    out: &'a mut [T],
    factor: T,
    base: Option<&'a [T]>,
}

impl<T: Float> Kernel for Times<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        match self.base {
            Some(base) => self.out.iter_mut().zip(base).for_each(|(o, &base)| *o = base + self.factor * *o),
            None => self.out.iter_mut().for_each(|o| *o = self.factor * *o),
        }
    }
}
