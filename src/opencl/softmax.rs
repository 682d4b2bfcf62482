//! Softmax and its logarithm along lines of elements that lie one after another.

use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats};
use crate::error::Result;

static SOURCE: Source = Source { name: "softmax.cl", text: include_str!("../../kernels/softmax.cl") };

/// The lines along the last dimension: their number and their length.
fn lines(x: &View<'_>) -> (usize, usize) {
    let (&len, outer) = x.layout.shape().dims().split_last().unwrap_or((&1, &[]));
    (outer.iter().product(), len)
}

/// The kernel `softmax` or `log_softmax`.
pub(crate) fn forward(kernel: &'static str, x: View<'_>) -> Result<ClBuffer> {
    let ((n, len), y) = (lines(&x), floats(x.runtime(), x.numel())?);
    let [x_data, x_at] = x.in_order();
    x.runtime().launch(&SOURCE, kernel, &[x_data, x_at, Arg::Buffer(&y), Arg::Size(len)], Grid::groups(n))?;
    Ok(y)
}

/// The kernel `softmax_vjp` or `log_softmax_vjp`.
pub(crate) fn vjp(kernel: &'static str, y: View<'_>, dy: View<'_>) -> Result<ClBuffer> {
    let ((n, len), dx) = (lines(&dy), floats(dy.runtime(), dy.numel())?);
    let ([y_data, y_at], [dy_data, dy_at]) = (y.in_order(), dy.in_order());
    let args = [y_data, y_at, dy_data, dy_at, Arg::Buffer(&dx), Arg::Size(len)];
    dy.runtime().launch(&SOURCE, kernel, &args, Grid::groups(n))?;
    Ok(dx)
}
