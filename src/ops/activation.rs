//! Activations: functions of one number that networks bend their values by.

use crate::error::Result;
use crate::ops::pointwise::{pointwise, pointwise_op};
use crate::tensor::Tensor;

/// √(2/π), the slope that makes the tanh form of GELU close to the exact one, with [`CUBIC`].
const SLOPE: f64 = 0.797_884_560_802_865_4;
/// The weight of x³ in the tanh form of GELU (Hendrycks and Gimpel, arXiv 1606.08415).
const CUBIC: f64 = 0.044715;

pointwise_op! {
    /// y = max(x, 0), dx = dy where y > 0 and 0 elsewhere (also at the kink x = 0).
    Relu = "relu": y = |x| x.maximum(T::ZERO), dy_dx = |Y y| if y <= T::ZERO { T::ZERO } else { T::ONE };

    /// y = |x|, dx = dy·sign x, 0 at the kink x = 0.
    Abs = "abs": y = |x| x.abs(), dy_dx = |X x| if x == T::ZERO { T::ZERO } else { x / x.abs() };

    /// y = x·Φ(x) with the normal distribution Φ(x) = (1 + erf(x/√2))/2, whose density is
    /// φ(x) = e^(−x²/2)/√(2π): dx = dy·(Φ(x) + x·φ(x)).
    Gelu = "gelu":
        y = |x| {
            let half = T::from_f64(0.5);
            half * x * (T::ONE + (x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf())
        },
        dy_dx = |X x| {
            let half = T::from_f64(0.5);
            let cdf = half + half * (x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf();
            cdf + x * (-half * x * x).exp() * T::from_f64(0.5 * SLOPE)
        };

    /// y = x·(1 + t)/2 with t = tanh u, u = √(2/π)·(x + 0.044715·x³).
    /// From dt = (1 − t²)·du: dx = dy·((1 + t)/2 + x·(1 − t²)/2·√(2/π)·(1 + 3·0.044715·x²)).
    GeluTanh = "gelu_tanh":
        y = |x| {
            let u = T::from_f64(SLOPE) * (x + T::from_f64(CUBIC) * x * x * x);
            T::from_f64(0.5) * x * (T::ONE + u.tanh())
        },
        dy_dx = |X x| {
            let half = T::from_f64(0.5);
            let t = (T::from_f64(SLOPE) * (x + T::from_f64(CUBIC) * x * x * x)).tanh();
            let du = T::from_f64(SLOPE) + T::from_f64(3.0 * SLOPE * CUBIC) * x * x;
            half * (T::ONE + t) + half * x * (T::ONE - t * t) * du
        };

    /// y = x·s with s = 1/(1 + e⁻ˣ). From ds = s·(1 − s)·dx: dx = dy·s·(1 + x·(1 − s)).
    Silu = "silu":
        y = |x| x / (T::ONE + (-x).exp()),
        dy_dx = |X x| {
            let s = T::ONE / (T::ONE + (-x).exp());
            s * (T::ONE + x * (T::ONE - s))
        };

    /// y = tanh x, dx = dy·(1 − y²).
    Tanh = "tanh": y = |x| x.tanh(), dy_dx = |Y y| T::ONE - y * y;

    /// y = 1/(1 + e⁻ˣ), dx = dy·y·(1 − y).
    Sigmoid = "sigmoid": y = |x| T::ONE / (T::ONE + (-x).exp()), dy_dx = |Y y| y * (T::ONE - y);
}

impl Tensor {
    /// The larger of self and 0; the gradient at 0 is 0.
    ///
    /// # Errors
    /// As all activations: [`Error::DType`](crate::Error::DType) for a type that only stores.
    pub fn relu(&self) -> Result<Tensor> {
        pointwise(Relu, self)
    }

    /// The absolute value; the gradient at 0 is 0.
    pub fn abs(&self) -> Result<Tensor> {
        pointwise(Abs, self)
    }

    /// x·Φ(x) with the normal distribution Φ: the exact GELU, by erf.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![-1f64, 0.0, 1.0], [3], &Device::cpu())?;
    /// let y = x.gelu()?.to_vec::<f64>()?;
    /// assert!((y[2] - 0.841344746).abs() < 1e-9 && y[1] == 0.0);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    pub fn gelu(&self) -> Result<Tensor> {
        pointwise(Gelu, self)
    }

    /// The approximation of GELU by tanh, which some checkpoints (GPT-2 among them) were trained
    /// with. Within 5e-4 of [`Tensor::gelu`].
    pub fn gelu_tanh(&self) -> Result<Tensor> {
        pointwise(GeluTanh, self)
    }

    /// x·sigmoid(x), also called swish.
    pub fn silu(&self) -> Result<Tensor> {
        pointwise(Silu, self)
    }

    /// The hyperbolic tangent.
    pub fn tanh(&self) -> Result<Tensor> {
        pointwise(Tanh, self)
    }

    /// 1/(1 + e⁻ˣ).
    pub fn sigmoid(&self) -> Result<Tensor> {
        pointwise(Sigmoid, self)
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::math::Math;
    use crate::ops::cases::{Case, Domain};
    let one = |name, domain, run: fn(&Tensor) -> Result<Tensor>, f: fn(f64) -> f64| {
        Case::new(name, &["a b c"], move |x| run(x[0]), move |x| x[0].map(f)).domain(domain)
    };
    let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
    let cubic = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    vec![
        one("relu", Domain::NotZero, Tensor::relu, |x| if x > 0.0 { x } else { 0.0 }),
        one("abs", Domain::NotZero, Tensor::abs, |x| if x < 0.0 { -x } else { x }),
        one("gelu", Domain::Any, Tensor::gelu, |x| x * (1.0 + Math::erf(x / 2f64.sqrt())) / 2.0),
        Case::new(
            "gelu_tanh",
            &["a b c"],
            |x| x[0].gelu_tanh(),
            move |x| x[0].map(|x| x * (1.0 + cubic(x).tanh()) / 2.0),
        ),
        Case::new("silu", &["a b c"], |x| x[0].silu(), move |x| x[0].map(|x| x * sigmoid(x))),
        one("tanh", Domain::Any, Tensor::tanh, f64::tanh),
        Case::new("sigmoid", &["a b c"], |x| x[0].sigmoid(), move |x| x[0].map(sigmoid)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    type Activation = fn(&Tensor) -> Result<Tensor>;

    fn value_and_slope(f: Activation, x: f32) -> (f32, f32) {
        let x = Tensor::from_vec(vec![x], [1], &Device::cpu()).unwrap().track();
        let y = f(&x).unwrap();
        let value = y.to_vec::<f32>().unwrap()[0];
        (value, y.backward().unwrap().of(&x).unwrap().to_vec::<f32>().unwrap()[0])
    }

    #[test]
    fn kinks_have_the_slope_zero() {
        assert_eq!(value_and_slope(Tensor::relu, 0.0), (0.0, 0.0));
        assert_eq!(value_and_slope(Tensor::relu, -0.0).1, 0.0);
        assert_eq!(value_and_slope(Tensor::abs, 0.0), (0.0, 0.0));
    }

    #[test]
    fn far_from_zero() {
        let bounded: [Activation; 2] = [Tensor::tanh, Tensor::sigmoid];
        for f in bounded {
            assert_eq!(value_and_slope(f, 200.0), (1.0, 0.0));
            assert_eq!(value_and_slope(f, -200.0).1, 0.0);
        }
        let like_relu: [Activation; 4] = [Tensor::relu, Tensor::gelu, Tensor::gelu_tanh, Tensor::silu];
        for f in like_relu {
            assert_eq!(value_and_slope(f, 200.0), (200.0, 1.0));
            assert_eq!(value_and_slope(f, -200.0), (0.0, 0.0));
        }
    }

    #[test]
    fn nan_is_kept() {
        let all: [Activation; 7] = [
            Tensor::relu,
            Tensor::abs,
            Tensor::gelu,
            Tensor::gelu_tanh,
            Tensor::silu,
            Tensor::tanh,
            Tensor::sigmoid,
        ];
        for f in all {
            assert!(value_and_slope(f, f32::NAN).0.is_nan());
        }
    }
}
