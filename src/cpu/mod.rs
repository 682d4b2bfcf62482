//! The processor's kernels: plain slices in, plain slices out. Nothing here knows of graphs.

pub(crate) mod bf16;
pub(crate) mod elementwise;
#[cfg(all(feature = "fast", target_arch = "x86_64"))]
mod fma;
pub(crate) mod gemm;
pub(crate) mod math;
#[cfg(test)]
pub(crate) mod naive;
pub(crate) mod parallel;
pub(crate) mod reduce;
pub(crate) mod rows;
pub(crate) mod simd;
pub(crate) mod ternary;
pub(crate) mod walk;

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use crate::storage::Stored;

/// A type that arithmetic is done in: f32 or f64.
pub(crate) trait Float:
    Stored
    + PartialOrd
    + AddAssign
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + std::iter::Sum
    + math::Math
    + gemm::Gemm
    + bf16::LayerGemm
{
    const ZERO: Self;
    const ONE: Self;
}

impl Float for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
}

impl Float for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
}

/// Runs `$body` with `$T` standing for the compute type `$dtype`, or returns an error that names
/// the op and the cast to make.
macro_rules! dispatch {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::dtype::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::error::Error::dtype(
                $op,
                format!("{other} stores frozen weights only: cast it with `to_dtype(DType::F32)`"),
            )),
        }
    };
}
pub(crate) use dispatch;
