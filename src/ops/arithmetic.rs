//! Elementwise arithmetic: two tensors broadcast against each other, or one and a number.

use crate::compute;
use crate::cpu::dispatch;
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::ops::pointwise::{pointwise, pointwise_op};
use crate::tensor::Tensor;

/// y = a ∘ b for one of the four operations, a and b broadcast.
///
/// | y | da | db |
/// |---|---|---|
/// | a + b | dy | dy |
/// | a − b | dy | −dy |
/// | a·b | dy·b | dy·a |
/// | a/b | dy/b | −dy·a/b² |
#[derive(Clone, Copy, Debug)]
enum Arithmetic {
    Add,
    Sub,
    Mul,
    Div,
}
use Arithmetic::{Add, Div, Mul, Sub};

impl Op for Arithmetic {
    fn name(&self) -> &'static str {
        match self {
            Add => "add",
            Sub => "sub",
            Mul => "mul",
            Div => "div",
        }
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let name = self.name();
        let dtype = compute::same_dtype(name, x[0], x[1])?;
        if x[0].is_on_opencl() {
            return Ok((compute::cl_zip(name, name, x[0], x[1])?, vec![]));
        }
        let y = dispatch!(name, dtype, T => match self {
            Add => compute::zip::<T>(name, x[0], x[1], |a, b| a + b),
            Sub => compute::zip::<T>(name, x[0], x[1], |a, b| a - b),
            Mul => compute::zip::<T>(name, x[0], x[1], |a, b| a * b),
            Div => compute::zip::<T>(name, x[0], x[1], |a, b| a / b),
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
        let (a, b) = (x[0], x[1]);
        let da = || match self {
            Add | Sub => Ok(dy.clone()),
            Mul => dy.mul(b),
            Div => dy.div(b),
        };
        let db = || match self {
            Add => Ok(dy.clone()),
            Sub => dy.neg(),
            Mul => dy.mul(a),
            Div => dy.mul(a)?.div(&b.mul(b)?)?.neg(),
        };
        Ok(vec![need[0].then(da).transpose()?, need[1].then(db).transpose()?])
    }

    fn saves(&self, need: &[bool]) -> Saves {
        match self {
            Add | Sub => Saves::NOTHING,
            Mul => Saves::inputs(&[1]).when(need[0]).and(Saves::inputs(&[0]).when(need[1])),
            Div => Saves::inputs(&[1]).and(Saves::inputs(&[0]).when(need[1])),
        }
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

pointwise_op! {
    /// y = c·x, dx = c·dy.
    Scale(c) = "scale": y = |x| T::from_f64(c) * x, dy_dx = |Nothing| T::from_f64(c);
    /// y = x + c, dx = dy.
    Shift(c) = "add_scalar": y = |x| x + T::from_f64(c), dy_dx = |Nothing| T::ONE;
    /// y = xᶜ, dx = dy·c·xᶜ⁻¹.
    Power(c) = "powf": y = |x| x.powf(c), dy_dx = |X x| T::from_f64(c) * x.powf(c - 1.0);
    /// y = eˣ, dx = dy·y.
    Exp = "exp": y = |x| x.exp(), dy_dx = |Y y| y;
    /// y = ln x, dx = dy/x.
    Ln = "ln": y = |x| x.ln(), dy_dx = |X x| T::ONE / x;
    /// y = √x, dx = dy/(2y).
    Sqrt = "sqrt": y = |x| x.sqrt(), dy_dx = |Y y| T::from_f64(0.5) / y;
}

impl Tensor {
    /// self + other, broadcast.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// # let device = Device::cpu();
    /// let rows = Tensor::from_vec(vec![1f32, 2.0], [2, 1], &device)?;
    /// let columns = Tensor::from_vec(vec![10f32, 20.0, 30.0], [3], &device)?;
    /// assert_eq!(rows.add(&columns)?.to_vec::<f32>()?, [11.0, 21.0, 31.0, 12.0, 22.0, 32.0]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) where the shapes do not broadcast,
    /// [`Error::DType`](crate::Error::DType) where the types differ or only store.
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        apply(Add, &[self, other])
    }

    /// self − other, broadcast. Errors as for [`Tensor::add`].
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        apply(Sub, &[self, other])
    }

    /// self·other, element by element, broadcast. Errors as for [`Tensor::add`].
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        apply(Mul, &[self, other])
    }

    /// self/other, element by element, broadcast. Errors as for [`Tensor::add`].
    pub fn div(&self, other: &Tensor) -> Result<Tensor> {
        apply(Div, &[self, other])
    }

    /// −self.
    pub fn neg(&self) -> Result<Tensor> {
        self.scale(-1.0)
    }

    /// factor·self.
    pub fn scale(&self, factor: f64) -> Result<Tensor> {
        pointwise(Scale(factor), self)
    }

    /// self + number.
    pub fn add_scalar(&self, number: f64) -> Result<Tensor> {
        pointwise(Shift(number), self)
    }

    /// self to a power. NaN where the element is negative and the exponent no integer.
    pub fn powf(&self, exponent: f64) -> Result<Tensor> {
        pointwise(Power(exponent), self)
    }

    /// e to the power of self.
    pub fn exp(&self) -> Result<Tensor> {
        pointwise(Exp, self)
    }

    /// The natural logarithm.
    pub fn ln(&self) -> Result<Tensor> {
        pointwise(Ln, self)
    }

    /// The square root.
    pub fn sqrt(&self) -> Result<Tensor> {
        pointwise(Sqrt, self)
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::ops::cases::{Case, Domain};
    let two = |name, domain, run: fn(&Tensor, &Tensor) -> Result<Tensor>, f: fn(f64, f64) -> f64| {
        Case::new(name, &["a b c", "a b c"], move |x| run(x[0], x[1]), move |x| x[0].zip(&x[1], f))
            .domain(domain)
            .broadcasts()
    };
    let one = |name, domain, run: fn(&Tensor) -> Result<Tensor>, f: fn(f64) -> f64| {
        Case::new(name, &["a b c"], move |x| run(x[0]), move |x| x[0].map(f)).domain(domain)
    };
    vec![
        two("add", Domain::Any, Tensor::add, |a, b| a + b),
        two("sub", Domain::Any, Tensor::sub, |a, b| a - b),
        two("mul", Domain::Any, Tensor::mul, |a, b| a * b),
        two("div", Domain::Positive, Tensor::div, |a, b| a / b),
        Case::new("add, shorter", &["a b c", "c"], |x| x[0].add(x[1]), |x| x[0].zip(&x[1], |a, b| a + b)),
        Case::new("mul, shorter", &["c", "a b c"], |x| x[0].mul(x[1]), |x| x[0].zip(&x[1], |a, b| a * b)),
        Case::new("mul, itself", &["a b"], |x| x[0].mul(x[0]), |x| x[0].map(|a| a * a)),
        one("neg", Domain::Any, Tensor::neg, |x| -x),
        one("scale", Domain::Any, |x| x.scale(-2.5), |x| -2.5 * x),
        one("add_scalar", Domain::Any, |x| x.add_scalar(0.75), |x| x + 0.75),
        one("powf", Domain::Positive, |x| x.powf(2.3), |x| x.powf(2.3)),
        one("powf of negative numbers", Domain::NotZero, |x| x.powf(3.0), |x| x.powi(3)),
        one("exp", Domain::Any, Tensor::exp, f64::exp),
        one("ln", Domain::Positive, Tensor::ln, f64::ln),
        one("sqrt", Domain::Positive, Tensor::sqrt, f64::sqrt),
    ]
}
