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

/// Tokens that a thread works on at a time.
const TOKENS: usize = 128;

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
pub(super) fn collect<T: Float>(layer: &Layer<'_, T>, q: &Range<usize>, v: Mat<'_, T>, h: &mut [T]) {
    let (rank, bases) = (layer.sizes.rank, layer.sizes.bases());
    parallel::chunks(h, TOKENS * q.len(), &|i, h| {
        let count = h.len() / q.len();
        let v = v.rows(i * TOKENS, count);
        for (block, place, columns) in blocks_of(layer, q) {
            let b = layer.b.rows(block.rows.start, block.rows.len()).columns(columns.start, columns.len());
            let v = v.columns(block.rows.start, block.rows.len());
            let h = MatMut::new(h, count, q.len()).columns(place.start, place.len());
            // The first block of a basis begins its sums.
            let beta = if block.rows.start < bases * rank { T::ZERO } else { T::ONE };
            gemm(T::ONE, v, b, beta, h, Threads::One);
        }
    });
}

/// v += s·z·B_Qᵀ.
pub(super) fn spread<T: Float>(layer: &Layer<'_, T>, q: &Range<usize>, z: Mat<'_, T>, v: &mut [T]) {
    let large = layer.sizes.large();
    parallel::chunks(v, TOKENS * large, &|i, v| {
        let count = v.len() / large;
        let z = z.rows(i * TOKENS, count);
        for (block, place, columns) in blocks_of(layer, q) {
            let b = layer.b.rows(block.rows.start, block.rows.len()).columns(columns.start, columns.len());
            let v = MatMut::new(v, count, large).columns(block.rows.start, block.rows.len());
            gemm(layer.scale, z.columns(place.start, place.len()), b.t(), T::ONE, v, Threads::One);
        }
    });
}

/// Writes W̃[d, j] as it lies in memory, d by j for in ≤ out and j by d for in > out, to `out`, which
/// holds W̃0[d, j], or zeros for ΔW̃ alone. `left` has room for |d|·r elements, `product` for |d|·|j|.
pub(super) fn add_delta<T: Float>(
    layer: &Layer<'_, T>,
    d: Range<usize>,
    j: Range<usize>,
    (left, product): (&mut [T], &mut [T]),
    out: &mut [T],
) {
    let (rank, bases) = (layer.sizes.rank, layer.sizes.bases());
    for (row, left) in d.clone().zip(left.chunks_mut(rank)) {
        let basis = row / rank % bases;
        for (k, left) in left.iter_mut().enumerate() {
            *left = layer.scale * layer.b.data[row * layer.b.row + k] * layer.lambda_at(basis, k);
        }
    }
    let (left, a) = (Mat::new(left, d.len(), rank), layer.a.columns(j.start, j.len()));
    if layer.is_wide() {
        gemm(T::ONE, a.t(), left.t(), T::ZERO, MatMut::new(product, j.len(), d.len()), Threads::Pool);
        let width = d.len();
        parallel::rows(out, width, width, &|first, out| {
            for (row, out) in (first..).zip(out.chunks_mut(width)) {
                let product = &product[row * width..][..width];
                for block in blocks(layer, d.clone()) {
                    let here = block.rows.start - d.start..block.rows.end - d.start;
                    let gamma = layer.gamma_row(block.basis, &j)[row];
                    vectorize(AddScaled { out: &mut out[here.clone()], x: &product[here], factor: gamma });
                }
            }
        });
    } else {
        gemm(T::ONE, left, a, T::ZERO, MatMut::new(product, d.len(), j.len()), Threads::Pool);
        let width = j.len();
        parallel::rows(out, width, width, &|first, out| {
            for (row, out) in (first..).zip(out.chunks_mut(width)) {
                let (product, basis) = (&product[row * width..][..width], (d.start + row) / rank % bases);
                vectorize(AddProduct { out, x: product, y: layer.gamma_row(basis, &j) });
            }
        });
    }
}

/// out += x∘y.
struct AddProduct<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    y: &'a [T],
}

impl<T: Float> Kernel for AddProduct<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for ((out, &x), &y) in self.out.iter_mut().zip(self.x).zip(self.y) {
            *out += x * y;
        }
    }
}

/// out += factor·x.
struct AddScaled<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    factor: T,
}

impl<T: Float> Kernel for AddScaled<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (out, &x) in self.out.iter_mut().zip(self.x) {
            *out += self.factor * x;
        }
    }
}
