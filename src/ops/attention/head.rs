//! One head of attention on one thread, a block of queries at a time. The formulas are derived
//! where the operation is defined.

use crate::cpu::Float;
use crate::cpu::gemm::{Mat, MatMut, Threads, gemm};
use crate::cpu::reduce::{Max, Sum, fold_row, fold_zip};
use crate::cpu::simd::{Kernel, vectorize};
use crate::ops::dropout::{DropoutKey, Times, mask_range};

/// Queries in a block.
const BLOCK: usize = 64;

/// The inputs of one head, and what of its keys may be attended to.
pub(super) struct Head<'a, T> {
    pub(super) q: Mat<'a, T>,
    pub(super) k: Mat<'a, T>,
    pub(super) v: Mat<'a, T>,
    pub(super) scale: f64,
    pub(super) causal: bool,
    pub(super) keys: Option<&'a [bool]>,
    pub(super) dropout: Option<(f64, DropoutKey)>,
    /// Its number in (B, H).
    pub(super) number: usize,
}

/// What forward found for one head, and the gradient of its output.
pub(super) struct Found<'a, T> {
    pub(super) y: Mat<'a, T>,
    pub(super) lse: &'a [T],
    pub(super) dy: Mat<'a, T>,
}

/// Where the gradients of one head go: dq is overwritten, dk and dv (rows one after another) are
/// added to.
pub(super) struct HeadGradients<'a, 'r, T> {
    pub(super) dq: Option<&'a mut [&'r mut [T]]>,
    pub(super) dk: Option<&'a mut [T]>,
    pub(super) dv: Option<&'a mut [T]>,
}

/// Elements of the dropout mask that are made in one go, where a row has fewer.
const MASK: usize = 1024;

/// The scratch that a head with `t` queries and `tk` keys needs: two blocks of probabilities, one of
/// rows of `width`, and a part of the mask.
pub(super) fn scratch_len(t: usize, tk: usize, width: usize) -> usize {
    BLOCK.min(t) * (2 * tk + width) + tk.max(MASK)
}

impl<T: Float> Head<'_, T> {
    /// y (t rows of e) and the log-sum-exp of each query's scores.
    pub(super) fn forward(&self, scratch: &mut [T], y: &mut [&mut [T]], lse: &mut [T]) {
        let (e, most) = (self.v.cols, BLOCK.min(self.q.rows));
        // Where a block sees no key at all, no row below says so.
        lse.fill(T::from_f64(f64::NEG_INFINITY));
        let (p_block, rest) = scratch.split_at_mut(most * self.k.rows);
        let (y_block, mask) = rest.split_at_mut(most * e);
        for (from, n) in self.blocks() {
            let cols = self.scores(from, n, p_block);
            let (p, y_block) = (&mut p_block[..n * cols], &mut y_block[..n * e]);
            self.each_query(from, n, cols, mask, |i, mask| {
                let row = &mut p[(i - from) * cols..][..cols];
                let (seen, unseen) = row.split_at_mut(self.seen(i));
                unseen.fill(T::ZERO);
                lse[i] = vectorize(Softmax { row: seen, keys: self.keys });
                if let Some(mask) = mask {
                    vectorize(Times { x: row, mask });
                }
            });
            let product = MatMut::new(y_block, n, e);
            gemm(T::ONE, Mat::new(p, n, cols), self.v.rows(0, cols), T::ZERO, product, Threads::One);
            copy_rows(y_block, e, &mut y[from..from + n]);
        }
    }

    /// The gradients, given what forward found and dy.
    pub(super) fn backward(&self, found: &Found<'_, T>, scratch: &mut [T], to: HeadGradients<'_, '_, T>) {
        let (d, e, most) = (self.q.cols, self.v.cols, BLOCK.min(self.q.rows));
        let HeadGradients { mut dq, mut dk, mut dv } = to;
        let (p_block, rest) = scratch.split_at_mut(most * self.k.rows);
        let (ds_block, rest) = rest.split_at_mut(most * self.k.rows);
        let (dq_block, mask) = rest.split_at_mut(most * d);
        for (from, n) in self.blocks() {
            let cols = self.scores(from, n, p_block);
            let (p, ds) = (&mut p_block[..n * cols], &mut ds_block[..n * cols]);
            let dy_block = found.dy.rows(from, n);
            let scores_too = dq.is_some() || dk.is_some();
            if scores_too {
                let dp = MatMut::new(ds, n, cols);
                gemm(T::ONE, dy_block, self.v.rows(0, cols).t(), T::ZERO, dp, Threads::One);
            }
            self.each_query(from, n, cols, mask, |i, mask| {
                let row = (i - from) * cols..(i - from + 1) * cols;
                let (p, ds) = (&mut p[row.clone()], &mut ds[row]);
                let (seen, unseen) = p.split_at_mut(self.seen(i));
                unseen.fill(T::ZERO);
                vectorize(Probabilities { row: seen, keys: self.keys, lse: found.lse[i] });
                if scores_too {
                    let (y, dy) = (found.y.rows(i, 1).data, found.dy.rows(i, 1).data);
                    vectorize(ScoreGradient { p, mask, y: &y[..e], dy: &dy[..e], ds });
                }
                if let Some(mask) = mask {
                    vectorize(Times { x: p, mask });
                }
            });
            if let Some(dv) = dv.as_deref_mut() {
                let dv = MatMut::new(&mut dv[..cols * e], cols, e);
                gemm(T::ONE, Mat::new(p, n, cols).t(), dy_block, T::ONE, dv, Threads::One);
            }
            let (scale, ds) = (T::from_f64(self.scale), Mat::new(ds, n, cols));
            if let Some(dq) = dq.as_deref_mut() {
                let dq_block = &mut dq_block[..n * d];
                let product = MatMut::new(dq_block, n, d);
                gemm(scale, ds, self.k.rows(0, cols), T::ZERO, product, Threads::One);
                copy_rows(dq_block, d, &mut dq[from..from + n]);
            }
            if let Some(dk) = dk.as_deref_mut() {
                let dk = MatMut::new(&mut dk[..cols * d], cols, d);
                gemm(scale, ds.t(), self.q.rows(from, n), T::ONE, dk, Threads::One);
            }
        }
    }

    /// The first query and the number of queries of each block.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<T> {
        let t = self.q.rows;
        (0..t).step_by(BLOCK).map(move |from| (from, BLOCK.min(t - from)))
    }

    /// How many keys query `i` sees, padding among them.
    fn seen(&self, i: usize) -> usize {
        let tk = self.k.rows;
        if self.causal { (i + 1 + tk).saturating_sub(self.q.rows) } else { tk }
    }

    /// The scores of queries `from..from + n` for the keys that the last of them sees; how many
    /// those are.
    fn scores(&self, from: usize, n: usize, out: &mut [T]) -> usize {
        let cols = self.seen(from + n - 1);
        let (q, k) = (self.q.rows(from, n), self.k.rows(0, cols));
        gemm(T::from_f64(self.scale), q, k.t(), T::ZERO, MatMut::new(out, n, cols), Threads::One);
        cols
    }

    /// Calls `f` for queries `from..from + n` with the dropout mask of each for its first `cols` keys,
    /// made in `out`.
    fn each_query(
        &self,
        from: usize,
        n: usize,
        cols: usize,
        out: &mut [T],
        mut f: impl FnMut(usize, Option<&[T]>),
    ) {
        let Some((p, key)) = self.dropout else {
            return (from..from + n).for_each(|i| f(i, None));
        };
        let tk = self.k.rows;
        let at_once = (MASK / tk.max(1)).max(1);
        for first in (from..from + n).step_by(at_once) {
            let rows = at_once.min(from + n - first);
            let at = (self.number * self.q.rows + first) as u64 * tk as u64;
            mask_range(key, p, at, &mut out[..(rows - 1) * tk + cols]);
            (0..rows).for_each(|i| f(first + i, Some(&out[i * tk..][..cols])));
        }
    }
}

/// Rows of `width` that lie one after another, to where each belongs.
pub(super) fn copy_rows<T: Float>(from: &[T], width: usize, to: &mut [&mut [T]]) {
    to.iter_mut().zip(from.chunks(width.max(1))).for_each(|(to, from)| to.copy_from_slice(from));
}

/// Scores made into probabilities; returns their log-sum-exp. Without any key that may be attended
/// to, the probabilities are 0.
struct Softmax<'a, T> {
    row: &'a mut [T],
    keys: Option<&'a [bool]>,
}

impl<T: Float> Kernel for Softmax<'_, T> {
    type Element = T;
    type Out = T;
    #[inline(always)]
    fn run(self) -> T {
        let (row, nothing) = (self.row, T::from_f64(f64::NEG_INFINITY));
        if let Some(keys) = self.keys {
            for (s, &attend) in row.iter_mut().zip(keys) {
                *s = if attend { *s } else { nothing };
            }
        }
        let max = fold_row(row, Max);
        if max == nothing {
            row.fill(T::ZERO);
            return nothing;
        }
        for s in row.iter_mut() {
            *s = (*s - max).exp();
        }
        let sum = fold_row(row, Sum);
        let factor = T::ONE / sum;
        for p in row.iter_mut() {
            *p = *p * factor;
        }
        max + sum.ln()
    }
}

/// Scores made into probabilities, given their log-sum-exp.
struct Probabilities<'a, T> {
    row: &'a mut [T],
    keys: Option<&'a [bool]>,
    lse: T,
}

impl<T: Float> Kernel for Probabilities<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        if self.lse == T::from_f64(f64::NEG_INFINITY) {
            return self.row.fill(T::ZERO);
        }
        for s in self.row.iter_mut() {
            *s = (*s - self.lse).exp();
        }
        if let Some(keys) = self.keys {
            for (p, &attend) in self.row.iter_mut().zip(keys) {
                *p = if attend { *p } else { T::ZERO };
            }
        }
    }
}

/// dS = P∘(M∘(dy·vᵀ) − δ) for one query, given dy·vᵀ in `ds`.
struct ScoreGradient<'a, T> {
    p: &'a [T],
    mask: Option<&'a [T]>,
    y: &'a [T],
    dy: &'a [T],
    ds: &'a mut [T],
}

impl<T: Float> Kernel for ScoreGradient<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let delta = fold_zip(self.y, self.dy, Sum, |y, dy| y * dy);
        match self.mask {
            Some(mask) => {
                for ((ds, &p), &m) in self.ds.iter_mut().zip(self.p).zip(mask) {
                    *ds = p * (m * *ds - delta);
                }
            }
            None => {
                for (ds, &p) in self.ds.iter_mut().zip(self.p) {
                    *ds = p * (*ds - delta);
                }
            }
        }
    }
}
