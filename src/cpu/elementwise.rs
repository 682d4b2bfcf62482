//! Functions applied to every element of one or two views.
//!
//! What walks the views is compiled once per element type; only the loop over a contiguous block is
//! compiled for each function. Elements that do not lie in a row are gathered into a block first.

use std::ops::Range;

use crate::cpu::parallel::{self, GRAIN};
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::walk::Walk;
use crate::dtype::Element;
use crate::shape::Layout;

/// Elements of a slice, by a layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) layout: &'a Layout,
}

/// Elements that are gathered at a time.
const BLOCK: usize = 512;
/// Rows shorter than this are gathered even where their elements lie side by side.
const SHORT: usize = 32;

/// out[i] = f(x[i]), `out` in the order of the view's shape.
pub(crate) fn map<T: Element, U: Element>(x: View<'_, T>, out: &mut [U], f: impl Fn(T) -> U + Sync + Copy) {
    map_blocks(x, out, &of_one(f));
}

/// A function of elements as one of contiguous blocks.
pub(crate) fn of_one<T: Element, U: Element>(
    f: impl Fn(T) -> U + Sync + Copy,
) -> impl Fn(&[T], &mut [U]) + Sync {
    move |x, out| vectorize(Map { x, out, f })
}

/// The same as [`map`] for a function of contiguous blocks.
pub(crate) fn map_blocks<T: Element, U: Element>(x: View<'_, T>, out: &mut [U], f: OfOne<'_, T, U>) {
    let walk = Walk::new([x.layout]);
    parallel::chunks(out, GRAIN, &|i, out| {
        let (start, mut block) = (i * GRAIN, [T::default(); BLOCK]);
        for part in blocks(&walk, start..start + out.len()) {
            let out = &mut out[part.start - start..part.end - start];
            f(fetch(x.data, &walk, 0, part, &mut block), out);
        }
    });
}

/// A function of a block that fills another.
pub(crate) type OfOne<'a, T, U> = &'a (dyn Fn(&[T], &mut [U]) + Sync);

struct Map<'a, T, U, F> {
    x: &'a [T],
    out: &'a mut [U],
    f: F,
}

impl<T: Element, U: Element, F: Fn(T) -> U> Kernel for Map<'_, T, U, F> {
    type Element = U;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (out, &x) in self.out.iter_mut().zip(self.x) {
            *out = (self.f)(x);
        }
    }
}

/// A function of pairs of elements as one of contiguous blocks.
pub(crate) fn of_two<T: Element>(
    f: impl Fn(T, T) -> T + Sync + Copy,
) -> impl Fn(&[T], &[T], &mut [T]) + Sync {
    move |x, y, out| vectorize(Zip { x, y, out, f })
}

/// A function of two blocks that fills a third.
pub(crate) type OfTwo<'a, T> = &'a (dyn Fn(&[T], &[T], &mut [T]) + Sync);

/// out[i] = f(x[i], y[i]) for two views of one shape and a function of contiguous blocks.
pub(crate) fn zip_blocks<T: Element>(x: View<'_, T>, y: View<'_, T>, out: &mut [T], f: OfTwo<'_, T>) {
    let walk = Walk::new([x.layout, y.layout]);
    parallel::chunks(out, GRAIN, &|i, out| {
        let (start, mut x_block, mut y_block) = (i * GRAIN, [T::default(); BLOCK], [T::default(); BLOCK]);
        for part in blocks(&walk, start..start + out.len()) {
            let out = &mut out[part.start - start..part.end - start];
            let x = fetch(x.data, &walk, 0, part.clone(), &mut x_block);
            f(x, fetch(y.data, &walk, 1, part, &mut y_block), out);
        }
    });
}

struct Zip<'a, T, F> {
    x: &'a [T],
    y: &'a [T],
    out: &'a mut [T],
    f: F,
}

impl<T: Element, F: Fn(T, T) -> T> Kernel for Zip<'_, T, F> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for ((out, &x), &y) in self.out.iter_mut().zip(self.x).zip(self.y) {
            *out = (self.f)(x, y);
        }
    }
}

/// a[i] += x[i].
pub(crate) fn add_assign<T: crate::cpu::Float>(a: &mut [T], x: View<'_, T>) {
    let walk = Walk::new([x.layout]);
    parallel::chunks(a, GRAIN, &|i, a| {
        let (start, mut block) = (i * GRAIN, [T::default(); BLOCK]);
        for part in blocks(&walk, start..start + a.len()) {
            let a = &mut a[part.start - start..part.end - start];
            vectorize(AddAssign { x: fetch(x.data, &walk, 0, part, &mut block), a });
        }
    });
}

struct AddAssign<'a, T> {
    x: &'a [T],
    a: &'a mut [T],
}

impl<T: crate::cpu::Float> Kernel for AddAssign<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (a, &x) in self.a.iter_mut().zip(self.x) {
            *a += x;
        }
    }
}

/// `range` in parts that [`fetch`] can give as one slice each: within a row where rows are long,
/// and no longer than a block where something must be gathered.
fn blocks<const N: usize>(walk: &Walk<N>, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let (short, inner) = (walk.inner < SHORT, walk.inner);
    let longest = if short || walk.strides != [1; N] { BLOCK } else { usize::MAX };
    let mut at = range.start;
    std::iter::from_fn(move || {
        let row_end = if short { range.end } else { (at / inner + 1) * inner };
        let end = row_end.min(range.end).min(at.saturating_add(longest));
        (at < range.end).then(|| std::mem::replace(&mut at, end)..end)
    })
}

/// The elements `part` of view `n` in walking order: where they lie if that is in a row, else
/// gathered into `block`.
fn fetch<'a, T: Element, const N: usize>(
    data: &'a [T],
    walk: &Walk<N>,
    n: usize,
    part: Range<usize>,
    block: &'a mut [T; BLOCK],
) -> &'a [T] {
    let (row, col, stride) = (part.start / walk.inner, part.start % walk.inner, walk.strides[n]);
    let len = part.len();
    if stride == 1 && col + len <= walk.inner {
        let at = walk.row(row)[n] + col;
        return &data[at..at + len];
    }
    walk.parts(part, |starts, from, len| {
        let (data, block) = (&data[starts[n]..], &mut block[from..from + len]);
        match stride {
            0 => block.fill(data[0]),
            1 => block.copy_from_slice(&data[..len]),
            _ => block.iter_mut().zip(data.iter().step_by(stride)).for_each(|(to, &x)| *to = x),
        }
    });
    &block[..len]
}
