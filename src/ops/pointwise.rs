//! y = f(x), element by element: what all such functions share.

use std::fmt::Debug;

use crate::compute;
use crate::cpu::{Float, dispatch};
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::opencl::elementwise;
use crate::tensor::Tensor;

/// A function of one number and its derivative. Mark both `#[inline(always)]`.
pub(crate) trait Pointwise: Debug + Copy + Send + Sync + 'static {
    const NAME: &'static str;
    /// What the derivative is written in.
    const READS: Reads;
    /// The kernels of both in kernels/elementwise.cl.
    const KERNELS: [&'static str; 2];
    /// The formulas' parameter, 0 where they have none.
    fn parameter(self) -> f64;
    fn f<T: Float>(self, x: T) -> T;
    /// f'(x), given x or y = f(x) as [`Self::READS`] says.
    fn df<T: Float>(self, v: T) -> T;
}

/// What a derivative reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    Nothing,
    X,
    Y,
}

/// `f` of every element of `x`, as an operation: dx = dy·f'(x).
pub(crate) fn pointwise(f: impl Pointwise, x: &Tensor) -> Result<Tensor> {
    apply(Apply(f), &[x])
}

#[derive(Debug)]
struct Apply<F>(F);

impl<F: Pointwise> Op for Apply<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let f = self.0;
        if x[0].is_on_opencl() {
            let y = elementwise::pointwise(F::KERNELS[0], x[0].cl()?, f.parameter())?;
            return Ok((Tensor::from_cl(y, x[0].dtype(), *x[0].shape(), x[0].device()), vec![]));
        }
        // Here and below: a long formula is not inlined by itself, and then does not vectorise.
        let y = dispatch!(F::NAME, x[0].dtype(), T => compute::map::<T, T>(x[0], #[inline(always)] move |x| f.f(x)))?;
        Ok((y, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        y: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let f = self.0;
        if dy.is_on_opencl() {
            let v = match F::READS {
                Reads::Nothing => dy,
                Reads::X => x[0],
                Reads::Y => y,
            };
            let dx = elementwise::pointwise_vjp(F::KERNELS[1], v.cl()?, dy.cl()?, f.parameter())?;
            return Ok(vec![Some(Tensor::from_cl(dx, dy.dtype(), *dy.shape(), dy.device()))]);
        }
        let dx = dispatch!(F::NAME, dy.dtype(), T => match F::READS {
            Reads::Nothing => compute::map::<T, T>(dy, #[inline(always)] move |dy| dy * f.df(T::ZERO)),
            Reads::X => compute::zip::<T>(F::NAME, x[0], dy, #[inline(always)] move |x, dy| dy * f.df(x)),
            Reads::Y => compute::zip::<T>(F::NAME, y, dy, #[inline(always)] move |y, dy| dy * f.df(y)),
        })?;
        Ok(vec![Some(dx)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        match F::READS {
            Reads::Nothing => Saves::NOTHING,
            Reads::X => Saves::inputs(&[0]),
            Reads::Y => Saves::OUTPUT,
        }
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

/// Functions by their formulas: what they give, what their derivative is written in and is. A
/// number in parentheses is a parameter, an f64.
macro_rules! pointwise_op {
    ($($(#[$doc:meta])* $Name:ident $(($c:ident))? = $name:literal:
        y = |$x:ident| $f:expr, dy_dx = |$Reads:ident $($v:ident)?| $df:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        struct $Name $(($crate::ops::pointwise::pointwise_op!(@parameter $c)))?;

        #[allow(unused_variables)] // Not every formula reads its parameter in both places.
        impl $crate::ops::pointwise::Pointwise for $Name {
            const NAME: &'static str = $name;
            const READS: $crate::ops::pointwise::Reads = $crate::ops::pointwise::Reads::$Reads;
            const KERNELS: [&'static str; 2] = [concat!($name, "_forward"), concat!($name, "_vjp")];
            fn parameter(self) -> f64 {
                let c = 0.0;
                $(let $c = self.0;)?
                $crate::ops::pointwise::pointwise_op!(@value c $($c)?)
            }
            #[inline(always)]
            fn f<T: $crate::cpu::Float>(self, $x: T) -> T {
                $(let $c = self.0;)?
                $f
            }
            #[inline(always)]
            fn df<T: $crate::cpu::Float>(self, v: T) -> T {
                $(let $c = self.0;)?
                $(let $v = v;)?
                $df
            }
        }
    )*};
    (@parameter $c:ident) => { f64 };
    (@value $none:ident $c:ident) => { $c };
    (@value $none:ident) => { $none };
}
pub(crate) use pointwise_op;
