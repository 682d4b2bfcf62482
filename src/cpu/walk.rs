//! Walking several layouts of one shape together.

use crate::shape::{Layout, MAX_RANK};

/// The order in which the elements of `N` layouts of one shape are visited: rows of `inner`
/// elements with a constant stride in each layout. Neighbouring dimensions are merged where all
/// layouts allow it, so a contiguous tensor is one row.
#[derive(Clone, Debug)]
pub(crate) struct Walk<const N: usize> {
    outer: [(usize, [usize; N]); MAX_RANK],
    outer_len: usize,
    /// Elements in a row.
    pub(crate) inner: usize,
    /// The stride within a row, for each layout.
    pub(crate) strides: [usize; N],
    start: [usize; N],
}

impl<const N: usize> Walk<N> {
    pub(crate) fn new(layouts: [&Layout; N]) -> Walk<N> {
        let shape = layouts[0].shape();
        debug_assert!(layouts.iter().all(|l| l.shape() == shape));
        let mut dims = [(1, [0; N]); MAX_RANK];
        let mut len = 0;
        for (i, &size) in shape.iter().enumerate().filter(|&(_, &size)| size != 1) {
            let strides = layouts.map(|l| l.strides()[i]);
            let merges = len > 0 && (0..N).all(|n| dims[len - 1].1[n] == size * strides[n]);
            if merges {
                dims[len - 1] = (dims[len - 1].0 * size, strides);
            } else {
                dims[len] = (size, strides);
                len += 1;
            }
        }
        let (inner, strides) = if len > 0 { dims[len - 1] } else { (1, [1; N]) };
        let outer_len = len.saturating_sub(1);
        Walk { outer: dims, outer_len, inner, strides, start: layouts.map(|l| l.offset()) }
    }

    /// The number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.outer[..self.outer_len].iter().map(|d| d.0).product()
    }

    /// Where row `row` starts in each layout.
    pub(crate) fn row(&self, row: usize) -> [usize; N] {
        let (mut at, mut rest) = (self.start, row);
        for (size, strides) in self.outer[..self.outer_len].iter().rev() {
            let i = rest % size;
            rest /= size;
            for n in 0..N {
                at[n] += i * strides[n];
            }
        }
        at
    }

    /// Calls `f(starts, from, len)` for the parts of rows that make up the elements
    /// `range` in walking order: `starts` is where the part starts in each layout, `from..from+len`
    /// where it lies within `range`.
    #[inline(always)]
    pub(crate) fn parts(&self, range: std::ops::Range<usize>, mut f: impl FnMut([usize; N], usize, usize)) {
        let mut at = range.start;
        while at < range.end {
            let (row, col) = (at / self.inner, at % self.inner);
            let len = (self.inner - col).min(range.end - at);
            let mut starts = self.row(row);
            starts.iter_mut().zip(&self.strides).for_each(|(start, stride)| *start += col * stride);
            f(starts, at - range.start, len);
            at += len;
        }
    }
}
