//! Products of matrices, in batches.

use super::View;
use super::runtime::{Arg, ClBuffer, Grid, Source};
use crate::dtype::DType;
use crate::error::Result;
use crate::shape::Layout;

static SOURCE: Source = Source { name: "gemm.cl", text: include_str!("../../kernels/gemm.cl") };

/// How a matrix on the right is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    BF16,
    F16,
    /// −1, 0 and 1, two bits each, sixteen in a word: 0, 1 and 3 for −1. Strides and offsets count numbers.
    Ternary,
}

impl From<DType> for Stored {
    fn from(dtype: DType) -> Stored {
        match dtype {
            DType::BF16 => Stored::BF16,
            DType::F16 => Stored::F16,
            _ => Stored::F32,
        }
    }
}

/// Numbers of −1, 0 and 1 (by their signs) as [`Stored::Ternary`], in rows of whole words.
pub(crate) fn pack(signs: impl ExactSizeIterator<Item = i8>, width: usize) -> Vec<u32> {
    let words = width.div_ceil(16);
    let mut packed = vec![0; signs.len() / width.max(1) * words];
    for (i, sign) in signs.enumerate() {
        let (row, column) = (i / width, i % width);
        packed[row * words + column / 16] |= ((sign as u32) & 3) << (2 * (column % 16));
    }
    packed
}

/// The matrices in the last two dimensions of a layout.
struct Matrices {
    batch: Layout,
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl Matrices {
    fn of(layout: &Layout) -> Matrices {
        let (rank, dims, strides) = (layout.shape().rank(), layout.shape().dims(), layout.strides());
        Matrices {
            batch: layout.leading(rank - 2),
            rows: dims[rank - 2],
            cols: dims[rank - 1],
            row: strides[rank - 2],
            col: strides[rank - 1],
        }
    }
}

/// c ← alpha·a·b + beta·c for (…, m, k)·(…, k, n), where `c` lies in its buffer as `to` says and all have
/// the same dimensions before the last two. `b` is stored as `stored` says.
pub(crate) fn gemm(
    alpha: f64,
    a: View<'_>,
    (b, stored): (View<'_>, impl Into<Stored>),
    beta: f64,
    (c, to): (&ClBuffer, &Layout),
) -> Result<()> {
    let (left, right, out) = (Matrices::of(a.layout), Matrices::of(b.layout), Matrices::of(to));
    let (runtime, batch) = (a.runtime(), out.batch.shape().numel());
    // The result's bits do not depend on the tile.
    let tile = runtime.tile([out.rows, out.cols, batch]);
    let kernel = match (stored.into(), tile.large) {
        (Stored::F32, false) => "gemm_f32",
        (Stored::F32, true) => "gemm_f32_large",
        (Stored::BF16, false) => "gemm_bf16",
        (Stored::BF16, true) => "gemm_bf16_large",
        (Stored::F16, false) => "gemm_f16",
        (Stored::F16, true) => "gemm_f16_large",
        (Stored::Ternary, false) => "gemm_ternary",
        (Stored::Ternary, true) => "gemm_ternary_large",
    };
    let args = [
        Arg::Buffer(a.data),
        Arg::Walk(&left.batch),
        Arg::Size(left.row),
        Arg::Size(left.col),
        Arg::Buffer(b.data),
        Arg::Walk(&right.batch),
        Arg::Size(right.row),
        Arg::Size(right.col),
        Arg::Buffer(c),
        Arg::Walk(&out.batch),
        Arg::Size(out.row),
        Arg::Size(out.col),
        Arg::Size(out.rows),
        Arg::Size(out.cols),
        Arg::Size(left.cols),
        Arg::F32(alpha as f32),
        Arg::F32(beta as f32),
    ];
    let grid = Grid { groups: tile.groups([out.rows, out.cols, batch]), group: [tile.threads; 2] };
    runtime.launch(&SOURCE, kernel, &args, grid)
}
