//! Elementary functions on f32 and f64.
//!
//! The f32 versions have no branches and no calls, so that a loop over them vectorises; each is
//! within 3 units in the last place (tests). The f64 versions are there to check gradients with:
//! exact rather than fast. All of them keep NaN.

/// Elementary functions.
pub(crate) trait Math: Copy {
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
    fn tanh(self) -> Self;
    fn erf(self) -> Self;
    fn powf(self, exponent: f64) -> Self;
    fn abs(self) -> Self;
    /// The larger one; NaN if either is.
    fn maximum(self, other: Self) -> Self;
}

/// c₀ + c₁·x + c₂·x² + …
#[inline(always)]
fn polynomial<const N: usize>(x: f32, c: [f32; N]) -> f32 {
    let mut sum = c[N - 1];
    for &term in c[..N - 1].iter().rev() {
        sum = sum * x + term;
    }
    sum
}

/// `x` held within `low..=high`; NaN stays.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

impl Math for f32 {
    /// eˣ = 2ᵏ·eʳ with k the nearest integer to x/ln 2, and eʳ = 1 + r + r²·P(r) by a minimax P.
    #[inline(always)]
    fn exp(self) -> f32 {
        /// Adding it rounds to an integer, which then stands in the low bits.
        const ROUND: f32 = 12582912.0;
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let x = clamp(self, -104.0, 89.0);
        let rounded = x * std::f32::consts::LOG2_E + ROUND;
        let k = rounded - ROUND;
        let r = (x - k * LN2_HIGH) - k * LN2_LOW;
        let p =
            polynomial(r, [5.000000101e-1, 1.666651291e-1, 4.166618749e-2, 8.369596392e-3, 1.395170558e-3]);
        let mantissa = 1.0 + (r + r * r * p);
        // In two factors, so that neither overflows where the result does not.
        let k = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        mantissa * power_of_two(k >> 1) * power_of_two(k.wrapping_sub(k >> 1))
    }

    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }

    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }

    /// Near 0 an odd polynomial, elsewhere 1 − 2/(e²ˣ + 1), which would lose digits near 0.
    #[inline(always)]
    fn tanh(self) -> f32 {
        let x = f32::abs(self);
        let s = clamp(x * x, 0.0, 0.5);
        let near = x * polynomial(
            s,
            [
                1.0,
                -3.333332013e-1,
                1.333289836e-1,
                -5.391417888e-2,
                2.154516117e-2,
                -7.836307601e-3,
                1.863171852e-3,
            ],
        );
        let far = 1.0 - 2.0 / (Math::exp(2.0 * x) + 1.0);
        (if x * x < 0.5 { near } else { far }).copysign(self)
    }

    /// Below 1 an odd polynomial, above it 1 − e^(−x·Q(x)).
    #[inline(always)]
    fn erf(self) -> f32 {
        let x = f32::abs(self);
        let s = clamp(x * x, 0.0, 1.0);
        let near = x * polynomial(
            s,
            [
                1.128379166,
                -3.761262714e-1,
                1.128360017e-1,
                -2.685444441e-2,
                5.189534989e-3,
                -8.020838159e-4,
                7.889109102e-5,
            ],
        );
        let t = clamp(x, 1.0, 4.0);
        let q = polynomial(
            t,
            [
                1.128599566,
                6.354102014e-1,
                1.056689173e-1,
                -2.309151078e-2,
                3.181948679e-3,
                -1.387312690e-4,
                -2.843770117e-5,
                3.557079410e-6,
            ],
        );
        let far = 1.0 - Math::exp(-t * q);
        (if x > 1.0 { far } else { near }).copysign(self)
    }

    #[inline(always)]
    fn powf(self, exponent: f64) -> f32 {
        f32::powf(self, exponent as f32)
    }

    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }

    #[inline(always)]
    fn maximum(self, other: f32) -> f32 {
        if self > other || self.is_nan() { self } else { other }
    }
}

/// 2ᵏ for −126 ≤ k ≤ 127.
#[inline(always)]
fn power_of_two(k: i32) -> f32 {
    f32::from_bits((k.wrapping_add(127) as u32) << 23)
}

impl Math for f64 {
    fn exp(self) -> f64 {
        f64::exp(self)
    }

    fn ln(self) -> f64 {
        f64::ln(self)
    }

    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }

    fn tanh(self) -> f64 {
        f64::tanh(self)
    }

    /// Below 3 the series 2/√π·e^(−x²)·Σ 2ⁿx²ⁿ⁺¹/(2n+1)!!, whose terms are all positive; above it
    /// the continued fraction of erfc, from its tail.
    fn erf(self) -> f64 {
        const TWO_OVER_SQRT_PI: f64 = std::f64::consts::FRAC_2_SQRT_PI;
        let x = f64::abs(self);
        let value = if x < 3.0 {
            let (mut term, mut sum, mut n) = (x, x, 1.0);
            while term > sum * 1e-18 {
                term *= 2.0 * x * x / (2.0 * n + 1.0);
                sum += term;
                n += 1.0;
            }
            TWO_OVER_SQRT_PI * f64::exp(-x * x) * sum
        } else if x < 6.0 {
            let tail = (1..=60).rev().fold(x, |tail, n| x + 0.5 * n as f64 / tail);
            1.0 - f64::exp(-x * x) * 0.5 * TWO_OVER_SQRT_PI / tail
        } else if x.is_nan() {
            x
        } else {
            1.0
        };
        value.copysign(self)
    }

    fn powf(self, exponent: f64) -> f64 {
        f64::powf(self, exponent)
    }

    fn abs(self) -> f64 {
        f64::abs(self)
    }

    fn maximum(self, other: f64) -> f64 {
        if self > other || self.is_nan() { self } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest error of `f` against `exact`, in units in the last place of an f32, where the
    /// result is a normal number.
    fn worst(f: fn(f32) -> f32, exact: fn(f64) -> f64, low: f32, high: f32) -> f64 {
        (0..=400_000)
            .map(|i| low + (high - low) * i as f32 / 400_000.0)
            .map(|x| (f(x), exact(x as f64)))
            .filter(|(_, y)| y.abs() > f32::MIN_POSITIVE as f64)
            .map(|(got, want)| {
                (got as f64 - want).abs() / want.abs().max(1e-300) / (f32::EPSILON as f64 / 2.0)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn within_units_in_the_last_place() {
        assert!(worst(Math::exp, f64::exp, -87.0, 88.7) < 3.0);
        assert!(worst(Math::tanh, f64::tanh, -12.0, 12.0) < 4.0);
        assert!(worst(Math::erf, Math::erf, -6.0, 6.0) < 4.0);
    }

    #[test]
    fn erf_in_double_precision() {
        // Values from the tables of Abramowitz and Stegun and from mpmath.
        for (x, y) in [
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
            (3.5, 0.999_999_256_901_627_7),
            (5.0, 0.999_999_999_998_462_5),
        ] {
            assert!((Math::erf(x) - y).abs() < 2e-15, "erf({x}) = {}", Math::erf(x));
            assert_eq!(Math::erf(-x), -Math::erf(x));
        }
    }

    #[test]
    fn the_ends_of_the_range() {
        assert_eq!(Math::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Math::exp(-200f32), 0.0);
        assert_eq!(Math::exp(f32::INFINITY), f32::INFINITY);
        assert!(Math::exp(f32::NAN).is_nan());
        assert!(Math::exp(-95f32) > 0.0);
        assert_eq!(Math::tanh(f32::INFINITY), 1.0);
        assert!(Math::tanh(f32::NAN).is_nan());
        assert_eq!(Math::erf(f32::NEG_INFINITY), -1.0);
        assert!(Math::erf(f32::NAN).is_nan());
        assert!(Math::erf(f64::NAN).is_nan());
        assert!(Math::maximum(1.0, f32::NAN).is_nan() && Math::maximum(f32::NAN, 1.0).is_nan());
    }
}
