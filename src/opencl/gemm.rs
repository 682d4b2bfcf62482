//! Products of matrices, in batches.

use super::View;
use super::runtime::{Arg, ClBuffer, Grid, Source};
use crate::dtype::DType;
use crate::error::Result;
use crate::shape::Layout;

static SOURCE: Source = Source { name: "gemm.cl", text: include_str!("../../kernels/gemm.cl") };

/// Rows and columns that a work-item makes.
const EACH: usize = 4;

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
/// the same dimensions before the last two. `b` is of type `b_dtype`, which may be narrow.
pub(crate) fn gemm(
    alpha: f64,
    a: View<'_>,
    (b, b_dtype): (View<'_>, DType),
    beta: f64,
    (c, to): (&ClBuffer, &Layout),
) -> Result<()> {
    let kernel = match b_dtype {
        DType::BF16 => "gemm_bf16",
        DType::F16 => "gemm_f16",
        _ => "gemm_f32",
    };
    let (left, right, out) = (Matrices::of(a.layout), Matrices::of(b.layout), Matrices::of(to));
    let (runtime, tile) = (a.runtime(), a.runtime().tile());
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
    let groups = [out.cols.div_ceil(tile), out.rows.div_ceil(tile), out.batch.shape().numel()];
    let grid = Grid { groups, group: [tile / EACH, tile / EACH, 1] };
    runtime.launch(&SOURCE, kernel, &args, grid)
}
