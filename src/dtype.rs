//! Data types: f32 and f64 to compute in, bf16 and f16 to store frozen weights in.

use std::fmt::{self, Debug};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision: what models train in.
    F32,
    /// IEEE double precision: what gradients are checked in.
    F64,
    /// The upper half of an f32. Storage only.
    BF16,
    /// IEEE half precision. Storage only.
    F16,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 => 4,
            DType::BF16 | DType::F16 => 2,
        }
    }

    /// Whether arithmetic is done in this type.
    pub fn is_compute(self) -> bool {
        matches!(self, DType::F32 | DType::F64)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for super::BF16 {}
    impl Sealed for super::F16 {}
}

/// A type that a tensor's elements can have.
pub trait Element: sealed::Sealed + Copy + Default + Debug + PartialEq + Send + Sync + 'static {
    /// The same type as a value.
    const DTYPE: DType;
    /// Rounded to nearest, ties to even.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// The narrow types' shortcut past f64; exact for all but f64 itself.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn from_f64(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f64 {
    const DTYPE: DType = DType::F64;
    #[inline(always)]
    fn from_f64(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
}

/// A bf16 number, by its bits.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct BF16(pub u16);

/// An IEEE half precision number, by its bits.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub u16);

impl Element for BF16 {
    const DTYPE: DType = DType::BF16;
    fn from_f64(x: f64) -> BF16 {
        BF16(round_to_bits(x, 8, 7) as u16)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.to_f32() as f64
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
}

impl Element for F16 {
    const DTYPE: DType = DType::F16;
    fn from_f64(x: f64) -> F16 {
        F16(round_to_bits(x, 5, 10) as u16)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.to_f32() as f64
    }
    /// Without branches, so that widening a panel vectorises: the 15 bits of exponent and mantissa
    /// moved to their places in an f32 are the number times 2⁻¹¹², which a product puts right (for
    /// subnormals too).
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let sign = ((self.0 & 0x8000) as u32) << 16;
        let magnitude = f32::from_bits(((self.0 & 0x7fff) as u32) << 13) * f32::from_bits(239 << 23);
        let special = if self.0 & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(sign | magnitude.to_bits() | special)
    }
}

/// `x` as the bits of a binary float with the given widths of exponent and mantissa, rounded to
/// nearest even in one step (by way of f32 it would be rounded twice).
fn round_to_bits(x: f64, exponent_bits: u32, mantissa_bits: u32) -> u32 {
    let sign = ((x.to_bits() >> 63) as u32) << (exponent_bits + mantissa_bits);
    let infinity = ((1u32 << exponent_bits) - 1) << mantissa_bits;
    if x.is_nan() {
        return sign | infinity | (1 << (mantissa_bits - 1));
    }
    let bias = (1i32 << (exponent_bits - 1)) - 1;
    let exponent = (((x.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(1 - bias);
    // In units of the last place the number is below 2^(mantissa_bits + 1): exact in f64, where
    // adding and subtracting 2⁵² rounds to nearest even.
    let ulps = x.abs() * 2f64.powi(mantissa_bits as i32 - exponent);
    let rounded = (ulps + 4503599627370496.0) - 4503599627370496.0;
    // A carry out of the mantissa moves into the exponent by itself.
    let bits = (((exponent + bias - 1) as i64) << mantissa_bits) as f64 + rounded;
    sign | (bits.min(infinity as f64) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_way_to_f64_and_back() {
        for bits in 0..=u16::MAX {
            let (b, h) = (BF16(bits), F16(bits));
            if b.to_f64().is_nan() {
                assert!(BF16::from_f64(b.to_f64()).to_f64().is_nan());
            } else {
                assert_eq!(BF16::from_f64(b.to_f64()), b);
            }
            if h.to_f64().is_nan() {
                assert!(F16::from_f64(h.to_f64()).to_f64().is_nan());
            } else {
                assert_eq!(F16::from_f64(h.to_f64()), h);
            }
        }
    }

    #[test]
    fn rounds_to_nearest_even_once() {
        assert_eq!(F16::from_f64(1.0 + 2f64.powi(-11)).0, 0x3c00);
        assert_eq!(F16::from_f64(1.0 + 3.0 * 2f64.powi(-11)).0, 0x3c02);
        // By way of f32 this one would round to even, and wrongly down.
        assert_eq!(F16::from_f64(1.0 + 2f64.powi(-11) + 2f64.powi(-40)).0, 0x3c01);
        assert_eq!(F16::from_f64(65504.0).0, 0x7bff);
        assert_eq!(F16::from_f64(65520.0).0, 0x7c00);
        assert_eq!(F16::from_f64(1e300).0, 0x7c00);
        assert_eq!(F16::from_f64(-1e300).0, 0xfc00);
        assert_eq!(F16::from_f64(2f64.powi(-24)).0, 1);
        assert_eq!(F16::from_f64(2f64.powi(-26)).0, 0);
        assert_eq!(F16::from_f64(-0.0).0, 0x8000);
        assert_eq!(BF16::from_f64(1.0).0, 0x3f80);
        assert_eq!(BF16::from_f64(1.0 + 2f64.powi(-8)).0, 0x3f80);
        assert_eq!(BF16::from_f64(f64::INFINITY).0, 0x7f80);
    }

    #[test]
    fn known_values() {
        assert_eq!(F16(0x3555).to_f64(), 0.333251953125);
        assert_eq!(F16(0x0001).to_f64(), 2f64.powi(-24));
        assert_eq!(F16(0x7c00).to_f64(), f64::INFINITY);
        assert_eq!(BF16(0xc000).to_f64(), -2.0);
    }
}
