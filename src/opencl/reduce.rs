//! Sums and maxima over dimensions.

use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats};
use crate::error::Result;
use crate::shape::{Layout, Shape};

static SOURCE: Source = Source { name: "reduce.cl", text: include_str!("../../kernels/reduce.cl") };

/// The layout with the dimensions in `dims` last, and how many elements they have together.
fn reduced_last(layout: &Layout, dims: &[usize]) -> Result<(Layout, usize)> {
    let shape: &Shape = layout.shape();
    let mut order: Vec<usize> = (0..shape.rank()).filter(|d| !dims.contains(d)).collect();
    order.extend((0..shape.rank()).filter(|d| dims.contains(d)));
    Ok((layout.permute(&order)?, dims.iter().map(|&d| shape[d]).product()))
}

/// The elements of the result; a sum over nothing is one.
fn results(shape: &Shape, dims: &[usize]) -> usize {
    (0..shape.rank()).filter(|d| !dims.contains(d)).map(|d| shape[d]).product()
}

/// `factor` times the sum over the dimensions in `dims`.
pub(crate) fn sum(x: View<'_>, dims: &[usize], factor: f64) -> Result<ClBuffer> {
    let (layout, len) = reduced_last(x.layout, dims)?;
    let n = results(x.layout.shape(), dims);
    let y = floats(x.runtime(), n)?;
    let args =
        [Arg::Buffer(x.data), Arg::Walk(&layout), Arg::Buffer(&y), Arg::Size(len), Arg::F32(factor as f32)];
    x.runtime().launch(&SOURCE, "sum", &args, Grid::groups(n))?;
    Ok(y)
}

/// The largest element along the dimensions in `dims`; NaN where there is one.
pub(crate) fn max(x: View<'_>, dims: &[usize]) -> Result<ClBuffer> {
    let (layout, len) = reduced_last(x.layout, dims)?;
    let n = results(x.layout.shape(), dims);
    let y = floats(x.runtime(), n)?;
    let args = [Arg::Buffer(x.data), Arg::Walk(&layout), Arg::Buffer(&y), Arg::Size(len)];
    x.runtime().launch(&SOURCE, "max_of", &args, Grid::groups(n))?;
    Ok(y)
}
