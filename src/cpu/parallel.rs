//! Work shared out over the caller's rayon pool.
//!
//! What decides the order of a sum is split by constant sizes, never by the number of threads, so that results
//! do not depend on it. Everything comes down to [`run`], so that the machinery of threads is compiled
//! once instead of once for every closure and type; a call through `dyn` for thousands of elements
//! costs nothing.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::Result;

/// Elements that a thread should get at least: below this, waking it costs more than it saves.
pub(crate) const GRAIN: usize = 64 * 1024;

/// Calls `f(i)` for every i below `n`, in groups of at least `group` to a thread.
pub(crate) fn run(n: usize, group: usize, f: &(dyn Fn(usize) + Sync)) {
    if n <= group {
        return (0..n).for_each(f);
    }
    (0..n).into_par_iter().with_min_len(group).for_each(f);
}

/// Tasks of which each is taken out once, by whichever thread comes to it.
struct Tasks<S>(Vec<Mutex<Option<S>>>);

impl<S> Tasks<S> {
    fn new(tasks: impl Iterator<Item = S>) -> Tasks<S> {
        Tasks(tasks.map(|task| Mutex::new(Some(task))).collect())
    }

    fn take(&self, i: usize) -> Option<S> {
        self.0[i].lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Tasks of `cost` elements each that are worth a thread.
fn group(cost: usize) -> usize {
    (GRAIN / cost.max(1)).max(1)
}

/// Calls `f(i, task)` for every task, `group` or more to a thread.
fn each_task<S: Send>(tasks: impl ExactSizeIterator<Item = S>, group: usize, f: &(dyn Fn(usize, S) + Sync)) {
    let n = tasks.len();
    if n <= group {
        return tasks.enumerate().for_each(|(i, task)| f(i, task));
    }
    let tasks = Tasks::new(tasks);
    run(n, group, &|i| {
        if let Some(task) = tasks.take(i) {
            f(i, task);
        }
    });
}

/// Calls `f(i, chunk)` for the `i`th chunk of `out`, on several threads if there are several.
pub(crate) fn chunks<T: Send>(out: &mut [T], size: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
    each_task(out.chunks_mut(size.max(1)), 1, &|i, chunk| f(i, chunk));
}

/// Calls `f(at, parts)` for parts of several slices of one length, `at` being where they begin; on
/// several threads if that is worth it.
pub(crate) fn together<T: Send, const N: usize>(
    mut slices: [&mut [T]; N],
    f: &(dyn Fn(usize, [&mut [T]; N]) + Sync),
) {
    let mut parts = Vec::new();
    while slices[0].len() > GRAIN {
        parts.push(slices.each_mut().map(|slice| slice.split_off_mut(..GRAIN).unwrap_or_default()));
    }
    parts.push(slices);
    each_task(parts.into_iter(), 1, &|i, part| f(i * GRAIN, part));
}

/// Calls `f(first, rows)` for groups of whole rows of `out`, large enough to be worth a thread;
/// `first` is the number of the group's first row, and `cost` the elements of work in a row.
pub(crate) fn rows<T: Send>(out: &mut [T], row: usize, cost: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
    let group = group(cost);
    chunks(out, group * row, &|i, rows| f(i * group, rows));
}

/// Calls `f(i)` for every i below `n` and collects the results in order; on several threads if
/// each is `cost` elements of work and that is worth it.
pub(crate) fn map<R: Send>(n: usize, cost: usize, f: &(dyn Fn(usize) -> R + Sync)) -> Vec<R> {
    if n <= group(cost) {
        return (0..n).map(f).collect();
    }
    let mut results: Vec<Option<R>> = (0..n).map(|_| None).collect();
    each_task(results.iter_mut(), group(cost), &|i, result| *result = Some(f(i)));
    results.into_iter().flatten().collect()
}

/// A function of the `i`th rows of two slices.
type OfRows<'a, T> = &'a (dyn Fn(usize, &mut [T], &mut [T]) + Sync);

/// Calls `f(i, a_i, b_i)` for the `i`th rows of two slices of as many rows each, where a row is
/// `cost` elements of work.
pub(crate) fn rows_of_two<T: Send>(
    (a, a_row): (&mut [T], usize),
    (b, b_row): (&mut [T], usize),
    cost: usize,
    f: OfRows<'_, T>,
) {
    let rows = a.chunks_mut(a_row.max(1)).zip(b.chunks_mut(b_row.max(1)));
    each_task(rows, group(cost), &|i, (a, b)| f(i, a, b));
}

/// Calls `f(i, task)` for every task; on several threads if each is `cost` elements of work and
/// that is worth it. The error is that of the first task in order that has one.
pub(crate) fn each<S: Send>(
    tasks: Vec<S>,
    cost: usize,
    f: &(dyn Fn(usize, S) -> Result<()> + Sync),
) -> Result<()> {
    let tasks_left = Tasks::new(tasks.into_iter());
    let n = tasks_left.0.len();
    map(n, cost, &|i| tasks_left.take(i).map_or(Ok(()), |task| f(i, task))).into_iter().collect()
}

/// `x` in `n` pieces of one length.
pub(crate) fn pieces<T>(x: &mut [T], n: usize) -> Vec<&mut [T]> {
    let (size, mut rest) = (x.len() / n.max(1), x);
    let mut pieces = Vec::with_capacity(n);
    for _ in 0..n {
        let (piece, after) = rest.split_at_mut(size);
        pieces.push(piece);
        rest = after;
    }
    pieces
}
