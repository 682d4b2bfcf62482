//! Copies, arithmetic and functions of one number.

use std::sync::Arc;

use super::runtime::{Arg, ClBuffer, Grid, Runtime, Source};
use super::{View, floats};
use crate::dtype::DType;
use crate::error::Result;
use crate::shape::{Layout, Shape};

static SOURCE: Source = Source { name: "elementwise.cl", text: include_str!("../../kernels/elementwise.cl") };

/// The elements of `x` one after another.
pub(crate) fn contiguous(x: View<'_>, dtype: DType) -> Result<ClBuffer> {
    let y = x.runtime().buffer(x.numel().saturating_mul(dtype.size()))?;
    copy(x, dtype, &y, &Layout::contiguous(*x.layout.shape()))?;
    Ok(y)
}

/// Copies `x` to where `to` says, as many elements.
pub(crate) fn copy(x: View<'_>, dtype: DType, y: &ClBuffer, to: &Layout) -> Result<()> {
    let kernel = match dtype.size() {
        2 => "copy_16",
        4 => "copy_32",
        _ => "copy_64",
    };
    move_elements(kernel, x, y, to)
}

/// The same, widened to f32.
pub(crate) fn widen(x: View<'_>, dtype: DType, y: &ClBuffer, to: &Layout) -> Result<()> {
    match dtype {
        DType::BF16 => move_elements("widen_bf16", x, y, to),
        DType::F16 => move_elements("widen_f16", x, y, to),
        _ => copy(x, dtype, y, to),
    }
}

fn move_elements(kernel: &'static str, x: View<'_>, y: &ClBuffer, to: &Layout) -> Result<()> {
    let ([x_data, x_layout], n) = (x.strided(), x.numel());
    let args = [x_data, x_layout, Arg::Buffer(y), Arg::Walk(to), Arg::Size(n)];
    x.runtime().launch(&SOURCE, kernel, &args, Grid::items(n))
}

/// `n` times the same number.
pub(crate) fn full(runtime: &Arc<Runtime>, value: f32, n: usize) -> Result<ClBuffer> {
    let y = floats(runtime, n)?;
    fill(&y, value, n)?;
    Ok(y)
}

/// Makes the first `n` elements `value`.
pub(crate) fn fill(y: &ClBuffer, value: f32, n: usize) -> Result<()> {
    let args = [Arg::Buffer(y), Arg::F32(value), Arg::Size(n)];
    y.runtime().launch(&SOURCE, "fill", &args, Grid::items(n))
}

/// The kernel `add`, `sub`, `mul`, `div` or `equal` of two views of one shape.
pub(crate) fn binary(kernel: &'static str, a: View<'_>, b: View<'_>) -> Result<ClBuffer> {
    let (y, n) = (floats(a.runtime(), a.numel())?, a.numel());
    let ([a_data, a_layout], [b_data, b_layout]) = (a.strided(), b.strided());
    let args = [a_data, a_layout, b_data, b_layout, Arg::Buffer(&y), Arg::Size(n)];
    a.runtime().launch(&SOURCE, kernel, &args, Grid::items(n))?;
    Ok(y)
}

/// The function `kernel` with parameter `c`.
pub(crate) fn pointwise(kernel: &'static str, x: View<'_>, c: f64) -> Result<ClBuffer> {
    let (y, n) = (floats(x.runtime(), x.numel())?, x.numel());
    let [data, layout] = x.strided();
    let args = [data, layout, Arg::F32(c as f32), Arg::Buffer(&y), Arg::Size(n)];
    x.runtime().launch(&SOURCE, kernel, &args, Grid::items(n))?;
    Ok(y)
}

/// dy times the function's derivative, which reads `v`. `kernel` ends in `_vjp`.
pub(crate) fn pointwise_vjp(kernel: &'static str, v: View<'_>, dy: View<'_>, c: f64) -> Result<ClBuffer> {
    let (dx, n) = (floats(dy.runtime(), dy.numel())?, dy.numel());
    let ([v_data, v_layout], [dy_data, dy_layout]) = (v.strided(), dy.strided());
    let args = [v_data, v_layout, dy_data, dy_layout, Arg::F32(c as f32), Arg::Buffer(&dx), Arg::Size(n)];
    dy.runtime().launch(&SOURCE, kernel, &args, Grid::items(n))?;
    Ok(dx)
}

/// a += x, where a's elements lie one after another.
pub(crate) fn add_in_place(a: View<'_>, x: View<'_>) -> Result<()> {
    let ([a_data, a_at], [x_data, x_layout], n) = (a.in_order(), x.strided(), a.numel());
    let args = [a_data, a_at, x_data, x_layout, Arg::Size(n)];
    a.runtime().launch(&SOURCE, "add_in_place", &args, Grid::items(n))
}

/// a *= factor, as above.
pub(crate) fn scale_in_place(a: View<'_>, factor: f64) -> Result<()> {
    let ([a_data, a_at], n) = (a.in_order(), a.numel());
    let args = [a_data, a_at, Arg::F32(factor as f32), Arg::Size(n)];
    a.runtime().launch(&SOURCE, "scale_in_place", &args, Grid::items(n))
}

/// Tensors, one at least, side by side along `dim`, in a buffer of the given shape.
pub(crate) fn concat(parts: &[View<'_>], dtype: DType, dim: usize, shape: &Shape) -> Result<ClBuffer> {
    let y = parts[0].runtime().buffer(shape.numel().saturating_mul(dtype.size()))?;
    let (layout, mut from) = (Layout::contiguous(*shape), 0);
    for part in parts {
        let to = from + part.layout.shape()[dim];
        copy(*part, dtype, &y, &layout.slice(dim, from..to)?)?;
        from = to;
    }
    Ok(y)
}

/// Zeros of the given shape with `x` in part `range` of dimension `dim`. f32 only.
pub(crate) fn put(x: View<'_>, shape: &Shape, dim: usize, range: std::ops::Range<usize>) -> Result<ClBuffer> {
    let y = full(x.runtime(), 0.0, shape.numel())?;
    copy(x, DType::F32, &y, &Layout::contiguous(*shape).slice(dim, range)?)?;
    Ok(y)
}
