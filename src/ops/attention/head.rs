//! One head of attention on one thread, a block of queries at a time. The formulas are derived
//! where the operation is defined.

use crate::cpu::Float;
use crate::cpu::gemm::{Mat, MatMut, Threads, gemm};
use crate::cpu::reduce::{Max, Sum, fold_row};
use crate::cpu::simd::{Kernel, vectorize};
use crate::ops::dropout::{DropoutKey, mask_range};

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

/// Where the gradients of one head go: dq is overwritten, dk and dv are added to.
pub(super) struct HeadGradients<'a, T> {
    pub(super) dq: Option<&'a mut [T]>,
    pub(super) dk: Option<&'a mut [T]>,
    pub(super) dv: Option<&'a mut [T]>,
}

/// The scratch that a head with `t` queries and `tk` keys needs: two blocks and a row of the mask.
pub(super) fn scratch_len(t: usize, tk: usize) -> usize {
    (2 * BLOCK.min(t) + 1) * tk
}

impl<T: Float> Head<'_, T> {
    /// y (t×e) and the log-sum-exp of each query's scores.
    pub(super) fn forward(&self, scratch: &mut [T], y: &mut [T], lse: &mut [T]) {
        let e = self.v.cols;
        // Where a block sees no key at all, no row below says so.
        lse.fill(T::from_f64(f64::NEG_INFINITY));
        let (block, mask) = scratch.split_at_mut(BLOCK.min(self.q.rows) * self.k.rows);
        for (from, n) in self.blocks() {
            let cols = self.scores(from, n, block);
            let p = &mut block[..n * cols];
            for (i, row) in (from..).zip(p.chunks_exact_mut(cols.max(1))) {
                let (seen, unseen) = row.split_at_mut(self.seen(i));
                unseen.fill(T::ZERO);
                lse[i] = vectorize(Softmax { row: seen, keys: self.keys });
                if let Some(mask) = self.mask(i, cols, mask) {
                    vectorize(Times { row, mask });
                }
            }
            let y = MatMut::new(&mut y[from * e..(from + n) * e], n, e);
            gemm(T::ONE, Mat::new(p, n, cols), self.v.rows(0, cols), T::ZERO, y, Threads::One);
        }
    }

    /// The gradients, given what forward found and dy.
    pub(super) fn backward(&self, y: &[T], lse: &[T], dy: &[T], scratch: &mut [T], to: HeadGradients<'_, T>) {
        let (d, e) = (self.q.cols, self.v.cols);
        let HeadGradients { mut dq, mut dk, mut dv } = to;
        let len = BLOCK.min(self.q.rows) * self.k.rows;
        let (p_block, rest) = scratch.split_at_mut(len);
        let (ds_block, mask) = rest.split_at_mut(len);
        for (from, n) in self.blocks() {
            let cols = self.scores(from, n, p_block);
            let (p, ds) = (&mut p_block[..n * cols], &mut ds_block[..n * cols]);
            let dy_block = Mat::new(&dy[from * e..(from + n) * e], n, e);
            let scores_too = dq.is_some() || dk.is_some();
            if scores_too {
                let dp = MatMut::new(ds, n, cols);
                gemm(T::ONE, dy_block, self.v.rows(0, cols).t(), T::ZERO, dp, Threads::One);
            }
            let rows = p.chunks_exact_mut(cols.max(1)).zip(ds.chunks_exact_mut(cols.max(1)));
            for (i, (p, ds)) in (from..).zip(rows) {
                let (seen, unseen) = p.split_at_mut(self.seen(i));
                unseen.fill(T::ZERO);
                vectorize(Probabilities { row: seen, keys: self.keys, lse: lse[i] });
                let mask = self.mask(i, cols, mask);
                if scores_too {
                    let (y, dy) = (&y[i * e..(i + 1) * e], &dy[i * e..(i + 1) * e]);
                    vectorize(ScoreGradient { p, mask, y, dy, ds });
                }
                if let Some(mask) = mask {
                    vectorize(Times { row: p, mask });
                }
            }
            if let Some(dv) = dv.as_deref_mut() {
                let dv = MatMut::new(&mut dv[..cols * e], cols, e);
                gemm(T::ONE, Mat::new(p, n, cols).t(), dy_block, T::ONE, dv, Threads::One);
            }
            let (scale, ds) = (T::from_f64(self.scale), Mat::new(ds, n, cols));
            if let Some(dq) = dq.as_deref_mut() {
                let dq = MatMut::new(&mut dq[from * d..(from + n) * d], n, d);
                gemm(scale, ds, self.k.rows(0, cols), T::ZERO, dq, Threads::One);
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

    /// The dropout mask of query `i` for its first keys, made in `out`.
    fn mask<'m>(&self, i: usize, cols: usize, out: &'m mut [T]) -> Option<&'m [T]> {
        let (p, key) = self.dropout?;
        let at = (self.number * self.q.rows + i) as u64 * self.k.rows as u64;
        mask_range(key, p, at, &mut out[..cols]);
        Some(&out[..cols])
    }
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
        let delta: T = self.y.iter().zip(self.dy).map(|(&y, &dy)| y * dy).sum();
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

/// row ← row∘mask.
struct Times<'a, T> {
    row: &'a mut [T],
    mask: &'a [T],
}

impl<T: Float> Kernel for Times<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (p, &m) in self.row.iter_mut().zip(self.mask) {
            *p = *p * m;
        }
    }
}
