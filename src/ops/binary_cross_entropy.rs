//! The loss of yes-or-no decisions, each independent of the others.

use crate::compute;
use crate::cpu::reduce::{Sum, fold_zip_parallel};
use crate::cpu::{Float, dispatch};
use crate::dtype::Element;
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::ops::loss::count_pairs;
use crate::tensor::Tensor;

/// y = Σ l(x, t)/n over all n elements of x and t, which have one shape, with the negative
/// log-likelihood l = −t·ln σ(x) − (1 − t)·ln(1 − σ(x)) of t under σ(x) = 1/(1 + e⁻ˣ).
///
/// As −ln σ(x) = ln(1 + e⁻ˣ) and −ln(1 − σ(x)) = x + ln(1 + e⁻ˣ), l = x − x·t + ln(1 + e⁻ˣ), which
/// without large powers is max(x, 0) − x·t + ln(1 + e^−|x|). The slope of its first and last part
/// together is σ(x): **dx = dy·(σ(x) − t)/n, dt = −dy·x/n.**
#[derive(Debug)]
struct BinaryCrossEntropy;

impl Op for BinaryCrossEntropy {
    fn name(&self) -> &'static str {
        "binary_cross_entropy"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let n = count_pairs("binary_cross_entropy", x[0], x[1])?;
        if x[0].is_on_opencl() {
            let rest = x[0].abs()?.neg()?.exp()?.add_scalar(1.0)?.ln()?;
            let losses = x[0].relu()?.sub(&x[0].mul(x[1])?)?.add(&rest)?;
            return Ok((losses.sum_all()?.scale(1.0 / n as f64)?, vec![]));
        }
        let (a, b) = (compute::contiguous(x[0])?, compute::contiguous(x[1])?);
        dispatch!("binary_cross_entropy", a.dtype(), T => {
            let sum = fold_zip_parallel(a.elements::<T>()?, b.elements()?, Sum, loss);
            Ok((Tensor::scalar(sum.to_f64() / n as f64, a.dtype(), a.device())?, vec![]))
        })
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        if dy.is_on_opencl() {
            let scale = dy.scale(1.0 / x[0].numel() as f64)?;
            let dx = || x[0].sigmoid()?.sub(x[1])?.mul(&scale);
            let dt = || x[0].mul(&scale)?.neg();
            return Ok(vec![need[0].then(dx).transpose()?, need[1].then(dt).transpose()?]);
        }
        let scale = dy.item()? / x[0].numel() as f64;
        dispatch!("binary_cross_entropy", dy.dtype(), T => {
            let scale = T::from_f64(scale);
            let dx = || compute::zip::<T>(
                "binary_cross_entropy", x[0], x[1], #[inline(always)] move |x, t| scale * slope(x, t),
            );
            let dt = || compute::map::<T, T>(x[0], move |x| -scale * x);
            Ok(vec![need[0].then(dx).transpose()?, need[1].then(dt).transpose()?])
        })
    }

    fn saves(&self, need: &[bool]) -> Saves {
        if need[0] { Saves::inputs(&[0, 1]) } else { Saves::inputs(&[0]) }
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

/// max(x, 0) − x·t + ln(1 + e^−|x|).
#[inline(always)]
fn loss<T: Float>(x: T, t: T) -> T {
    x.maximum(T::ZERO) - x * t + (T::ONE + (-x.abs()).exp()).ln()
}

/// ∂loss/∂x = σ(x) − t.
#[inline(always)]
fn slope<T: Float>(x: T, t: T) -> T {
    T::ONE / (T::ONE + (-x).exp()) - t
}

impl Tensor {
    /// The mean over all elements of −t·ln σ(x) − (1 − t)·ln(1 − σ(x)), a tensor without dimensions:
    /// how far the probabilities σ(x) of these logits x are from the target t, which is 0 for no, 1
    /// for yes, or a probability between. Computed without overflow for logits of any size.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let device = Device::cpu();
    /// let logits = Tensor::from_vec(vec![0f64, 0.0, 800.0, -800.0], [2, 2], &device)?;
    /// let target = Tensor::from_vec(vec![0f64, 1.0, 1.0, 0.0], [2, 2], &device)?;
    /// assert_eq!(logits.binary_cross_entropy(&target)?.item()?, 2f64.ln() / 2.0);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Tensor::mse_loss`]: [`Error::Shape`](crate::Error::Shape) where the shapes differ or
    /// there are no elements, [`Error::DType`](crate::Error::DType) where the types differ or only
    /// store.
    pub fn binary_cross_entropy(&self, target: &Tensor) -> Result<Tensor> {
        apply(BinaryCrossEntropy, &[self, target])
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    fn loss(x: &[Naive]) -> Naive {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let one = |(x, t): (&f64, &f64)| -t * sigmoid(*x).ln() - (1.0 - t) * (1.0 - sigmoid(*x)).ln();
        let sum: f64 = x[0].data.iter().zip(&x[1].data).map(one).sum();
        Naive { dims: vec![], data: vec![sum / x[0].data.len() as f64] }
    }
    vec![
        Case::new("binary_cross_entropy", &["a b", "a b"], |x| x[0].binary_cross_entropy(x[1]), loss)
            .at_least(1),
        Case::new(
            "binary_cross_entropy, long",
            &["5 2000", "5 2000"],
            |x| x[0].binary_cross_entropy(x[1]),
            loss,
        ),
        Case::new(
            "binary_cross_entropy, a fixed target",
            &["a b", "a b"],
            |x| x[0].binary_cross_entropy(x[1]),
            loss,
        )
        .frozen(1)
        .at_least(1),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::dtype::DType;
    use crate::error::Error;

    #[test]
    fn extreme_logits() -> Result<()> {
        let device = Device::cpu();
        let target = Tensor::from_vec(vec![0.0, 1.0, 0.0, 1.0], [4], &device)?;
        let wide = Tensor::from_vec(vec![1e4, 1e4, -1e4, -1e4], [4], &device)?;
        for dtype in [DType::F32, DType::F64] {
            let (x, target) = (wide.to_dtype(dtype)?.track(), target.to_dtype(dtype)?);
            let y = x.binary_cross_entropy(&target)?;
            assert_eq!(y.item()?, 5e3, "{dtype}");
            let dx = y.backward()?.of(&x)?.to_dtype(DType::F64)?.to_vec::<f64>()?;
            assert_eq!(dx, [0.25, 0.0, 0.0, -0.25], "{dtype}");
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_an_error() -> Result<()> {
        let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::cpu());
        let x = zeros(&[2, 3], DType::F32)?;
        let error = x.binary_cross_entropy(&zeros(&[2, 1], DType::F32)?).unwrap_err();
        assert_eq!(
            error.to_string(),
            "binary_cross_entropy: [2, 3] and [2, 1] differ: give the target the prediction's shape, by \
             `reshape` or `broadcast_to`"
        );
        assert!(matches!(x.binary_cross_entropy(&zeros(&[2, 3], DType::F64)?), Err(Error::DType { .. })));
        let stored = zeros(&[2, 3], DType::BF16)?;
        assert!(matches!(stored.binary_cross_entropy(&stored), Err(Error::DType { .. })));
        let nothing = zeros(&[0, 3], DType::F32)?;
        assert!(matches!(nothing.binary_cross_entropy(&nothing), Err(Error::Shape { .. })));
        Ok(())
    }
}
