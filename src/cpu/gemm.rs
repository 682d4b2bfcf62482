//! Matrix products. The only file that names a GEMM crate.
//!
//! f32 has kernels of our own (`fma`) on processors with AVX2 or AVX-512 in the default build; everything else goes to
//! `matrixmultiply`: other processors, the lean build, and f64, which gradients are checked in. Threads share out
//! pieces of the result; what order a sum has follows from the shape alone: the same call gives the same bits on any
//! number of threads.

use std::ops::Range;
use std::sync::Arc;

use crate::cpu::{Float, parallel};
use crate::device::CpuDevice;

/// A matrix within a slice: element (i, j) at `offset + i·row + j·col`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row: usize,
    pub(crate) col: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A matrix whose rows lie one after another.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Mat { data, rows, cols, row: cols, col: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Mat { rows: self.cols, cols: self.rows, row: self.col, col: self.row, ..self }
    }

    /// Columns `from..from + n`.
    pub(crate) fn columns(self, from: usize, n: usize) -> Self {
        assert!(from + n <= self.cols);
        let data = if self.rows == 0 || n == 0 { &[] } else { &self.data[from * self.col..] };
        Mat { data, cols: n, ..self }
    }

    /// Rows `from..from + n`.
    pub(crate) fn rows(self, from: usize, n: usize) -> Self {
        self.t().columns(from, n).t()
    }
}

/// A matrix that is written to.
#[derive(Debug)]
pub(crate) struct MatMut<'a, T> {
    pub(crate) data: &'a mut [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row: usize,
    pub(crate) col: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// A matrix whose rows lie one after another.
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        MatMut { data, rows, cols, row: cols, col: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        MatMut { rows: self.cols, cols: self.rows, row: self.col, col: self.row, data: self.data }
    }

    /// Columns `from..from + n`.
    pub(crate) fn columns(self, from: usize, n: usize) -> Self {
        assert!(from + n <= self.cols);
        let data = if self.rows == 0 || n == 0 { &mut [] } else { &mut self.data[from * self.col..] };
        MatMut { data, cols: n, rows: self.rows, row: self.row, col: self.col }
    }

    /// Rows `from..from + n`.
    pub(crate) fn rows(self, from: usize, n: usize) -> Self {
        self.t().columns(from, n).t()
    }
}

/// Who works on one product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Threads<'a> {
    /// The calling thread: for products that run beside each other.
    One,
    /// The caller's rayon pool, with memory of this device.
    #[cfg_attr(
        not(all(feature = "fast", target_arch = "x86_64")),
        allow(dead_code, reason = "only kernels of our own ask it for memory")
    )]
    Pool(&'a Arc<CpuDevice>),
}

/// Multiplications that a product shared by several threads has at least: about 0.1 ms of work.
const SHARED: usize = 1 << 22;

/// What a product is added to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Onto<'a, T> {
    /// What the result held, times a factor. Where that is 0, it is not read.
    Itself(T),
    /// This row, in every row: a bias.
    Row(&'a [T]),
}

impl<T: Float> Onto<'_, T> {
    /// The result is overwritten.
    pub(crate) const NOTHING: Self = Onto::Itself(T::ZERO);

    /// For products that add up in one result, which the first of them overwrites.
    pub(crate) fn sum(first: bool) -> Self {
        Onto::Itself(if first { T::ZERO } else { T::ONE })
    }

    /// What these columns of the result are put onto.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        match self {
            Onto::Row(row) => Onto::Row(&row[columns]),
            itself => itself,
        }
    }
}

/// c ← alpha·a·b + beta·c, with a (m×k), b (k×n), c (m×n). Where beta is 0, c is not read. Strides
/// of a and b may be 0.
pub(crate) fn gemm<T: Float>(
    alpha: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    beta: T,
    c: MatMut<'_, T>,
    threads: Threads<'_>,
) {
    gemm_onto(alpha, a, b, Onto::Itself(beta), c, threads);
}

/// c ← alpha·a·b + what it is put onto; see [`gemm`].
pub(crate) fn gemm_onto<T: Float>(
    alpha: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    onto: Onto<'_, T>,
    c: MatMut<'_, T>,
    threads: Threads<'_>,
) {
    assert_eq!((a.rows, b.cols, a.cols), (c.rows, c.cols, b.rows), "product of matrices that do not fit");
    let (m, n, k) = (c.rows, c.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * c.row + (n - 1) * c.col < c.data.len(), "result outside of its slice");
    assert!((m == 1 || c.row > 0) && (n == 1 || c.col > 0), "result overlaps itself");
    assert!(m == 1 || n == 1 || c.row >= n * c.col || c.col >= m * c.row, "result overlaps itself");
    if let Onto::Row(row) = onto {
        assert_eq!(row.len(), n, "a row that does not fit");
    }
    if k == 0 || alpha == T::ZERO {
        return start(onto, c);
    }
    assert!((m - 1) * a.row + (k - 1) * a.col < a.data.len(), "left factor outside of its slice");
    assert!((k - 1) * b.row + (n - 1) * b.col < b.data.len(), "right factor outside of its slice");
    let out = Out { data: c.data.as_mut_ptr(), rows: m, cols: n, row: c.row, col: c.col };
    let threads = if m * n * k < SHARED { Threads::One } else { threads };
    // SAFETY: the assertions above are the contract: every element that the strides reach lies in
    // its slice, and no two elements of c are the same.
    unsafe {
        if T::own(threads, alpha, a, b, onto, out) {
            return;
        }
        match threads {
            Threads::One => one(alpha, a, b, onto, out),
            Threads::Pool(_) => tiles(alpha, a, b, onto, out),
        }
    }
}

/// The product on the calling thread.
///
/// # Safety
/// That of [`Gemm::gemm`].
unsafe fn one<T: Float>(alpha: T, a: Mat<'_, T>, b: Mat<'_, T>, onto: Onto<'_, T>, out: Out<T>) {
    let beta = match onto {
        Onto::Itself(beta) => beta,
        Onto::Row(row) => {
            for i in 0..out.rows {
                for (j, &x) in row.iter().enumerate() {
                    // SAFETY: an element of the result.
                    unsafe { *out.data.add(i * out.row + j * out.col) = x }
                }
            }
            T::ONE
        }
    };
    // SAFETY: the caller's.
    unsafe { T::gemm(alpha, a, b, beta, out) }
}

/// Rows and columns of the result in a tile, about: large enough that each tile's own packing of its
/// factors is a small part of its work.
const TILE: (usize, usize) = (192, 384);

/// The product with the tiles of its result shared out over the pool in one go.
///
/// # Safety
/// That of [`Gemm::gemm`].
unsafe fn tiles<T: Float>(alpha: T, a: Mat<'_, T>, b: Mat<'_, T>, onto: Onto<'_, T>, out: Out<T>) {
    let (rows, cols) = (pieces(out.rows, TILE.0), pieces(out.cols, TILE.1));
    let across = out.cols.div_ceil(cols);
    parallel::run(out.rows.div_ceil(rows) * across, 1, &|i| {
        let (i, j) = (i / across * rows, i % across * cols);
        let (m, n) = (rows.min(out.rows - i), cols.min(out.cols - j));
        let onto = onto.columns(j..j + n);
        // SAFETY: the tile lies within what the caller vouches for, and no other tile has its elements.
        unsafe { one(alpha, a.rows(i, m), b.columns(j, n), onto, out.tile(i, j, m, n)) }
    });
}

/// The size of the equal pieces, about `about` each, that `all` is cut into: a multiple of what all
/// kernels work on at a time.
fn pieces(all: usize, about: usize) -> usize {
    all.div_ceil(all.div_ceil(about)).next_multiple_of(48)
}

/// Where a result goes: a matrix behind a pointer, since tiles of one matrix are no slices of their own.
#[derive(Clone, Copy)]
pub(crate) struct Out<T> {
    pub(super) data: *mut T,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row: usize,
    pub(super) col: usize,
}

// SAFETY: a pointer is no access; who writes through it says why no one else does.
unsafe impl<T> Send for Out<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Out<T> {}

impl<T> Out<T> {
    /// The tile of m rows from i and n columns from j.
    ///
    /// # Safety
    /// It must lie within the matrix.
    pub(super) unsafe fn tile(self, i: usize, j: usize, m: usize, n: usize) -> Out<T> {
        // SAFETY: the caller's.
        Out { data: unsafe { self.data.add(i * self.row + j * self.col) }, rows: m, cols: n, ..self }
    }

    #[cfg(all(feature = "fast", target_arch = "x86_64"))]
    pub(super) fn t(self) -> Out<T> {
        Out { rows: self.cols, cols: self.rows, row: self.col, col: self.row, ..self }
    }
}

/// c ← what a product that is 0 is put onto.
fn start<T: Float>(onto: Onto<'_, T>, c: MatMut<'_, T>) {
    for i in 0..c.rows {
        for j in 0..c.cols {
            let at = &mut c.data[i * c.row + j * c.col];
            *at = match onto {
                Onto::Row(row) => row[j],
                Onto::Itself(beta) if beta == T::ZERO => T::ZERO,
                Onto::Itself(beta) => *at * beta,
            };
        }
    }
}

/// The product for one element type.
pub(crate) trait Gemm: Copy {
    /// c ← alpha·a·b + what it is put onto by a kernel of our own, if there is one for it; whether there was.
    ///
    /// # Safety
    /// That of [`Gemm::gemm`].
    unsafe fn own(
        _: Threads<'_>,
        _: Self,
        _: Mat<'_, Self>,
        _: Mat<'_, Self>,
        _: Onto<'_, Self>,
        _: Out<Self>,
    ) -> bool {
        false
    }

    /// c ← alpha·a·b + beta·c on the calling thread.
    ///
    /// # Safety
    /// Every element that the strides reach must lie in its slice or matrix, the elements of the result
    /// must be distinct and nobody else's, and no dimension may be 0.
    unsafe fn gemm(alpha: Self, a: Mat<'_, Self>, b: Mat<'_, Self>, beta: Self, out: Out<Self>);
}

macro_rules! gemm {
    ($T:ty, $kernel:path) => {
        unsafe fn gemm(alpha: $T, a: Mat<'_, $T>, b: Mat<'_, $T>, beta: $T, out: Out<$T>) {
            // SAFETY: passed on to the caller.
            unsafe {
                $kernel(
                    out.rows,
                    a.cols,
                    out.cols,
                    alpha,
                    a.data.as_ptr(),
                    a.row as isize,
                    a.col as isize,
                    b.data.as_ptr(),
                    b.row as isize,
                    b.col as isize,
                    beta,
                    out.data,
                    out.row as isize,
                    out.col as isize,
                )
            }
        }
    };
}

impl Gemm for f32 {
    #[cfg(all(feature = "fast", target_arch = "x86_64"))]
    unsafe fn own(
        threads: Threads<'_>,
        alpha: f32,
        a: Mat<'_, f32>,
        b: Mat<'_, f32>,
        onto: Onto<'_, f32>,
        out: Out<f32>,
    ) -> bool {
        // SAFETY: the caller's, and the processor has what the kernel needs.
        crate::cpu::fma::Kernel::fastest()
            .is_some_and(|kernel| unsafe { kernel.product(threads, alpha, a, b, onto, out) })
    }

    gemm!(f32, matrixmultiply::sgemm);
}

impl Gemm for f64 {
    gemm!(f64, matrixmultiply::dgemm);
}

#[cfg(test)]
pub(super) mod tests;
