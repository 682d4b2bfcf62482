//! Layer norm and RMS norm.

use crate::compute;
use crate::cpu::reduce::{Sum, fold_row, fold_zip};
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, dispatch, parallel, rows};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Rows of x (the last dimension, d elements) brought to mean 0 and variance 1, then scaled and
/// shifted: y = x̂ ∘ w + b with x̂ = (x − μ)/σ, μ = Σ x/d, σ² = Σ (x − μ)²/d + ε.
/// RMS norm is the same with μ = 0.
///
/// Inputs: x (…, d), and w (d) and b (d) if there are any. Write g = dy ∘ w for dL/dx̂ and ⟨·⟩ for
/// the mean over a row. From dσ = ⟨(x − μ)·dx⟩/σ and dμ = ⟨dx⟩:
/// **dx = (g − ⟨g⟩ − x̂·⟨g·x̂⟩)/σ**, without the term ⟨g⟩ where μ is fixed at 0.
/// Over all rows **dw = Σ dy ∘ x̂** and **db = Σ dy**.
///
/// The vjp takes μ and σ from x again: the row is in the cache anyway, and nothing is saved.
#[derive(Clone, Copy, Debug)]
struct Norm {
    centred: bool,
    eps: f64,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        if self.centred { "layer_norm" } else { "rms_norm" }
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        self.check(x)?;
        if x[0].is_on_opencl() {
            let rows = compute::contiguous(x[0])?;
            let b = x.get(2).map(|b| b.cl()).transpose()?;
            let y = self.rows(&rows)?.forward(weight(x)?.cl()?, b)?;
            return Ok((Tensor::from_cl(y, rows.dtype(), *rows.shape(), rows.device()), vec![]));
        }
        let y = dispatch!(self.name(), x[0].dtype(), T => self.y::<T>(x))?;
        Ok((y, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let needs = |i: usize| need.get(i).copied().unwrap_or(false);
        let dy = compute::contiguous(dy)?;
        if dy.is_on_opencl() {
            let result = |data| Tensor::from_cl(data, dy.dtype(), *dy.shape(), dy.device());
            let dx = || self.rows(&compute::contiguous(x[0])?)?.dx(weight(x)?.cl()?, dy.cl()?);
            // The engine sums both of these over the rows.
            let dw = || self.rows(&compute::contiguous(x[0])?)?.dw(dy.cl()?);
            return Ok(vec![
                needs(0).then(dx).transpose()?.map(result),
                needs(1).then(dw).transpose()?.map(result),
                needs(2).then(|| dy.clone()),
            ]);
        }
        dispatch!(self.name(), dy.dtype(), T => Ok(vec![
            needs(0).then(|| self.dx::<T>(x, &dy)).transpose()?,
            needs(1).then(|| self.dw::<T>(x[0], &dy)).transpose()?,
            // The engine sums it over the rows.
            needs(2).then(|| dy.clone()),
        ]))
    }

    fn saves(&self, need: &[bool]) -> Saves {
        let weight = need.get(1).copied().unwrap_or(false);
        Saves::inputs(&[0]).when(need[0] || weight).and(Saves::inputs(&[1]).when(need[0]))
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

impl Norm {
    /// The rows on an OpenCL device.
    fn rows<'a>(&self, x: &'a Tensor) -> Result<opencl::norm::Rows<'a>> {
        Ok(opencl::norm::Rows { x: x.cl()?, centred: self.centred, eps: self.eps })
    }

    fn check(&self, x: &[&Tensor]) -> Result<()> {
        if self.eps.is_nan() || self.eps < 0.0 {
            return Err(Error::config(
                "eps",
                format!("{} is added to a variance: it must not be negative", self.eps),
            ));
        }
        for (vector, what) in x[1..].iter().zip(["weight", "bias"]) {
            compute::same_dtype(self.name(), x[0], vector)?;
            check_vector(self.name(), x[0], vector, what)?;
        }
        width(self.name(), x[0]).map(|_| ())
    }

    /// μ and 1/σ of a row, in two passes: no difference of large squares.
    #[inline(always)]
    fn statistics<T: Float>(self, x: &[T]) -> (T, T) {
        let n = T::from_f64(x.len() as f64);
        let mean = if self.centred { fold_row(x, Sum) / n } else { T::ZERO };
        let variance = fold_zip(x, x, Sum, |x, _| (x - mean) * (x - mean)) / n;
        (mean, T::ONE / (variance + T::from_f64(self.eps)).sqrt())
    }

    #[inline(always)]
    fn row<T: Float>(self, x: &[T], w: &[T], b: Option<&[T]>, y: &mut [T]) {
        let (mean, scale) = self.statistics(x);
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = (x - mean) * scale * w;
        }
        if let Some(b) = b {
            y.iter_mut().zip(b).for_each(|(y, &b)| *y += b);
        }
    }

    #[inline(always)]
    fn row_vjp<T: Float>(self, x: &[T], w: &[T], dy: &[T], dx: &mut [T]) {
        let (mean, scale) = self.statistics(x);
        let n = T::from_f64(x.len() as f64);
        // Until the last loop dx holds g.
        for ((g, &dy), &w) in dx.iter_mut().zip(dy).zip(w) {
            *g = dy * w;
        }
        let mean_g = if self.centred { fold_row(dx, Sum) / n } else { T::ZERO };
        let mean_gx = fold_zip(dx, x, Sum, |g, x| g * ((x - mean) * scale)) / n;
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = scale * (*dx - mean_g - (x - mean) * scale * mean_gx);
        }
    }

    fn y<T: Float>(self, inputs: &[&Tensor]) -> Result<Tensor> {
        let (x, w) = (compute::contiguous(inputs[0])?, weight(inputs)?);
        let b = inputs.get(2).map(|b| compute::contiguous(b)).transpose()?;
        let (w, b) = (w.elements::<T>()?, b.as_ref().map(|b| b.elements::<T>()).transpose()?);
        let mut y = x.device().host().buffer::<T>(x.numel())?;
        rows::map(
            [x.elements()?],
            &mut y,
            outer(&x),
            2,
            #[inline(always)]
            |_, [x], y| self.row(x, w, b, y),
        );
        Ok(Tensor::from_buffer(y, *x.shape(), x.device()))
    }

    fn dx<T: Float>(self, inputs: &[&Tensor], dy: &Tensor) -> Result<Tensor> {
        let (x, w) = (compute::contiguous(inputs[0])?, weight(inputs)?);
        let w = w.elements::<T>()?;
        let mut dx = x.device().host().buffer::<T>(x.numel())?;
        let slices = [x.elements()?, dy.elements()?];
        rows::map(
            slices,
            &mut dx,
            outer(&x),
            4,
            #[inline(always)]
            |_, [x, dy], dx| self.row_vjp(x, w, dy, dx),
        );
        Ok(Tensor::from_buffer(dx, *x.shape(), x.device()))
    }

    /// Chunks of a constant number of rows, whose sums are then added in order.
    fn dw<T: Float>(self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (x, device) = (compute::contiguous(x)?, dy.device());
        let width = width(self.name(), &x)?;
        let mut dw = device.host().buffer::<T>(width)?;
        dw.fill(T::ZERO);
        let rows_at_once = (64 * 1024 / width.max(1)).clamp(64, 1024);
        let mut parts = device.host().scratch::<T>(outer(&x).div_ceil(rows_at_once) * width)?;
        let size = rows_at_once * width;
        let (x, dy) = (x.elements::<T>()?, dy.elements::<T>()?);
        parallel::chunks(&mut parts, width.max(1), &|i, dw| {
            let chunk = i * size..x.len().min((i + 1) * size);
            vectorize(WeightGradient { norm: self, x: &x[chunk.clone()], dy: &dy[chunk], dw });
        });
        for part in parts.chunks(width.max(1)) {
            dw.iter_mut().zip(part).for_each(|(dw, &part)| *dw += part);
        }
        Ok(Tensor::from_buffer(dw, Shape::new(&[width])?, device))
    }
}

/// dw = Σ dy ∘ x̂ over the rows given.
struct WeightGradient<'a, T> {
    norm: Norm,
    x: &'a [T],
    dy: &'a [T],
    dw: &'a mut [T],
}

impl<T: Float> Kernel for WeightGradient<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let WeightGradient { norm, x, dy, dw } = self;
        dw.fill(T::ZERO);
        for (x, dy) in x.chunks(dw.len()).zip(dy.chunks(dw.len())) {
            let (mean, scale) = norm.statistics(x);
            for ((dw, &x), &dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += dy * ((x - mean) * scale);
            }
        }
    }
}

/// The size of the last dimension.
fn width(op: &'static str, x: &Tensor) -> Result<usize> {
    let none = || Error::shape(op, "a single number has no last dimension to normalise over");
    x.dims().last().copied().ok_or_else(none)
}

/// The number of rows.
fn outer(x: &Tensor) -> usize {
    x.dims().split_last().map_or(1, |(_, outer)| outer.iter().product())
}

fn check_vector(op: &'static str, x: &Tensor, vector: &Tensor, what: &str) -> Result<()> {
    let width = width(op, x)?;
    if vector.dims() != [width] {
        let message = format!("the {what} is {} where {} needs [{width}]", vector.shape(), x.shape());
        return Err(Error::shape(op, message));
    }
    Ok(())
}

/// The weight; ones where there is none.
fn weight(inputs: &[&Tensor]) -> Result<Tensor> {
    match inputs.get(1) {
        Some(weight) => compute::contiguous(weight),
        None => Tensor::ones(
            [inputs[0].dims().last().copied().unwrap_or(1)],
            inputs[0].dtype(),
            inputs[0].device(),
        ),
    }
}

impl Tensor {
    /// Every line along the last dimension brought to mean 0 and variance 1, then multiplied by
    /// `weight` and shifted by `bias`, which have the size of that dimension. `eps` is added to the
    /// variance, so that a constant line becomes 0 (with an `eps` of 0 it becomes NaN).
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![1f32, 3.0, 10.0, 30.0], [2, 2], &Device::cpu())?;
    /// assert_eq!(x.layer_norm(None, None, 0.0)?.to_vec::<f32>()?, [-1.0, 1.0, -1.0, 1.0]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] where weight or bias do not fit, [`Error::DType`] where types differ or only
    /// store, [`Error::Config`] for a negative `eps`.
    pub fn layer_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let norm = Norm { centred: true, eps };
        match (weight, bias) {
            (None, None) => apply(norm, &[self]),
            (Some(weight), None) => apply(norm, &[self, weight]),
            (Some(weight), Some(bias)) => apply(norm, &[self, weight, bias]),
            (None, Some(bias)) => {
                check_vector("layer_norm", self, bias, "bias")?;
                apply(norm, &[self])?.add(bias)
            }
        }
    }

    /// Every line along the last dimension divided by its root mean square, then multiplied by
    /// `weight`, which has the size of that dimension. `eps` is added to the mean square.
    /// Errors as for [`Tensor::layer_norm`].
    pub fn rms_norm(&self, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let norm = Norm { centred: false, eps };
        match weight {
            None => apply(norm, &[self]),
            Some(weight) => apply(norm, &[self, weight]),
        }
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::{Case, Domain};
    // Not small: at a width of 2 the gradient of x vanishes with it, and f32 sees only rounding.
    const EPS: f64 = 0.1;
    fn normed(x: &Naive, centred: bool) -> Naive {
        x.lines(|x| {
            let n = x.len() as f64;
            let mean = if centred { x.iter().sum::<f64>() / n } else { 0.0 };
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            x.iter().map(|x| (x - mean) / (variance + EPS).sqrt()).collect()
        })
    }
    fn affine(x: &[Naive], centred: bool) -> Naive {
        let mut y = normed(&x[0], centred);
        if let Some(w) = x.get(1) {
            y = y.zip(w, |y, w| y * w);
        }
        if let Some(b) = x.get(2) {
            y = y.zip(b, |y, b| y + b);
        }
        y
    }
    // In single short lines the differences that the gradient is made of may vanish, and f32 then
    // shows only rounding; the cases of fixed size keep the default tolerance.
    let case = |name, inputs, centred, run: fn(&[&Tensor]) -> Result<Tensor>| {
        Case::new(name, inputs, run, move |x| affine(x, centred)).domain(Domain::Positive)
    };
    vec![
        case("layer_norm", &["a b c", "c", "c"], true, |x| x[0].layer_norm(Some(x[1]), Some(x[2]), EPS))
            .f32_tolerance(1e-3),
        case("layer_norm, no bias", &["a b c", "c"], true, |x| x[0].layer_norm(Some(x[1]), None, EPS))
            .f32_tolerance(1e-3),
        case("layer_norm, plain", &["a b"], true, |x| x[0].layer_norm(None, None, EPS)).f32_tolerance(1e-3),
        case("layer_norm, a vector", &["7", "7"], true, |x| x[0].layer_norm(Some(x[1]), None, EPS)),
        case("layer_norm, many rows", &["1500 3", "3", "3"], true, |x| {
            x[0].layer_norm(Some(x[1]), Some(x[2]), EPS)
        })
        // dw sums 1500 terms of either sign.
        .f32_tolerance(1e-4),
        Case::new(
            "layer_norm, no weight",
            &["a c", "c"],
            |x| x[0].layer_norm(None, Some(x[1]), EPS),
            |x| normed(&x[0], true).zip(&x[1], |y, b| y + b),
        )
        .domain(Domain::Positive)
        .f32_tolerance(1e-3),
        case("rms_norm", &["a b c", "c"], false, |x| x[0].rms_norm(Some(x[1]), EPS)).f32_tolerance(1e-3),
        case("rms_norm, plain", &["a b"], false, |x| x[0].rms_norm(None, EPS)).f32_tolerance(1e-3),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::dtype::DType;

    #[test]
    fn a_large_mean_costs_no_digits() {
        let x = Tensor::from_vec(vec![4e6f32, 4e6 + 2.0], [2], &Device::cpu()).unwrap();
        let y = x.layer_norm(None, None, 0.0).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [-1.0, 1.0]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let device = Device::cpu();
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &device).unwrap();
        let (x, w) = (zeros(&[2, 3]), zeros(&[2]));
        let error = x.layer_norm(Some(&w), None, 1e-5).unwrap_err();
        assert_eq!(error.to_string(), "layer_norm: the weight is [2] where [2, 3] needs [3]");
        assert!(x.layer_norm(None, Some(&zeros(&[2, 3])), 1e-5).is_err());
        assert!(x.rms_norm(Some(&zeros(&[3]).to_dtype(DType::F64).unwrap()), 1e-5).is_err());
        assert!(zeros(&[]).rms_norm(None, 1e-5).is_err());
        assert!(x.rms_norm(None, -1.0).is_err() && x.rms_norm(None, f64::NAN).is_err());
        assert_eq!(x.layer_norm(None, None, 1e-5).unwrap().to_vec::<f32>().unwrap(), [0.0; 6]);
    }
}
