//! Matrix products. The only file that names a GEMM crate.
//!
//! f32 has kernels of our own (`fma`) on processors with AVX2 or AVX-512 in the default build; everything else goes to
//! `matrixmultiply`: other processors, the lean build, and f64, which gradients are checked in. Threads share out
//! pieces of the result whose sizes follow from the shape alone: the same call gives the same bits on any number of
//! threads.

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
pub(super) mod tests {
    use super::*;
    use crate::device::Device;
    use proptest::prelude::*;

    pub(in crate::cpu) fn random(len: usize, seed: u64) -> Vec<f64> {
        let next = |i: usize| (i as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        (0..len).map(|i| next(i + 1) as f64 / (1u64 << 23) as f64 - 1.0).collect()
    }

    pub(in crate::cpu) fn narrow(numbers: &[f64]) -> Vec<f32> {
        numbers.iter().map(|&x| x as f32).collect()
    }

    /// The slow twin.
    pub(in crate::cpu) fn naive(alpha: f64, a: Mat<'_, f64>, b: Mat<'_, f64>, beta: f64, c: MatMut<'_, f64>) {
        for i in 0..c.rows {
            for j in 0..c.cols {
                let dot: f64 =
                    (0..a.cols).map(|k| a.data[i * a.row + k * a.col] * b.data[k * b.row + j * b.col]).sum();
                let at = &mut c.data[i * c.row + j * c.col];
                *at = alpha * dot + if beta == 0.0 { 0.0 } else { beta * *at };
            }
        }
    }

    fn size() -> impl Strategy<Value = usize> {
        prop_oneof![0usize..20, Just(64), 100usize..300]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn equals_the_slow_twin(
            (m, n, k) in (size(), size(), size()),
            (ta, tb, tc) in any::<(bool, bool, bool)>(),
            pad in 0usize..3,
            beta in prop_oneof![Just(0.0), Just(1.0), Just(-0.5)],
            pool in any::<bool>(),
        ) {
            let mat = |rows: usize, cols: usize, t: bool| if t { (cols, rows) } else { (rows, cols) };
            let ((ar, ac), (br, bc), (cr, cc)) = (mat(m, k, ta), mat(k, n, tb), mat(m, n, tc));
            let (a, b) = (random(ar * (ac + pad), 1), random(br * (bc + pad), 2));
            let view = |data, rows, cols, t: bool| {
                let m = Mat { data, rows, cols, row: cols + pad, col: 1 };
                if t { m.t() } else { m }
            };
            fn out(data: &mut [f64], (rows, cols, pad, t): (usize, usize, usize, bool)) -> MatMut<'_, f64> {
                let m = MatMut { data, rows, cols, row: cols + pad, col: 1 };
                if t { m.t() } else { m }
            }
            let form = (cr, cc, pad, tc);
            let start = random(cr * (cc + pad), 3);
            let (mut want, mut got) = (start.clone(), start.clone());
            let (a, b) = (view(&a[..], ar, ac, ta), view(&b[..], br, bc, tb));
            let device = Device::cpu();
            let threads = if pool { Threads::Pool(device.host()) } else { Threads::One };
            naive(0.7, a, b, beta, out(&mut want, form));
            gemm(0.7, a, b, beta, out(&mut got, form), threads);
            for (g, w) in got.iter().zip(&want) {
                prop_assert!((g - w).abs() < 1e-12 * (k as f64 + 1.0), "{g} {w}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// In f32, each as it is chosen and as large products are computed.
        #[test]
        fn single_precision_equals_the_slow_twin(
            (m, n, k) in (size(), size(), 1usize..900),
            (ta, tb, bias) in any::<(bool, bool, bool)>(),
            pad in 0usize..3,
            beta in prop_oneof![Just(0.0), Just(1.0), Just(-0.5)],
        ) {
            let (m, n) = (m.max(1), n.max(1));
            let mat = |rows: usize, cols: usize, t: bool| if t { (cols, rows) } else { (rows, cols) };
            let ((ar, ac), (br, bc)) = (mat(m, k, ta), mat(k, n, tb));
            // Numbers that f32 holds exactly.
            let (a, b, row) = (random(ar * (ac + pad), 1), random(br * (bc + pad), 2), random(n, 4));
            let (a32, b32, row32) = (narrow(&a), narrow(&b), narrow(&row));
            fn view<T>(data: &[T], (rows, cols, pad, t): (usize, usize, usize, bool)) -> Mat<'_, T> {
                let m = Mat { data, rows, cols, row: cols + pad, col: 1 };
                if t { m.t() } else { m }
            }
            let (a_form, b_form) = ((ar, ac, pad, ta), (br, bc, pad, tb));
            let mut want = if bias { row.repeat(m) } else { random(m * n, 3) };
            let before = narrow(&want);
            let (beta, onto) = match bias {
                true => (1.0, Onto::Row(&row32[..])),
                false => (beta, Onto::Itself(beta as f32)),
            };
            naive(0.5, view(&a, a_form), view(&b, b_form), beta, MatMut::new(&mut want, m, n));
            let (a, b) = (view(&a32[..], a_form), view(&b32[..], b_form));
            let close = |got: &[f32]| {
                got.iter().zip(&want).all(|(&g, &w)| (g as f64 - w).abs() < 1e-5 * (1.0 + (k as f64).sqrt()))
            };
            let device = Device::cpu();
            for threads in [Threads::One, Threads::Pool(device.host())] {
                let mut got = if bias { vec![f32::NAN; m * n] } else { before.clone() };
                gemm_onto(0.5, a, b, onto, MatMut::new(&mut got, m, n), threads);
                prop_assert!(close(&got), "{threads:?}");
            }
            let mut got = if bias { vec![f32::NAN; m * n] } else { before };
            let out = Out { data: got.as_mut_ptr(), rows: m, cols: n, row: n, col: 1 };
            // SAFETY: three matrices within their slices, none of them empty.
            let own = unsafe { f32::own(Threads::Pool(device.host()), 0.5, a, b, onto, out) };
            prop_assert!(!own || close(&got), "as a large product");
        }
    }

    #[test]
    fn single_precision_too() {
        let (m, n, k) = (70, 45, 130);
        let (a, b) = (random(m * k, 5), random(k * n, 6));
        let mut want = vec![0.0; m * n];
        naive(1.0, Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, MatMut::new(&mut want, m, n));
        let (a, b) = (narrow(&a), narrow(&b));
        let (mut got, mut got_lean) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
        let (device, c) = (Device::cpu(), MatMut::new(&mut got, m, n));
        gemm(1.0, Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, c, Threads::Pool(device.host()));
        let out = Out { data: got_lean.as_mut_ptr(), rows: m, cols: n, row: n, col: 1 };
        // SAFETY: three dense matrices of the sizes given.
        unsafe { f32::gemm(1.0, Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, out) };
        for ((g, l), w) in got.iter().zip(&got_lean).zip(&want) {
            assert!((*g as f64 - w).abs() < 1e-4 && (*l as f64 - w).abs() < 1e-4);
        }
    }

    #[test]
    fn nothing_to_sum_leaves_beta_c() {
        let mut c = vec![2.0f32; 6];
        gemm(1.0, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), 0.5, MatMut::new(&mut c, 2, 3), Threads::One);
        assert_eq!(c, [1.0; 6]);
        let mut c = vec![f32::NAN; 6];
        gemm(1.0, Mat::new(&[], 2, 0), Mat::new(&[], 0, 3), 0.0, MatMut::new(&mut c, 2, 3), Threads::One);
        assert_eq!(c, [0.0; 6]);
    }
}
