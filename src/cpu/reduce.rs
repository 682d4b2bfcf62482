//! Sums and maxima over some of the dimensions of a view.
//!
//! Long rows are cut into chunks of a constant size, each summed in lanes, and the parts combined
//! in order: fast, more exact than one running sum, and the same bits on any number of threads.

use crate::cpu::elementwise::View;
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::walk::Walk;
use crate::cpu::{Float, parallel};
use crate::shape::Layout;

/// A way to make one number out of many.
pub(crate) trait Fold<T>: Copy + Sync + Send {
    fn empty(self) -> T;
    fn join(self, a: T, b: T) -> T;
}

/// a + b.
#[derive(Clone, Copy)]
pub(crate) struct Sum;

impl<T: Float> Fold<T> for Sum {
    #[inline(always)]
    fn empty(self) -> T {
        T::ZERO
    }
    #[inline(always)]
    fn join(self, a: T, b: T) -> T {
        a + b
    }
}

/// The larger; NaN if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Max;

impl<T: Float> Fold<T> for Max {
    #[inline(always)]
    fn empty(self) -> T {
        T::from_f64(f64::NEG_INFINITY)
    }
    #[inline(always)]
    fn join(self, a: T, b: T) -> T {
        a.maximum(b)
    }
}

/// 0 if all are finite, else NaN: x·0 is NaN for an infinity too.
#[derive(Clone, Copy)]
pub(crate) struct Finite;

impl<T: Float> Fold<T> for Finite {
    #[inline(always)]
    fn empty(self) -> T {
        T::ZERO
    }
    #[inline(always)]
    fn join(self, a: T, b: T) -> T {
        a + b * T::ZERO
    }
}

/// Elements of a row that are folded in one go.
const CHUNK: usize = 4096;
const LANES: usize = 64;

/// The fold of a slice.
#[inline(always)]
pub(crate) fn fold_row<T: Float, F: Fold<T>>(x: &[T], fold: F) -> T {
    fold_zip(x, x, fold, |x, _| x)
}

/// The fold of f(a[i], b[i]) for two slices of one length.
#[inline(always)]
pub(crate) fn fold_zip<T: Float, F: Fold<T>>(a: &[T], b: &[T], fold: F, f: impl Fn(T, T) -> T) -> T {
    let mut total = fold.empty();
    for (a, b) in a.chunks(CHUNK).zip(b.chunks(CHUNK)) {
        let mut lanes = [fold.empty(); LANES];
        // The last group may be shorter. Over groups of a length known to the compiler this loop
        // would be unrolled into single additions, which it does not put together again.
        for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
            for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
                *lane = fold.join(*lane, f(a, b));
            }
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] = fold.join(lanes[i], lanes[i + width]);
            }
            width /= 2;
        }
        total = fold.join(total, lanes[0]);
    }
    total
}

/// As [`fold_zip`], the chunks on several threads.
pub(crate) fn fold_zip_parallel<T: Float, F: Fold<T>>(
    a: &[T],
    b: &[T],
    fold: F,
    f: impl Fn(T, T) -> T + Sync + Copy,
) -> T {
    let parts = parallel::map(a.len().div_ceil(CHUNK), CHUNK, &|i| {
        let chunk = i * CHUNK..a.len().min((i + 1) * CHUNK);
        vectorize(Pair { a: &a[chunk.clone()], b: &b[chunk], fold, f })
    });
    parts.into_iter().fold(fold.empty(), |a, b| fold.join(a, b))
}

struct Pair<'a, T, F, G> {
    a: &'a [T],
    b: &'a [T],
    fold: F,
    f: G,
}

impl<T: Float, F: Fold<T>, G: Fn(T, T) -> T> Kernel for Pair<'_, T, F, G> {
    type Element = T;
    type Out = T;
    #[inline(always)]
    fn run(self) -> T {
        fold_zip(self.a, self.b, self.fold, self.f)
    }
}

struct Row<'a, T, F>(&'a [T], F);

impl<T: Float, F: Fold<T>> Kernel for Row<'_, T, F> {
    type Element = T;
    type Out = T;
    #[inline(always)]
    fn run(self) -> T {
        fold_row(self.0, self.1)
    }
}

struct Join<'a, T, F>(&'a mut [T], &'a [T], F);

impl<T: Float, F: Fold<T>> Kernel for Join<'_, T, F> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (a, &x) in self.0.iter_mut().zip(self.1) {
            *a = self.2.join(*a, x);
        }
    }
}

/// Folds the last dimensions of `x`, those after the first `kept`, into `out`.
pub(crate) fn fold<T: Float, F: Fold<T>>(x: View<'_, T>, kept: usize, out: &mut [T], fold: F) {
    let (outer, inner) = split(x.layout, kept);
    let (kept, folded) = (Walk::new([&outer]), Walk::new([&inner]));
    if inner.shape().numel() == 0 || out.is_empty() {
        out.fill(fold.empty());
    } else if out.len() == 1 && folded.strides == [1] && folded.rows() == 1 {
        let x = &x.data[outer.offset()..][..folded.inner];
        out[0] = fold_zip_parallel(x, x, fold, |x, _| x);
    } else if kept.strides == [1] && kept.inner > 1 && folded.strides != [1] {
        by_columns(x.data, &kept, &inner, out, fold);
    } else {
        by_rows(x.data, &kept, &folded, inner.shape().numel(), out, fold);
    }
}

/// The layout of the first `kept` dimensions, and that of the others from position 0.
fn split(layout: &Layout, kept: usize) -> (Layout, Layout) {
    let (mut outer, mut inner) = (*layout, *layout);
    for dim in 0..layout.shape().rank() {
        let whole = layout.shape()[dim].min(1);
        if dim < kept {
            inner = inner.slice(dim, 0..whole).expect("within the dimension");
        } else {
            outer = outer.slice(dim, 0..whole).expect("within the dimension");
        }
    }
    (outer, inner.at(0))
}

/// Each result from its own elements, one result after another.
fn by_rows<T: Float, F: Fold<T>>(
    data: &[T],
    kept: &Walk<1>,
    folded: &Walk<1>,
    cost: usize,
    out: &mut [T],
    fold: F,
) {
    parallel::rows(out, 1, cost, &|first, out| {
        kept.parts(first..first + out.len(), |[start], from, len| {
            for i in 0..len {
                let mut total = fold.empty();
                for row in 0..folded.rows() {
                    let at = start + i * kept.strides[0] + folded.row(row)[0];
                    let part = match folded.strides[0] {
                        1 => vectorize(Row(&data[at..at + folded.inner], fold)),
                        step => strided_row(&data[at..], folded.inner, step, fold),
                    };
                    total = fold.join(total, part);
                }
                out[from + i] = total;
            }
        });
    });
}

/// A row whose elements lie `step` apart (0 for one repeated), gathered a chunk at a time.
fn strided_row<T: Float, F: Fold<T>>(data: &[T], len: usize, step: usize, fold: F) -> T {
    let mut block = [T::ZERO; 256];
    let mut total = fold.empty();
    for from in (0..len).step_by(block.len()) {
        let block = &mut block[..(len - from).min(256)];
        block.iter_mut().enumerate().for_each(|(i, x)| *x = data[(from + i) * step]);
        total = fold.join(total, vectorize(Row(block, fold)));
    }
    total
}

/// Whole rows of results at a time, where neighbouring results have neighbouring elements. Many
/// rows are cut into chunks of a constant number, whose results are then combined in order.
fn by_columns<T: Float, F: Fold<T>>(data: &[T], kept: &Walk<1>, inner: &Layout, out: &mut [T], fold: F) {
    let folded = Walk::new([inner]);
    let (n, width) = (inner.shape().numel(), kept.inner);
    let rows_at_once = (64 * 1024 / width).max(64);
    for (group, out) in out.chunks_mut(width).enumerate() {
        let [start] = kept.row(group);
        let parts = parallel::map(n.div_ceil(rows_at_once), rows_at_once * width, &|c| {
            let mut part = vec![fold.empty(); width];
            folded.parts(c * rows_at_once..n.min((c + 1) * rows_at_once), |[at], _, len| {
                for i in 0..len {
                    let row = start + at + i * folded.strides[0];
                    vectorize(Join(&mut part, &data[row..row + width], fold));
                }
            });
            part
        });
        out.copy_from_slice(&parts[0]);
        for part in &parts[1..] {
            vectorize(Join(out, part, fold));
        }
    }
}
