//! Sums, means and maxima over dimensions.

use crate::compute;
use crate::cpu::{Float, dispatch, reduce};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// y is made of the n elements of x that lie along the dimensions `dims`.
///
/// | y | dx |
/// |---|---|
/// | Σ x | dy, repeated along `dims` |
/// | Σ x / n | dy/n, repeated along `dims` |
/// | max x | dy·\[x = y\]/c, where c elements are equal to the maximum |
///
/// Sharing a tie evenly is the one choice that treats equal elements alike; the shares sum to dy.
#[derive(Debug)]
struct Reduce {
    by: By,
    dims: Vec<usize>,
    keepdim: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Sum,
    Mean,
    Max,
}

impl Reduce {
    /// x's shape with a size of 1 for all that is reduced.
    fn kept(&self, x: &Shape) -> Result<Shape> {
        self.dims.iter().try_fold(*x, |shape, &dim| shape.with_dim(dim, 1))
    }

    /// The shape of the result.
    fn reduced(&self, x: &Shape) -> Result<Shape> {
        if self.keepdim {
            return self.kept(x);
        }
        let rest: Vec<usize> = (0..x.rank()).filter(|d| !self.dims.contains(d)).map(|d| x[d]).collect();
        Shape::new(&rest)
    }

    /// The number of elements that make one element of the result.
    fn count(&self, x: &Shape) -> usize {
        self.dims.iter().map(|&d| x[d]).product()
    }

    fn check(&self, x: &Shape) -> Result<()> {
        for (i, &dim) in self.dims.iter().enumerate() {
            x.check_dim(dim, self.name())?;
            if self.dims[..i].contains(&dim) {
                let message = format!("dimension {dim} is given twice in {:?}", self.dims);
                return Err(Error::shape(self.name(), message));
            }
        }
        if self.by != By::Sum && self.count(x) == 0 {
            let message =
                format!("{x} has no elements along {:?}, and nothing has no {}", self.dims, self.name());
            return Err(Error::shape(self.name(), message));
        }
        Ok(())
    }
}

impl Op for Reduce {
    fn name(&self) -> &'static str {
        match self.by {
            By::Sum => "sum",
            By::Mean => "mean",
            By::Max => "max",
        }
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let x = x[0];
        self.check(x.shape())?;
        if x.is_on_opencl() {
            return Ok((compute::reshape(&self.on_opencl(x)?, self.reduced(x.shape())?)?, vec![]));
        }
        let y = dispatch!(self.name(), x.dtype(), T => match self.by {
            By::Sum => compute::fold::<T>(x, &self.dims, reduce::Sum),
            By::Mean => {
                let n = T::from_f64(self.count(x.shape()) as f64);
                compute::map::<T, T>(&compute::fold::<T>(x, &self.dims, reduce::Sum)?, |sum| sum / n)
            }
            By::Max => compute::fold::<T>(x, &self.dims, reduce::Max),
        })?;
        Ok((compute::reshape(&y, self.reduced(x.shape())?)?, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        y: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let kept = self.kept(x[0].shape())?;
        let dy = compute::reshape(dy, kept)?;
        let dx = match self.by {
            By::Sum => dy,
            By::Mean if dy.is_on_opencl() => compute::cl_scale(&dy, 1.0 / self.count(x[0].shape()) as f64)?,
            By::Max if dy.is_on_opencl() => cl_shares(x[0], &compute::reshape(y, kept)?, &dy, &self.dims)?,
            By::Mean => dispatch!("mean", dy.dtype(), T => {
                let n = T::from_f64(self.count(x[0].shape()) as f64);
                compute::map::<T, T>(&dy, |dy| dy / n)
            })?,
            By::Max => {
                let y = compute::reshape(y, kept)?;
                dispatch!("max", dy.dtype(), T => shares::<T>(x[0], &y, &dy, &self.dims))?
            }
        };
        Ok(vec![Some(dx)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        match self.by {
            By::Sum | By::Mean => Saves::NOTHING,
            By::Max => Saves::inputs(&[0]).and(Saves::OUTPUT),
        }
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

impl Reduce {
    /// The result with a size of 1 for all that is reduced, on an OpenCL device.
    fn on_opencl(&self, x: &Tensor) -> Result<Tensor> {
        match self.by {
            By::Sum => compute::cl_sum(x, &self.dims, 1.0),
            By::Mean => compute::cl_sum(x, &self.dims, 1.0 / self.count(x.shape()) as f64),
            By::Max => {
                let y = opencl::reduce::max(x.cl()?, &self.dims)?;
                Ok(Tensor::from_cl(y, x.dtype(), self.kept(x.shape())?, x.device()))
            }
        }
    }
}

/// [`shares`] on an OpenCL device.
fn cl_shares(x: &Tensor, y: &Tensor, dy: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let is_max = compute::cl_zip("max", "equal", x, y)?;
    let count = compute::cl_sum(&is_max, dims, 1.0)?;
    let share = compute::cl_zip("max", "div", dy, &count)?;
    compute::cl_zip("max", "mul", &is_max, &share)
}

/// dy·[x = y] over the number of elements that are equal to the maximum.
fn shares<T: Float>(x: &Tensor, y: &Tensor, dy: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let is_max = compute::zip::<T>("max", x, y, |x, y| if x == y { T::ONE } else { T::ZERO })?;
    let count = compute::fold::<T>(&is_max, dims, reduce::Sum)?;
    let share = compute::zip::<T>("max", dy, &count, |dy, count| dy / count)?;
    compute::zip::<T>("max", &is_max, &share, |is_max, share| is_max * share)
}

impl Tensor {
    /// The sum over the dimensions in `dims`, which stay with size 1 if `keepdim`. Over no
    /// dimensions it is the tensor itself; see [`Tensor::sum_all`] for all of them.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::cpu())?;
    /// assert_eq!(x.sum(&[0], false)?.to_vec::<f32>()?, [5.0, 7.0, 9.0]);
    /// assert_eq!(x.sum(&[1], true)?.dims(), [2, 1]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] for a dimension that is not there or is given twice, [`Error::DType`] for a
    /// type that only stores.
    pub fn sum(&self, dims: &[usize], keepdim: bool) -> Result<Tensor> {
        self.reduce(By::Sum, dims, keepdim)
    }

    /// The mean over the dimensions in `dims`. As [`Tensor::sum`], and [`Error::Shape`] where it
    /// would be a mean of nothing.
    pub fn mean(&self, dims: &[usize], keepdim: bool) -> Result<Tensor> {
        self.reduce(By::Mean, dims, keepdim)
    }

    /// The largest element along the dimensions in `dims`; NaN if there is one. Equal maxima share
    /// the gradient evenly; where the maximum is NaN, so is the gradient. Errors as for
    /// [`Tensor::mean`].
    pub fn max(&self, dims: &[usize], keepdim: bool) -> Result<Tensor> {
        self.reduce(By::Max, dims, keepdim)
    }

    /// The sum of all elements, a tensor without dimensions. 0 for no elements.
    pub fn sum_all(&self) -> Result<Tensor> {
        self.sum(&self.all_dims(), false)
    }

    /// The mean of all elements, a tensor without dimensions. [`Error::Shape`] for no elements.
    pub fn mean_all(&self) -> Result<Tensor> {
        self.mean(&self.all_dims(), false)
    }

    /// Whether no element is NaN or infinite.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![1f32, 0.0], [2], &Device::cpu())?;
    /// assert!(x.all_finite()? && !x.ln()?.all_finite()?);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    pub fn all_finite(&self) -> Result<bool> {
        let x = self.on_host()?;
        let x = match x.dtype() {
            DType::BF16 | DType::F16 => compute::cast(&x, DType::F32)?,
            _ => x,
        };
        dispatch!("all_finite", x.dtype(), T => {
            Ok(compute::fold::<T>(&x, &x.all_dims(), reduce::Finite)?.item()? == 0.0)
        })
    }

    fn all_dims(&self) -> Vec<usize> {
        (0..self.rank()).collect()
    }

    fn reduce(&self, by: By, dims: &[usize], keepdim: bool) -> Result<Tensor> {
        apply(Reduce { by, dims: dims.to_vec(), keepdim }, &[self])
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::{Case, Domain};
    // Over the middle of three dimensions, or over the outer two.
    fn middle(x: &Naive, f: fn(Vec<f64>) -> f64) -> Naive {
        let d = &x.dims;
        Naive::build(&[d[0], d[2]], |i| f((0..d[1]).map(|j| x.at(&[i[0], j, i[1]])).collect()))
    }
    fn outer(x: &Naive, f: fn(Vec<f64>) -> f64) -> Naive {
        let d = &x.dims;
        let along = |j| (0..d[0]).flat_map(move |i| (0..d[2]).map(move |k| [i, j, k]));
        Naive::build(&[1, d[1], 1], |i| f(along(i[1]).map(|at| x.at(&at)).collect()))
    }
    fn all(x: &Naive, f: fn(Vec<f64>) -> f64) -> Naive {
        Naive { dims: vec![], data: vec![f(x.data.clone())] }
    }
    let sum: fn(Vec<f64>) -> f64 = |x| x.iter().sum();
    let mean: fn(Vec<f64>) -> f64 = |x| x.iter().sum::<f64>() / x.len() as f64;
    let max: fn(Vec<f64>) -> f64 = |x| x.into_iter().fold(f64::NEG_INFINITY, f64::max);
    // Elements that might be compared differ by more than a gradient check moves them.
    fn apart(i: &[usize]) -> f64 {
        5.0 * ((17 * (40 * i[0] + i[2]) + 23 * i[1]) % 1601) as f64
    }
    let spread = |x: &Tensor| {
        let offsets = Naive::build(x.dims(), apart).data;
        x.add(&Tensor::from_vec(offsets, x.shape(), x.device())?.to_dtype(x.dtype())?)
    };
    let naive_spread = |x: &Naive| x.zip(&Naive::build(&x.dims, apart), |x, offset| x + offset);
    // Positive numbers, whose sums have as many digits as they themselves.
    let positive = |case: Case| case.domain(Domain::Positive);
    vec![
        positive(Case::new("sum", &["a b c"], |x| x[0].sum(&[1], false), move |x| middle(&x[0], sum))),
        positive(Case::new("sum, two", &["a b c"], |x| x[0].sum(&[2, 0], true), move |x| outer(&x[0], sum))),
        positive(Case::new("sum, none", &["a b"], |x| x[0].sum(&[], false), |x| x[0].clone())),
        positive(Case::new("sum_all", &["a b c"], |x| x[0].sum_all(), move |x| all(&x[0], sum))),
        positive(Case::new("sum_all of one number", &[""], |x| x[0].sum_all(), |x| x[0].clone())),
        positive(
            Case::new("mean", &["a b c"], |x| x[0].mean(&[1], false), move |x| middle(&x[0], mean))
                .at_least(1),
        ),
        positive(
            Case::new("mean, two", &["a b c"], |x| x[0].mean(&[0, 2], true), move |x| outer(&x[0], mean))
                .at_least(1),
        ),
        Case::new("mean, no rows", &["2 3 0"], |x| x[0].mean(&[1], false), move |x| middle(&x[0], mean)),
        positive(Case::new("mean_all", &["a b"], |x| x[0].mean_all(), move |x| all(&x[0], mean)).at_least(1)),
        Case::new(
            "max",
            &["a b c"],
            move |x| spread(x[0])?.max(&[1], false),
            move |x| middle(&naive_spread(&x[0]), max),
        )
        .at_least(1),
        Case::new(
            "max, two",
            &["a b c"],
            move |x| spread(x[0])?.max(&[0, 2], true),
            move |x| outer(&naive_spread(&x[0]), max),
        )
        .at_least(1),
        Case::new("max, no rows", &["0 3 2"], |x| x[0].max(&[1], false), move |x| middle(&x[0], max)),
        // Ties that move together: the maximum is smooth along them.
        Case::new(
            "max, of a repeated tensor",
            &["b c"],
            |x| x[0].broadcast_to([3, x[0].dims()[0], x[0].dims()[1]])?.max(&[0], false),
            |x| x[0].clone(),
        ),
        Case::new(
            "max, with itself",
            &["a b c"],
            move |x| {
                let x = spread(x[0])?;
                Tensor::concat(&[&x, &x], 1)?.max(&[1], false)
            },
            move |x| middle(&naive_spread(&x[0]), max),
        )
        .at_least(1),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn tensor(data: &[f32]) -> Tensor {
        Tensor::from_slice(data, [data.len()], &Device::cpu()).unwrap()
    }

    fn slope_of_max(data: &[f32]) -> Vec<f32> {
        let x = tensor(data).track();
        x.max(&[0], false).unwrap().backward().unwrap().of(&x).unwrap().to_vec().unwrap()
    }

    #[test]
    fn ties_share_the_gradient() {
        assert_eq!(slope_of_max(&[1.0, 3.0, 3.0, 2.0]), [0.0, 0.5, 0.5, 0.0]);
        assert_eq!(slope_of_max(&[f32::NEG_INFINITY; 4]), [0.25; 4]);
    }

    #[test]
    fn nan_is_kept() {
        let y = tensor(&[1.0, f32::NAN, 2.0]).max(&[0], false).unwrap();
        assert!(y.item().unwrap().is_nan());
        assert!(slope_of_max(&[1.0, f32::NAN]).iter().all(|g| g.is_nan()));
    }

    #[test]
    fn wrong_dimensions_are_errors() {
        let x = Tensor::zeros([2, 0, 3], DType::F32, &Device::cpu()).unwrap();
        assert_eq!(
            x.sum(&[0, 0], false).unwrap_err().to_string(),
            "sum: dimension 0 is given twice in [0, 0]"
        );
        assert!(x.sum(&[3], true).is_err());
        assert_eq!(
            x.max(&[1], false).unwrap_err().to_string(),
            "max: [2, 0, 3] has no elements along [1], and nothing has no max"
        );
        assert!(x.mean(&[0, 1], false).is_err() && x.mean_all().is_err());
        assert_eq!(x.sum_all().unwrap().item().unwrap(), 0.0);
        assert_eq!(x.max(&[0], false).unwrap().dims(), [0, 3]);
        assert!(x.to_dtype(DType::BF16).unwrap().sum_all().is_err());
    }

    #[test]
    fn finds_what_is_not_finite() {
        for n in [0, 1, 40, 20_000] {
            let mut data = vec![1e30f32; n];
            assert!(tensor(&data).all_finite().unwrap());
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let Some(last) = data.last_mut() else { continue };
                *last = bad;
                assert!(!tensor(&data).all_finite().unwrap());
                assert!(!tensor(&data).to_dtype(DType::F16).unwrap().all_finite().unwrap());
            }
        }
    }
}
