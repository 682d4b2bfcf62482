//! Softmax and its logarithm.

use crate::compute;
use crate::cpu::reduce::{Max, Sum, fold_row, fold_zip};
use crate::cpu::{Float, dispatch, rows};
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::tensor::Tensor;

/// Along one dimension y_j = e^x_j / Σ_k e^x_k, or ln y_j. With m = max x the same is
/// e^(x_j − m) / Σ_k e^(x_k − m), where nothing overflows.
///
/// From ∂y_j/∂x_i = y_j·(\[i = j\] − y_i): **dx = y ∘ (dy − Σ_j y_j·dy_j)**.
/// For z = ln y from ∂z_j/∂x_i = \[i = j\] − y_i: **dx = dz − e^z·Σ_j dz_j**.
#[derive(Debug)]
struct Softmax {
    dim: usize,
    log: bool,
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        if self.log { "log_softmax" } else { "softmax" }
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        x[0].shape().check_dim(self.dim, self.name())?;
        let x = lines(x[0], self.dim)?;
        if x.is_on_opencl() {
            let y = opencl::softmax::forward(self.name(), x.cl()?)?;
            let y = Tensor::from_cl(y, x.dtype(), *x.shape(), x.device());
            return Ok((back(&y, self.dim)?, vec![]));
        }
        let y = dispatch!(self.name(), x.dtype(), T => match self.log {
            false => on_lines::<T, 1>([&x], #[inline(always)] |[x], y| softmax(x, y)),
            true => on_lines::<T, 1>([&x], #[inline(always)] |[x], y| log_softmax(x, y)),
        })?;
        Ok((back(&y, self.dim)?, vec![]))
    }

    fn vjp(
        &self,
        _: &[&Tensor],
        y: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let (y, dy) = (lines(y, self.dim)?, lines(dy, self.dim)?);
        if dy.is_on_opencl() {
            let kernel = if self.log { "log_softmax_vjp" } else { "softmax_vjp" };
            let dx = opencl::softmax::vjp(kernel, y.cl()?, dy.cl()?)?;
            let dx = Tensor::from_cl(dx, dy.dtype(), *dy.shape(), dy.device());
            return Ok(vec![Some(back(&dx, self.dim)?)]);
        }
        let dx = dispatch!(self.name(), dy.dtype(), T => match self.log {
            false => on_lines::<T, 2>([&y, &dy], #[inline(always)] |[y, dy], dx| softmax_vjp(y, dy, dx)),
            true => on_lines::<T, 2>([&y, &dy], #[inline(always)] |[y, dy], dx| log_softmax_vjp(y, dy, dx)),
        })?;
        Ok(vec![Some(back(&dx, self.dim)?)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::OUTPUT
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

/// `x` with dimension `dim` as the last one, in order in memory.
fn lines(x: &Tensor, dim: usize) -> Result<Tensor> {
    let mut order: Vec<usize> = (0..x.rank()).filter(|&d| d != dim).collect();
    order.push(dim);
    compute::contiguous(&x.with_layout(x.layout().permute(&order)?))
}

/// `y` with its last dimension as dimension `dim`: a view.
fn back(y: &Tensor, dim: usize) -> Result<Tensor> {
    let last = y.rank() - 1;
    let mut order: Vec<usize> = (0..last).collect();
    order.insert(dim, last);
    Ok(y.with_layout(y.layout().permute(&order)?))
}

/// f of each line along the last dimension of tensors of one shape.
fn on_lines<T: Float, const N: usize>(
    x: [&Tensor; N],
    f: impl Fn([&[T]; N], &mut [T]) + Sync + Copy,
) -> Result<Tensor> {
    let (shape, device) = (*x[0].shape(), x[0].device());
    let mut out = device.host().buffer::<T>(shape.numel())?;
    let mut slices: [&[T]; N] = [&[]; N];
    for (slice, x) in slices.iter_mut().zip(x) {
        *slice = x.elements::<T>()?;
    }
    let lines = shape[..shape.rank() - 1].iter().product();
    rows::map(
        slices,
        &mut out,
        lines,
        4,
        #[inline(always)]
        |_, x, out| f(x, out),
    );
    Ok(Tensor::from_buffer(out, shape, device))
}

/// What to subtract before the exponential: the maximum, but 0 where all are −∞ (−∞ − −∞ is NaN).
#[inline(always)]
fn shift<T: Float>(x: &[T]) -> T {
    let max = fold_row(x, Max);
    if max == T::from_f64(f64::NEG_INFINITY) { T::ZERO } else { max }
}

#[inline(always)]
fn softmax<T: Float>(x: &[T], y: &mut [T]) {
    let shift = shift(x);
    for (y, &x) in y.iter_mut().zip(x) {
        *y = (x - shift).exp();
    }
    let sum = fold_row(y, Sum);
    let scale = if sum == T::ZERO { T::ZERO } else { T::ONE / sum };
    for y in y.iter_mut() {
        *y = *y * scale;
    }
}

#[inline(always)]
fn softmax_vjp<T: Float>(y: &[T], dy: &[T], dx: &mut [T]) {
    let mean = fold_zip(y, dy, Sum, |y, dy| y * dy);
    for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
        *dx = y * (dy - mean);
    }
}

#[inline(always)]
fn log_softmax<T: Float>(x: &[T], y: &mut [T]) {
    let shift = shift(x);
    let sum = fold_zip(
        x,
        x,
        Sum,
        #[inline(always)]
        |x, _| (x - shift).exp(),
    );
    let log = if sum == T::ZERO { T::ZERO } else { sum.ln() };
    for (y, &x) in y.iter_mut().zip(x) {
        *y = (x - shift) - log;
    }
}

#[inline(always)]
fn log_softmax_vjp<T: Float>(y: &[T], dy: &[T], dx: &mut [T]) {
    let sum = fold_row(dy, Sum);
    for ((dx, &y), &dy) in dx.iter_mut().zip(y).zip(dy) {
        *dx = dy - y.exp() * sum;
    }
}

impl Tensor {
    /// eˣ over its sum along dimension `dim`: positive numbers that sum to 1 there.
    ///
    /// −∞ (a masked place) gives 0. Where all places are −∞ there is no distribution: all become 0,
    /// with a gradient of 0. A NaN or +∞ makes its whole line NaN.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![1000f32, 1000.0, f32::NEG_INFINITY], [3], &Device::cpu())?;
    /// assert_eq!(x.softmax(0)?.to_vec::<f32>()?, [0.5, 0.5, 0.0]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) where there is no such dimension,
    /// [`Error::DType`](crate::Error::DType) for a type that only stores.
    pub fn softmax(&self, dim: usize) -> Result<Tensor> {
        apply(Softmax { dim, log: false }, &[self])
    }

    /// The logarithm of [`Tensor::softmax`], exact also where that is too small for a number. −∞
    /// stays −∞, also where all are. Errors as for [`Tensor::softmax`].
    pub fn log_softmax(&self, dim: usize) -> Result<Tensor> {
        apply(Softmax { dim, log: true }, &[self])
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::{Case, Domain};
    fn naive(x: &Naive, dim: usize) -> Naive {
        Naive::build(&x.dims, |i| {
            let mut at = i.to_vec();
            let sum: f64 = (0..x.dims[dim])
                .map(|k| {
                    at[dim] = k;
                    x.at(&at).exp()
                })
                .sum();
            x.at(i).exp() / sum
        })
    }
    // In single short lines the differences that the gradient is made of may vanish, and f32 then
    // shows only rounding; the cases of fixed size keep the default tolerance.
    let case = |name, inputs, run: fn(&Tensor) -> Result<Tensor>, twin: fn(&Naive) -> Naive| {
        Case::new(name, inputs, move |x| run(x[0]), move |x| twin(&x[0])).domain(Domain::Positive)
    };
    vec![
        case("softmax", &["a b c"], |x| x.softmax(2), |x| naive(x, 2)).f32_tolerance(1e-3),
        case("softmax, middle", &["a b c"], |x| x.softmax(1), |x| naive(x, 1)).f32_tolerance(1e-3),
        case("softmax, first", &["a b"], |x| x.softmax(0), |x| naive(x, 0)).f32_tolerance(1e-3),
        case("softmax, one line", &["7"], |x| x.softmax(0), |x| naive(x, 0)),
        case(
            "softmax, long lines",
            &["9 2100"],
            |x| x.softmax(1),
            |x| {
                x.lines(|x| {
                    let sum: f64 = x.iter().map(|x| x.exp()).sum();
                    x.iter().map(|x| x.exp() / sum).collect()
                })
            },
        ),
        case("log_softmax", &["a b c"], |x| x.log_softmax(2), |x| naive(x, 2).map(f64::ln))
            .f32_tolerance(1e-3),
        case("log_softmax, first", &["a b c"], |x| x.log_softmax(0), |x| naive(x, 0).map(f64::ln))
            .f32_tolerance(1e-3),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    const NONE: f32 = f32::NEG_INFINITY;

    fn tensor(data: &[f32]) -> Tensor {
        Tensor::from_slice(data, [data.len()], &Device::cpu()).unwrap()
    }

    #[test]
    fn large_numbers_do_not_overflow() {
        let x = tensor(&[3e38, -3e38, 3e38]);
        assert_eq!(x.softmax(0).unwrap().to_vec::<f32>().unwrap(), [0.5, 0.0, 0.5]);
        assert_eq!(tensor(&[0.0, -1e4]).log_softmax(0).unwrap().to_vec::<f32>().unwrap(), [0.0, -1e4]);
    }

    #[test]
    fn masked_places() {
        let x = tensor(&[NONE, 2.0, NONE]).track();
        let y = x.softmax(0).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [0.0, 1.0, 0.0]);
        let dx = y.backward_from(&tensor(&[1.0, 2.0, 3.0])).unwrap().of(&x).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(dx, [0.0; 3]);
        assert_eq!(x.log_softmax(0).unwrap().to_vec::<f32>().unwrap(), [NONE, 0.0, NONE]);
    }

    #[test]
    fn nothing_but_masked_places() {
        let x = tensor(&[NONE; 3]).track();
        let y = x.softmax(0).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [0.0; 3]);
        let dx = y.backward_from(&tensor(&[1.0, 2.0, 3.0])).unwrap().of(&x).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(dx, [0.0; 3]);
        assert_eq!(x.log_softmax(0).unwrap().to_vec::<f32>().unwrap(), [NONE; 3]);
    }

    #[test]
    fn nan_is_kept_in_its_line() {
        let x = Tensor::from_vec(vec![1.0, f32::NAN, 1.0, 1.0], [2, 2], &Device::cpu()).unwrap();
        let y = x.softmax(1).unwrap().to_vec::<f32>().unwrap();
        assert!(y[0].is_nan() && y[1].is_nan());
        assert_eq!(y[2..], [0.5, 0.5]);
    }

    #[test]
    fn a_missing_dimension_is_an_error() {
        let error = tensor(&[1.0]).softmax(1).unwrap_err();
        assert_eq!(error.to_string(), "softmax: [1] has no dimension 1; it has 1");
    }
}
