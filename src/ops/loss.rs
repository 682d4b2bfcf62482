//! Losses: how far a prediction is from what it should be, as a single number.

use crate::compute;
use crate::cpu::reduce::{Max, Sum, fold_row, fold_zip, fold_zip_parallel};
use crate::cpu::{Float, dispatch, rows};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// y = Σ (x − t)²/n over all n elements of x and t, which have one shape.
///
/// **dx = dy·2(x − t)/n, dt = −dx.**
#[derive(Debug)]
struct Mse;

impl Op for Mse {
    fn name(&self) -> &'static str {
        "mse_loss"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let n = count_pairs("mse_loss", x[0], x[1])?;
        if x[0].is_on_opencl() {
            let difference = x[0].sub(x[1])?;
            return Ok((difference.mul(&difference)?.sum_all()?.scale(1.0 / n as f64)?, vec![]));
        }
        let (a, b) = (compute::contiguous(x[0])?, compute::contiguous(x[1])?);
        dispatch!("mse_loss", a.dtype(), T => {
            let sum = fold_zip_parallel(a.elements::<T>()?, b.elements()?, Sum, |x, t| (x - t) * (x - t));
            let y = Tensor::scalar(sum.to_f64() / n as f64, a.dtype(), a.device())?;
            Ok((y, vec![]))
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
            let dx = |factor: f64| x[0].sub(x[1])?.mul(&dy.scale(factor / x[0].numel() as f64)?);
            return Ok(vec![need[0].then(|| dx(2.0)).transpose()?, need[1].then(|| dx(-2.0)).transpose()?]);
        }
        let scale = 2.0 * dy.item()? / x[0].numel() as f64;
        let dx = |scale: f64| {
            dispatch!("mse_loss", dy.dtype(), T => {
                let scale = T::from_f64(scale);
                compute::zip::<T>("mse_loss", x[0], x[1], |x, t| scale * (x - t))
            })
        };
        Ok(vec![need[0].then(|| dx(scale)).transpose()?, need[1].then(|| dx(-scale)).transpose()?])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::inputs(&[0, 1])
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

/// The number of elements of a prediction and of its target, which have one shape and one type.
pub(super) fn count_pairs(op: &'static str, x: &Tensor, target: &Tensor) -> Result<usize> {
    compute::same_dtype(op, x, target)?;
    if x.shape() != target.shape() {
        let message = format!(
            "{} and {} differ: give the target the prediction's shape, by `reshape` or `broadcast_to`",
            x.shape(),
            target.shape()
        );
        return Err(Error::shape(op, message));
    }
    match x.numel() {
        0 => Err(Error::shape(op, format!("{} has no elements, and nothing has no mean", x.shape()))),
        n => Ok(n),
    }
}

/// The negative log-likelihood of one class a row under the softmax of the row, averaged over the
/// N rows that count.
///
/// x: (…, C) logits, t: a class for each row. With L = ln Σ_k e^x_k a row's loss is L − x_t; with
/// smoothing s the target distribution is q = (1 − s)·\[j = t\] + s/C and the loss Σ_j q_j·(L − x_j)
/// = (1 − s)·(L − x_t) + s·(L − ⟨x⟩).
/// From ∂L/∂x_j = softmax(x)_j and Σ q = 1: **dx_j = dy/N·(softmax(x)_j − q_j)**, 0 in rows that do
/// not count.
///
/// Aux, for each row: m = max x and Σ e^(x − m), which give softmax back without the loss of digits
/// that L, the sum of m and a logarithm, would bring; and Σ x.
#[derive(Debug)]
struct CrossEntropy {
    targets: Vec<u32>,
    ignore: Option<u32>,
    smoothing: f64,
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let classes = self.check(x[0])?;
        let (x, rows) = (compute::contiguous(x[0])?, self.targets.len());
        if x.is_on_opencl() {
            let (y, sums) = self.on_opencl(&x, classes, &self.marked_targets())?.forward()?;
            let tensor = |data, shape| Tensor::from_cl(data, x.dtype(), shape, x.device());
            return Ok((tensor(y, Shape::scalar()), vec![tensor(sums, Shape::new(&[rows, 3])?)]));
        }
        dispatch!("cross_entropy", x.dtype(), T => {
            let logits = x.elements::<T>()?;
            let mut sums = x.device().host().buffer::<T>(3 * rows)?;
            rows::map([logits], &mut sums, rows, 4, #[inline(always)] |i, [x], sums| match self.target(i) {
                None => sums.fill(T::ZERO),
                Some(_) => sums.copy_from_slice(&row_sums(x)),
            });
            let mut total = 0.0;
            for (i, sums) in sums.chunks(3).enumerate() {
                let Some(target) = self.target(i) else { continue };
                total += self.row_loss(logits[i * classes + target], sums, classes);
            }
            let y = Tensor::scalar(total / self.count(), x.dtype(), x.device())?;
            Ok((y, vec![Tensor::from_buffer(sums, Shape::new(&[rows, 3])?, x.device())]))
        })
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        aux: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let x = compute::contiguous(x[0])?;
        let classes = x.dims().last().copied().unwrap_or(0);
        if x.is_on_opencl() {
            let dx = self.on_opencl(&x, classes, &self.marked_targets())?.vjp(aux[0].cl()?, dy.cl()?)?;
            return Ok(vec![Some(Tensor::from_cl(dx, x.dtype(), *x.shape(), x.device()))]);
        }
        let scale = dy.item()? / self.count();
        let (hit, spread) = (1.0 - self.smoothing, self.smoothing / classes as f64);
        let dx = dispatch!("cross_entropy", x.dtype(), T => {
            let sums = aux[0].elements::<T>()?;
            let mut dx = x.device().host().buffer::<T>(x.numel())?;
            rows::map([x.elements::<T>()?], &mut dx, self.targets.len(), 4, #[inline(always)] |i, [x], dx| {
                let Some(target) = self.target(i) else { return dx.fill(T::ZERO) };
                row_vjp(x, &sums[3 * i..], T::from_f64(scale), T::from_f64(scale * spread), dx);
                dx[target] += T::from_f64(-scale * hit);
            });
            Ok(Tensor::from_buffer(dx, *x.shape(), x.device()))
        })?;
        Ok(vec![Some(dx)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::inputs(&[0]).and(Saves::AUX)
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

impl CrossEntropy {
    /// The same for kernels on an OpenCL device; logits in order, targets marked.
    fn on_opencl<'a>(
        &self,
        x: &'a Tensor,
        classes: usize,
        targets: &'a [u32],
    ) -> Result<opencl::loss::CrossEntropy<'a>> {
        let (smoothing, count) = (self.smoothing, self.count());
        Ok(opencl::loss::CrossEntropy { x: x.cl()?, classes, targets, smoothing, count })
    }

    /// The targets, the largest number there is for rows that do not count.
    fn marked_targets(&self) -> Vec<u32> {
        (0..self.targets.len()).map(|i| self.target(i).map_or(u32::MAX, |target| target as u32)).collect()
    }

    /// The number of classes, where all fits.
    fn check(&self, x: &Tensor) -> Result<usize> {
        if !(0.0..=1.0).contains(&self.smoothing) {
            return Err(Error::config(
                "label_smoothing",
                format!("{} does not lie in 0..=1", self.smoothing),
            ));
        }
        let Some((&classes, outer)) = x.dims().split_last() else {
            return Err(Error::shape("cross_entropy", "a single number has no dimension of classes"));
        };
        let rows: usize = outer.iter().product();
        if self.targets.len() != rows {
            let message = format!(
                "{} targets for logits of shape {}, which has {rows} rows",
                self.targets.len(),
                x.shape()
            );
            return Err(Error::shape("cross_entropy", message));
        }
        match (0..rows).filter_map(|i| self.target(i)).find(|&t| t >= classes) {
            Some(index) => Err(Error::Index { op: "cross_entropy", index, size: classes }),
            None => Ok(classes),
        }
    }

    /// The class that row `i` should have; None where the row does not count.
    #[inline(always)]
    fn target(&self, i: usize) -> Option<usize> {
        let target = self.targets[i];
        (Some(target) != self.ignore).then_some(target as usize)
    }

    /// The number of rows that count; 1 where none does, for an average of 0.
    fn count(&self) -> f64 {
        self.targets.iter().filter(|&&t| Some(t) != self.ignore).count().max(1) as f64
    }

    fn row_loss<T: Float>(&self, x_target: T, sums: &[T], classes: usize) -> f64 {
        let [max, sum, total] = [sums[0], sums[1], sums[2]].map(|s| s.to_f64());
        let log = sum.ln();
        let loss = max - x_target.to_f64() + log;
        if self.smoothing == 0.0 {
            // Apart, because 0·∞ is NaN and a logit may be −∞.
            return loss;
        }
        (1.0 - self.smoothing) * loss + self.smoothing * (max - total / classes as f64 + log)
    }
}

/// max x, Σ e^(x − max), Σ x.
#[inline(always)]
fn row_sums<T: Float>(x: &[T]) -> [T; 3] {
    let max = fold_row(x, Max);
    [
        max,
        fold_zip(
            x,
            x,
            Sum,
            #[inline(always)]
            |x, _| (x - max).exp(),
        ),
        fold_row(x, Sum),
    ]
}

/// dx = scale·softmax(x) − spread.
#[inline(always)]
fn row_vjp<T: Float>(x: &[T], sums: &[T], scale: T, spread: T, dx: &mut [T]) {
    let (max, scale) = (sums[0], scale / sums[1]);
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = (x - max).exp() * scale - spread;
    }
}

impl Tensor {
    /// The mean of (self − target)² over all elements, a tensor without dimensions.
    ///
    /// # Errors
    /// [`Error::Shape`] where the shapes differ (nothing is broadcast here: a target of shape (n, 1)
    /// for n predictions is a mistake that would not show) or there are no elements,
    /// [`Error::DType`] where the types differ or only store.
    pub fn mse_loss(&self, target: &Tensor) -> Result<Tensor> {
        apply(Mse, &[self, target])
    }

    /// −ln of the probability that the softmax of each row of logits (…, C) gives to the row's
    /// target, averaged over the rows. `targets` are in the order of the rows.
    ///
    /// Rows whose target is `ignore` (any number, also beyond C) do not count and get a gradient of
    /// 0; where no row counts the loss is 0. With `label_smoothing` s the target distribution has
    /// 1 − s at the target and s spread evenly over all classes.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let logits = Tensor::from_vec(vec![0f64, 0.0, 5.0, -5.0], [2, 2], &Device::cpu())?;
    /// let loss = logits.cross_entropy(&[1, u32::MAX], Some(u32::MAX), 0.0)?;
    /// assert_eq!(loss.item()?, 2f64.ln());
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] where the number of targets is not that of the rows, [`Error::Index`] for a
    /// target that is no class, [`Error::Config`] for smoothing outside of 0..=1, [`Error::DType`]
    /// for logits of a type that only stores.
    pub fn cross_entropy(
        &self,
        targets: &[u32],
        ignore: Option<u32>,
        label_smoothing: f64,
    ) -> Result<Tensor> {
        apply(CrossEntropy { targets: targets.to_vec(), ignore, smoothing: label_smoothing }, &[self])
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::{Case, Domain};
    const NONE: u32 = 1000;
    // Some class for each row; every third row does not count.
    fn targets(dims: &[usize]) -> Vec<u32> {
        let (&classes, outer) = dims.split_last().expect("a dimension of classes");
        let target = |i: usize| if i % 3 == 1 { NONE } else { (7 * i + 3) as u32 % classes as u32 };
        (0..outer.iter().product()).map(target).collect()
    }
    fn cross_entropy(x: &Naive, smoothing: f64) -> Naive {
        let classes = x.dims[x.dims.len() - 1];
        let (mut total, mut count) = (0.0, 0.0);
        for (x, t) in x.data.chunks(classes).zip(targets(&x.dims)).filter(|(_, t)| *t != NONE) {
            let sum: f64 = x.iter().map(|x| x.exp()).sum();
            for (j, x) in x.iter().enumerate() {
                let hit = if j == t as usize { 1.0 - smoothing } else { 0.0 };
                total -= (hit + smoothing / classes as f64) * (x.exp() / sum).ln();
            }
            count += 1.0;
        }
        Naive { dims: vec![], data: vec![if count > 0.0 { total / count } else { 0.0 }] }
    }
    fn mse(x: &[Naive]) -> Naive {
        let squares: f64 = x[0].data.iter().zip(&x[1].data).map(|(a, b)| (a - b).powi(2)).sum();
        Naive { dims: vec![], data: vec![squares / x[0].data.len() as f64] }
    }
    // In few and short rows the differences that these are made of may vanish, and f32 then shows
    // only rounding; the cases of fixed size keep the default tolerance.
    let differences = |case: Case| case.domain(Domain::Positive).f32_tolerance(1e-3);
    vec![
        differences(Case::new("mse_loss", &["a b", "a b"], |x| x[0].mse_loss(x[1]), mse).at_least(1)),
        Case::new("mse_loss, long", &["5 2000", "5 2000"], |x| x[0].mse_loss(x[1]), mse),
        Case::new(
            "mse_loss, itself",
            &["a b"],
            |x| x[0].mse_loss(&x[0].scale(2.0)?),
            |x| mse(&[x[0].clone(), x[0].map(|x| 2.0 * x)]),
        )
        .at_least(1),
        differences(
            Case::new(
                "cross_entropy",
                &["a b c"],
                |x| x[0].cross_entropy(&targets(x[0].dims()), Some(NONE), 0.0),
                |x| cross_entropy(&x[0], 0.0),
            )
            .at_least(1),
        ),
        differences(
            Case::new(
                "cross_entropy, smoothed",
                &["a c"],
                |x| x[0].cross_entropy(&targets(x[0].dims()), Some(NONE), 0.3),
                |x| cross_entropy(&x[0], 0.3),
            )
            .at_least(2),
        ),
        Case::new(
            "cross_entropy, many rows",
            &["900 40"],
            |x| x[0].cross_entropy(&targets(x[0].dims()), Some(NONE), 0.1),
            |x| cross_entropy(&x[0], 0.1),
        ),
        Case::new(
            "cross_entropy, one row",
            &["9"],
            |x| x[0].cross_entropy(&[3], None, 0.0),
            |x| cross_entropy(&Naive { dims: vec![1, 9], ..x[0].clone() }, 0.0),
        ),
        Case::new(
            "cross_entropy, no rows",
            &["0 3"],
            |x| x[0].cross_entropy(&[], None, 0.0),
            |x| cross_entropy(&x[0], 0.0),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::dtype::DType;

    #[test]
    fn no_row_that_counts() {
        let x = Tensor::from_vec(vec![1f32, 2.0, f32::NAN, 4.0], [2, 2], &Device::cpu()).unwrap().track();
        let y = x.cross_entropy(&[9, 9], Some(9), 0.1).unwrap();
        assert_eq!(y.item().unwrap(), 0.0);
        assert_eq!(y.backward().unwrap().of(&x).unwrap().to_vec::<f32>().unwrap(), [0.0; 4]);
        let none = Tensor::zeros([2, 0], DType::F32, &Device::cpu()).unwrap();
        assert_eq!(none.cross_entropy(&[9, 9], Some(9), 0.1).unwrap().item().unwrap(), 0.0);
    }

    #[test]
    fn extreme_logits() {
        let x =
            Tensor::from_vec(vec![3e38f32, -3e38, f32::NEG_INFINITY], [3], &Device::cpu()).unwrap().track();
        let y = x.cross_entropy(&[0], None, 0.0).unwrap();
        assert_eq!(y.item().unwrap(), 0.0);
        assert_eq!(y.backward().unwrap().of(&x).unwrap().to_vec::<f32>().unwrap(), [0.0; 3]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::cpu()).unwrap();
        let x = zeros(&[2, 3]);
        let text = |r: Result<Tensor>| r.unwrap_err().to_string();
        assert_eq!(
            text(x.cross_entropy(&[0], None, 0.0)),
            "cross_entropy: 1 targets for logits of shape [2, 3], which has 2 rows"
        );
        assert_eq!(text(x.cross_entropy(&[0, 3], None, 0.0)), "cross_entropy: index 3 is outside of 0..3");
        assert!(
            x.cross_entropy(&[0, 1], None, 1.5).is_err() && x.cross_entropy(&[0, 1], None, f64::NAN).is_err()
        );
        assert!(zeros(&[]).cross_entropy(&[0], None, 0.0).is_err());
        assert!(x.mse_loss(&zeros(&[2, 1])).is_err() && zeros(&[0]).mse_loss(&zeros(&[0])).is_err());
        assert!(x.mse_loss(&zeros(&[2, 3]).to_dtype(DType::F64).unwrap()).is_err());
    }
}
