//! The affine map of a layer, whose frozen weight may be stored in a narrow type.

use crate::compute;
use crate::cpu::elementwise::{self, View};
use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::cpu::{Float, dispatch};
use crate::dtype::{BF16, DType, F16};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::ops::matmul::view;
use crate::shape::{Layout, Shape};
use crate::storage::Stored;
use crate::tensor::Tensor;

/// y = x·Wᵀ + b.
///
/// x: … in, W: out×in, b: out, y: … out; the dimensions of x before the last count as one, t.
/// From y_to = Σ_i x_ti·W_oi + b_o: dx_ti = Σ_o dy_to·W_oi, so **dx = dy·W**; dW_oi = Σ_t dy_to·x_ti,
/// so **dW = dyᵀ·x**; and **db = Σ_t dy_t**, which is dy summed by the engine over what b was
/// broadcast along.
#[derive(Debug)]
struct Linear;

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (x, w, bias) = (x[0], x[1], x.get(2));
        let outputs = check("linear", x, w, bias.copied())?;
        let shape = x.shape().with_dim(x.rank() - 1, outputs)?;
        let rows = compute::rows(x)?;
        if x.is_on_opencl() {
            return Ok((compute::reshape(&cl_affine(&rows, w, bias.copied())?, shape)?, vec![]));
        }
        let y = dispatch!("linear", x.dtype(), T => {
            let mut y = x.device().host().buffer::<T>(shape.numel())?;
            let x = view::<T>(&rows)?;
            let bias = bias.map(|bias| compute::contiguous(bias)).transpose()?;
            frozen_forward(x, w, MatMut::new(&mut y, x.rows, outputs), onto_bias(bias.as_ref())?)?;
            Ok(Tensor::from_buffer(y, shape, rows.device()))
        })?;
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
        let (x, w) = (x[0], x[1]);
        let dy_rows = compute::rows(dy)?;
        if dy.is_on_opencl() {
            let dx = || compute::reshape(&cl_product(1.0, &dy_rows, w)?, *x.shape());
            let dw = || cl_product(1.0, &compute::transpose(&dy_rows)?, &compute::rows(x)?);
            let mut gradients = vec![need[0].then(dx).transpose()?, need[1].then(dw).transpose()?];
            gradients.extend((need.get(2) == Some(&true)).then(|| Some(dy.clone())));
            return Ok(gradients);
        }
        let dx = || {
            dispatch!("linear", dy.dtype(), T => {
                let mut dx = dy.device().host().buffer::<T>(x.numel())?;
                let dy = view::<T>(&dy_rows)?;
                frozen_backward(dy, w, MatMut::new(&mut dx, dy.rows, w.dims()[1]), T::ZERO)?;
                Ok(Tensor::from_buffer(dx, *x.shape(), x.device()))
            })
        };
        let dw =
            || dispatch!("linear", dy.dtype(), T => weight_gradient::<T>(&dy_rows, &compute::rows(x)?, w));
        let mut gradients = vec![need[0].then(dx).transpose()?, need[1].then(dw).transpose()?];
        if need.get(2) == Some(&true) {
            gradients.push(Some(dy.clone()));
        }
        Ok(gradients)
    }

    fn saves(&self, need: &[bool]) -> Saves {
        Saves::inputs(&[1]).when(need[0]).and(Saves::inputs(&[0]).when(need[1]))
    }

    /// The weight may be narrow: it is widened as it is read.
    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        has_cl_kernel(x)
    }
}

/// Whether a layer with the weight as its second input, which may be narrow, has a kernel on OpenCL devices.
pub(super) fn has_cl_kernel(x: &[&Tensor]) -> bool {
    x[1].dtype() != DType::F64 && x.iter().enumerate().all(|(i, x)| i == 1 || x.dtype() == DType::F32)
}

/// What a layer's output is put onto: its bias, whose numbers lie one after another.
pub(super) fn onto_bias<T: Float>(bias: Option<&Tensor>) -> Result<Onto<'_, T>> {
    Ok(match bias {
        Some(bias) => Onto::Row(bias.elements::<T>()?),
        None => Onto::NOTHING,
    })
}

/// x·Wᵀ + b for rows on an OpenCL device and a weight of any stored type but f64.
pub(crate) fn cl_affine(rows: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let transposed = compute::transpose(w)?;
    let Some(bias) = bias else { return cl_product(1.0, rows, &transposed) };
    let y = cl_rows_of(bias, rows.dims()[0])?;
    opencl::gemm::gemm(1.0, rows.cl()?, (transposed.cl()?, w.dtype()), 1.0, (y.cl()?.data, y.layout()))?;
    Ok(y)
}

/// So many rows, all equal to `row`, in a buffer of their own on an OpenCL device.
pub(crate) fn cl_rows_of(row: &Tensor, count: usize) -> Result<Tensor> {
    let shape = Shape::new(&[count, row.numel()])?;
    let spread = row.with_layout(row.layout().broadcast_to(&shape, "linear")?);
    let y = opencl::elementwise::contiguous(spread.cl()?, DType::F32)?;
    Ok(Tensor::from_cl(y, DType::F32, shape, row.device()))
}

/// alpha·a·b for matrices on an OpenCL device, b of any stored type but f64.
pub(crate) fn cl_product(alpha: f64, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let shape = Shape::new(&[a.dims()[0], b.dims()[1]])?;
    let y = opencl::floats(a.cl()?.data.runtime(), shape.numel())?;
    opencl::gemm::gemm(alpha, a.cl()?, (b.cl()?, b.dtype()), 0.0, (&y, &Layout::contiguous(shape)))?;
    Ok(Tensor::from_cl(y, DType::F32, shape, a.device()))
}

/// dyᵀ·x, in the shape of w.
pub(super) fn weight_gradient<T: Float>(dy: &Tensor, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut dw = w.device().host().buffer::<T>(w.numel())?;
    let to = MatMut::new(&mut dw, w.dims()[0], w.dims()[1]);
    T::layer_gemm(w.device().host(), T::ONE, view::<T>(dy)?.t(), view(x)?, Onto::NOTHING, to)?;
    Ok(Tensor::from_buffer(dw, *w.shape(), w.device()))
}

/// The number of outputs, if all fits together.
pub(super) fn check(op: &'static str, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<usize> {
    let &[outputs, inputs] = w.dims() else {
        return Err(Error::shape(op, format!("the weight is {}, not (out, in)", w.shape())));
    };
    match x.dims().last() {
        Some(&width) if width == inputs => {}
        Some(&width) => {
            let hint = if width == outputs { "; did you mean weight.t()?" } else { "" };
            let message = format!(
                "{} does not end in the {inputs} inputs of the weight {}{hint}",
                x.shape(),
                w.shape()
            );
            return Err(Error::shape(op, message));
        }
        None => {
            return Err(Error::shape(op, "a number has no features: give x at least one dimension"));
        }
    }
    if let Some(bias) = bias {
        compute::same_dtype(op, x, bias)?;
        if bias.dims() != [outputs] {
            let message =
                format!("the bias is {} where the weight {} wants [{outputs}]", bias.shape(), w.shape());
            return Err(Error::shape(op, message));
        }
    }
    Ok(outputs)
}

/// y ← x·Wᵀ + what it is put onto, for rows x (t×in) and a weight W (out×in) with any strides, in the
/// type of x or stored in bf16 or f16. The sizes must fit.
pub(crate) fn frozen_forward<T: Float>(
    x: Mat<'_, T>,
    w: &Tensor,
    y: MatMut<'_, T>,
    onto: Onto<'_, T>,
) -> Result<()> {
    panels(w, |from, panel| {
        let y = MatMut { data: &mut y.data[..], ..y }.columns(from, panel.rows);
        let onto = onto.columns(from..from + panel.rows);
        T::layer_gemm(w.device().host(), T::ONE, x, panel.t(), onto, y)
    })
}

/// dx ← dy·W + beta·dx, with W as in [`frozen_forward`].
pub(crate) fn frozen_backward<T: Float>(
    dy: Mat<'_, T>,
    w: &Tensor,
    dx: MatMut<'_, T>,
    beta: T,
) -> Result<()> {
    panels(w, |from, panel| {
        let beta = if from == 0 { beta } else { T::ONE };
        let dx = MatMut { data: &mut dx.data[..], ..dx };
        T::layer_gemm(w.device().host(), T::ONE, dy.columns(from, panel.rows), panel, Onto::Itself(beta), dx)
    })
}

/// Elements of a widened panel: 1 MiB in f32. Constant, since the sums of the backward are cut here.
const PANEL: usize = 256 * 1024;

/// Calls `f(from, panel)` for the row panels of a matrix: itself where it is of type T, otherwise
/// a few rows at a time, widened into one scratch buffer. A matrix without rows is one empty panel.
fn panels<T: Float>(w: &Tensor, mut f: impl FnMut(usize, Mat<'_, T>) -> Result<()>) -> Result<()> {
    if w.dtype() == T::DTYPE {
        return f(0, view(w)?);
    }
    let (rows, cols) = (w.dims()[0], w.dims()[1]);
    let at_once = (PANEL / cols.max(1)).max(16).min(rows);
    let mut scratch = w.device().host().scratch::<T>(at_once * cols)?;
    for i in 0..rows.div_ceil(at_once.max(1)).max(1) {
        let from = i * at_once;
        let n = at_once.min(rows - from);
        let panel = &mut scratch[..n * cols];
        let layout = w.layout().slice(0, from..from + n)?;
        match w.dtype() {
            DType::BF16 => widen::<BF16, T>(w, &layout, panel)?,
            DType::F16 => widen::<F16, T>(w, &layout, panel)?,
            other => {
                let message = format!(
                    "a weight in {other} and inputs in {} do not mix: cast one with `to_dtype`",
                    T::DTYPE
                );
                return Err(Error::dtype("linear", message));
            }
        }
        f(from, Mat::new(panel, n, cols))?;
    }
    Ok(())
}

/// The elements of `w` that `layout` names, as T. Exact.
pub(crate) fn widen<S: Stored, T: Float>(w: &Tensor, layout: &Layout, out: &mut [T]) -> Result<()> {
    // The compiler leaves out the way through f64 where T is f32.
    elementwise::map(View { data: w.host::<S>()?, layout }, out, |v| T::from_f64(v.to_f64()));
    Ok(())
}

/// An error where a gradient is wanted for a weight whose type only stores.
pub(crate) fn check_trainable(op: &'static str, w: &Tensor) -> Result<()> {
    if w.is_tracked() && !w.dtype().is_compute() {
        let message = format!(
            "a weight in {} stays frozen: cast it with `to_dtype(DType::F32)` before `track` to train it",
            w.dtype()
        );
        return Err(Error::Frozen { op, message });
    }
    Ok(())
}

impl Tensor {
    /// The affine map self·weightᵀ + bias: (…, in) with a weight (out, in) and a bias (out) gives
    /// (…, out). A frozen weight may be stored as bf16 or f16; it is then widened a panel of rows
    /// at a time.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// # let device = Device::cpu();
    /// let x = Tensor::from_vec(vec![1f32, 2.0], [1, 2], &device)?;
    /// let weight = Tensor::from_vec(vec![1f32, 0.0, 0.0, 1.0, 1.0, 1.0], [3, 2], &device)?;
    /// let bias = Tensor::from_vec(vec![0.5f32, 0.5, 0.5], [3], &device)?;
    /// assert_eq!(x.linear(&weight, Some(&bias))?.to_vec::<f32>()?, [1.5, 2.5, 3.5]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] where the sizes do not fit, [`Error::DType`] where the types differ (but
    /// for a bf16 or f16 weight), [`Error::Frozen`] where a bf16 or f16 weight is tracked.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        check_trainable("linear", weight)?;
        match bias {
            Some(bias) => apply(Linear, &[self, weight, bias]),
            None => apply(Linear, &[self, weight]),
        }
    }
}

/// The same numbers as any stored type's.
#[cfg(test)]
pub(super) fn as_naive(w: &Tensor) -> crate::cpu::naive::Naive {
    let data = w.to_dtype(DType::F64).and_then(|w| w.to_vec()).expect("f64");
    crate::cpu::naive::Naive { dims: w.dims().to_vec(), data }
}

/// A made-up weight of this stored type.
#[cfg(test)]
pub(super) fn stored(rows: usize, cols: usize, dtype: DType) -> Tensor {
    let mut words = vec![0; rows * cols];
    crate::random::words(7, 0, 0, &mut words);
    let values = words.into_iter().map(crate::random::symmetric).collect();
    // Transposed in memory, so that widening walks strides.
    let w = Tensor::from_vec::<f64>(values, [cols, rows], &crate::Device::cpu());
    w.and_then(|w| w.to_dtype(dtype)?.t()).expect("a matrix")
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    let naive = |x: &[Naive]| {
        let (w, inputs) = (&x[1], x[1].dims[1]);
        let mut dims = x[0].dims.clone();
        *dims.last_mut().expect("at least one dimension") = w.dims[0];
        Naive::build(&dims, |i| {
            let (&o, outer) = i.split_last().expect("at least one dimension");
            let dot: f64 = (0..inputs).map(|k| x[0].at(&[outer, &[k]].concat()) * w.at(&[o, k])).sum();
            dot + x.get(2).map_or(0.0, |bias| bias.at(&[o]))
        })
    };
    let with_stored = |name, dtype| {
        let run = move |x: &[&Tensor]| {
            let weight = stored(5, x[0].dims()[1], dtype).to_device(x[0].device())?;
            x[0].linear(&weight, Some(x[1]))
        };
        Case::new(name, &["t n", "5"], run, move |x| {
            naive(&[x[0].clone(), as_naive(&stored(5, x[0].dims[1], dtype)), x[1].clone()])
        })
    };
    vec![
        Case::new("linear", &["a b n", "m n", "m"], |x| x[0].linear(x[1], Some(x[2])), naive),
        Case::new("linear, no bias", &["a n", "m n"], |x| x[0].linear(x[1], None), naive),
        Case::new("linear, one vector", &["n", "m n", "m"], |x| x[0].linear(x[1], Some(x[2])), naive),
        with_stored("linear, bf16 weight", DType::BF16),
        with_stored("linear, f16 weight", DType::F16),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    /// More rows than one panel holds give what the widened weight gives.
    #[test]
    fn panels_make_up_the_whole() -> Result<()> {
        let (t, inputs, outputs) = (3, 4096, 150);
        assert!(PANEL / inputs < outputs / 2);
        for dtype in [DType::BF16, DType::F16] {
            let w = stored(outputs, inputs, dtype);
            let wide = w.to_dtype(DType::F64)?;
            let x = stored(t, inputs, DType::F64).track();
            let dy = stored(t, outputs, DType::F64);
            let run = |w: &Tensor| -> Result<(Vec<f64>, Vec<f64>)> {
                let y = x.linear(w, None)?;
                Ok((y.to_vec()?, y.backward_from(&dy)?.of(&x)?.to_vec()?))
            };
            let (narrow, wide) = (run(&w)?, run(&wide)?);
            for (a, b) in [(narrow.0, wide.0), (narrow.1, wide.1)] {
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-11));
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_an_error() -> Result<()> {
        let device = Device::cpu();
        let tensor = |dims: &[usize], dtype| Tensor::ones(dims, dtype, &device);
        let (x, w) = (tensor(&[2, 3], DType::F32)?, tensor(&[4, 3], DType::F32)?);
        let shape = |r: Result<Tensor>| matches!(r, Err(Error::Shape { .. }));
        assert!(shape(x.linear(&tensor(&[3, 4], DType::F32)?, None)));
        assert!(shape(x.linear(&tensor(&[3], DType::F32)?, None)));
        assert!(shape(tensor(&[], DType::F32)?.linear(&w, None)));
        assert!(shape(x.linear(&w, Some(&tensor(&[3], DType::F32)?))));
        assert!(matches!(x.linear(&tensor(&[4, 3], DType::F64)?, None), Err(Error::DType { .. })));
        assert!(matches!(x.linear(&w, Some(&tensor(&[4], DType::BF16)?)), Err(Error::DType { .. })));
        let half = tensor(&[4, 3], DType::BF16)?;
        assert!(matches!(half.slice(0, 0..2)?.linear(&w, None), Err(Error::DType { .. })));
        let error = x.linear(&half.track(), None).unwrap_err();
        assert!(error.to_string().contains("cast it with `to_dtype(DType::F32)`"), "{error}");
        Ok(())
    }
}
