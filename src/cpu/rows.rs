//! Functions of whole rows.

use crate::cpu::parallel;
use crate::cpu::simd::{Kernel, vectorize};
use crate::dtype::Element;

/// Calls `f(i, [row i of each x], row i of out)` for each of the `rows` rows that make up every x
/// and `out`; `cost` is the work for an element, in additions. Mark the closure
/// `#[inline(always)]` or it will not vectorise.
pub(crate) fn map<T: Element, const N: usize>(
    x: [&[T]; N],
    out: &mut [T],
    rows: usize,
    cost: usize,
    f: impl Fn(usize, [&[T]; N], &mut [T]) + Sync + Copy,
) {
    if rows == 0 {
        return;
    }
    let (x_width, width) = (x[0].len() / rows, out.len() / rows);
    parallel::rows(out, width, cost * x_width.max(width), &|first, out| {
        let x = x.map(|x| &x[first * x_width..]);
        vectorize(Rows { x, x_width, out, width, first, f });
    });
}

struct Rows<'a, T, F, const N: usize> {
    x: [&'a [T]; N],
    x_width: usize,
    out: &'a mut [T],
    width: usize,
    first: usize,
    f: F,
}

impl<T: Element, F: Fn(usize, [&[T]; N], &mut [T]), const N: usize> Kernel for Rows<'_, T, F, N> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let Rows { x, x_width, out, width, first, f } = self;
        for (i, out) in out.chunks_mut(width).enumerate() {
            f(first + i, x.map(|x| &x[i * x_width..(i + 1) * x_width]), out);
        }
    }
}
