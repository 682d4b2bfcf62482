//! Matrix products whose factors are rounded to bf16, with sums in f32: what [`Precision::Bf16`] is.
//!
//! The sibling of [`gemm`](crate::cpu::gemm), cut up in the same way as most are: a block of b and in
//! turn blocks of a are rounded and packed so that the kernel reads both in order, and the kernel keeps
//! a tile of c in registers while it runs along k. A task has some rows of c and all of the packed k, so that
//! they stay in its cache. What decides the order of a sum is constant or follows from the shape: the same call
//! gives the same bits on any number of threads.
//!
//! Only the kernel ([`x86`]) depends on the processor: AMX's tiles, or AVX512-BF16's vectors. The bits of each
//! are those of a twin in plain code ([`micro`] says in what order is summed), which the tests use everywhere.
//! Where no instructions are faster than f32's, layers are computed in f32.

// Other processors' instructions are not used so far.
#![cfg_attr(not(any(test, target_arch = "x86_64")), allow(dead_code))]

mod micro;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::Arc;

use crate::cpu::gemm::{Mat, MatMut, Onto, Threads, gemm_onto};
use crate::cpu::parallel;
use crate::device::{CpuDevice, Precision};
use crate::error::Result;
use micro::{COLS, DEPTH, LANES, MicroKernel, PAIRS, Packed, Strip};

/// Rows of a and c in one task, at most: their packed part of a is 72 KiB, for the second cache.
const HEIGHT: usize = 96;
/// Pieces of k that are packed of b at a time, at most.
const DEPTHS: usize = 4;
/// Numbers of b that are packed at a time, at most: 2.25 MiB.
const PACKED: usize = 3072 * DEPTH;

impl Precision {
    /// Whether this processor computes layers in this precision. Where it does not, they are computed in
    /// f32.
    pub fn is_native(self) -> bool {
        self == Precision::F32 || micro::is_native()
    }
}

/// A product with fewer rows or columns than this is computed in f32: rounding a factor costs about as
/// much as 32 of its numbers' products, and would be repaid by few.
const WORTHWHILE: usize = 64;

/// The product of one layer for one element type.
pub(crate) trait LayerGemm: Sized {
    /// c ← alpha·a·b + what it is put onto, as [`gemm_onto`] on the caller's pool, in the precision that
    /// the device computes layers in.
    fn layer_gemm(
        device: &Arc<CpuDevice>,
        alpha: Self,
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        onto: Onto<'_, Self>,
        c: MatMut<'_, Self>,
    ) -> Result<()>;
}

impl LayerGemm for f64 {
    fn layer_gemm(
        device: &Arc<CpuDevice>,
        alpha: f64,
        a: Mat<'_, f64>,
        b: Mat<'_, f64>,
        onto: Onto<'_, f64>,
        c: MatMut<'_, f64>,
    ) -> Result<()> {
        gemm_onto(alpha, a, b, onto, c, Threads::Pool(device));
        Ok(())
    }
}

impl LayerGemm for f32 {
    fn layer_gemm(
        device: &Arc<CpuDevice>,
        alpha: f32,
        a: Mat<'_, f32>,
        b: Mat<'_, f32>,
        onto: Onto<'_, f32>,
        c: MatMut<'_, f32>,
    ) -> Result<()> {
        if device.precision() == Precision::Bf16
            && c.rows.min(c.cols) >= WORTHWHILE
            && a.cols > 0
            && alpha != 0.0
        {
            #[cfg(test)]
            if device.emulates_bf16() {
                return product(micro::Emulated::<8>(micro::Order::Pairs), device, alpha, a, b, onto, c);
            }
            #[cfg(target_arch = "x86_64")]
            match x86::fastest() {
                Some(x86::Fastest::Amx(kernel)) => return product(kernel, device, alpha, a, b, onto, c),
                Some(x86::Fastest::Avx512(kernel)) => return product(kernel, device, alpha, a, b, onto, c),
                None => {}
            }
        }
        gemm_onto(alpha, a, b, onto, c, Threads::Pool(device));
        Ok(())
    }
}

/// c ← alpha·a·b + what it is put onto, with a and b rounded to bf16; k must not be 0.
fn product<K: MicroKernel>(
    kernel: K,
    device: &Arc<CpuDevice>,
    alpha: f32,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    mut onto: Onto<'_, f32>,
    mut c: MatMut<'_, f32>,
) -> Result<()> {
    assert_eq!((a.rows, b.cols, a.cols), (c.rows, c.cols, b.rows), "product of matrices that do not fit");
    if c.rows == 0 || c.cols == 0 {
        return Ok(());
    }
    // Each task has rows of c to itself: they must lie apart.
    let turned = c.row < c.col;
    if let (Onto::Row(row), true) = (onto, turned) {
        put_row(row, &mut c);
        onto = Onto::Itself(1.0);
    }
    let (a, b, c) = if turned { (b.t(), a.t(), c.t()) } else { (a, b, c) };
    let (m, n, k) = (c.rows, c.cols, a.cols);
    assert!(m == 1 || c.row >= n * c.col, "result overlaps itself");
    let data = &mut c.data[..(m - 1) * c.row + (n - 1) * c.col + 1];
    let (depth, height) = (pieces(k, DEPTH, 2 * LANES), height::<K>(m));
    // A single row may be longer than from one row to the next.
    let task = (height * c.row).max((n - 1) * c.col + 1);
    let deep = k.min(DEPTHS * depth);
    let width = pieces(n, PACKED / deep, COLS);
    let mut packed = device.buffer::<u32>(deep.div_ceil(2) * width + LANES)?;
    for j in (0..n).step_by(width) {
        let width = width.min(n - j);
        for p in (0..k).step_by(deep) {
            let deep = deep.min(k - p);
            let packed = &mut aligned(&mut packed)[..deep.div_ceil(2) * width.next_multiple_of(COLS)];
            pack_b(kernel, b.columns(j, width).rows(p, deep), packed);
            let (a, packed) = (a.columns(p, deep), &*packed);
            let onto = if p == 0 { onto.columns(j..j + width) } else { Onto::Itself(1.0) };
            let cost = height.min(m) * width * deep / 64;
            parallel::each(data.chunks_mut(task).collect(), cost, &|i, data| {
                let (from, rows) = (i * height, height.min(m - i * height));
                let mut packed_a = device.buffer::<u32>(rows.next_multiple_of(K::ROWS) * PAIRS + LANES)?;
                let c = MatMut { data, rows, cols: n, row: c.row, col: c.col }.columns(j, width);
                let factors = (a.rows(from, rows), packed);
                rows_of_c(kernel, alpha, factors, depth, aligned(&mut packed_a), onto, c);
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Rows in one task: fewer where c has few for the threads there are, but two strips of vectors at least.
fn height<K: MicroKernel>(m: usize) -> usize {
    (m / (4 * rayon::current_num_threads())).next_multiple_of(K::ROWS).clamp(16, HEIGHT)
}

/// The buffer from where a line of the cache begins: no load of 16 lanes takes two.
fn aligned(buffer: &mut [u32]) -> &mut [u32] {
    let from = buffer.as_ptr().align_offset(64).min(LANES);
    &mut buffer[from..]
}

/// Makes every row of c this one.
fn put_row(row: &[f32], c: &mut MatMut<'_, f32>) {
    assert_eq!(row.len(), c.cols, "a row that does not fit");
    for i in 0..c.rows {
        for (j, &x) in row.iter().enumerate() {
            c.data[i * c.row + j * c.col] = x;
        }
    }
}

/// The size of the equal pieces, at most `most` each or hardly more, that `all` is cut into: a multiple of `of`.
fn pieces(all: usize, most: usize, of: usize) -> usize {
    all.div_ceil(all.div_ceil(most)).next_multiple_of(of)
}

/// Packs b in panels of COLS columns whose rows are all of b's.
fn pack_b<K: MicroKernel>(kernel: K, b: Mat<'_, f32>, packed: &mut [u32]) {
    let column = b.rows.div_ceil(2) * COLS;
    parallel::rows(packed, column, COLS * b.rows, &|first, columns| {
        for (i, packed) in columns.chunks_exact_mut(column).enumerate() {
            let from = (first + i) * COLS;
            let columns = b.columns(from, COLS.min(b.cols - from));
            kernel.pack(columns.t(), COLS, Packed { pair: COLS, lane: 1 }, packed);
        }
    });
}

/// Some rows of c, from as many rows of a and all packed panels of b, `depth` of k at a time.
fn rows_of_c<K: MicroKernel>(
    kernel: K,
    alpha: f32,
    (a, packed_b): (Mat<'_, f32>, &[u32]),
    depth: usize,
    packed_a: &mut [u32],
    onto: Onto<'_, f32>,
    c: MatMut<'_, f32>,
) {
    for p in (0..a.cols).step_by(depth) {
        let depth = depth.min(a.cols - p);
        kernel.pack(a.columns(p, depth), a.rows, Packed { pair: 1, lane: PAIRS }, packed_a);
        let packed_a = &packed_a[..a.rows.next_multiple_of(K::ROWS) * PAIRS];
        let onto = if p == 0 { onto } else { Onto::Itself(1.0) };
        for (j, column) in packed_b.chunks_exact(a.cols.div_ceil(2) * COLS).enumerate() {
            let columns = j * COLS..c.cols.min((j + 1) * COLS);
            let panel = &column[p / 2 * COLS..][..depth.div_ceil(2) * COLS];
            let c = MatMut { data: &mut *c.data, ..c }.columns(columns.start, columns.len());
            kernel.multiply(Strip { rows: packed_a, panel, alpha, onto: onto.columns(columns), c });
        }
    }
}

#[cfg(test)]
mod tests;
