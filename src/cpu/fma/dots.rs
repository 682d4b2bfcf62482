//! Products of so few rows that packing the right factor, whose columns lie one after another (x·Wᵀ), would be most
//! of the work: dot products of rows and columns as they lie, at the speed of memory.

use std::arch::x86_64::*;

use super::Product;
use crate::cpu::gemm::Onto;
use crate::cpu::parallel;

/// Rows of c, at most.
const ROWS: usize = 2;
/// Columns that are read beside each other.
const BESIDE: usize = 4;
/// Columns that a thread takes at a time.
const COLUMNS: usize = 128;

/// Whether this way is for the product.
pub(super) fn fit(product: &Product<'_>) -> bool {
    product.c.rows <= ROWS && product.a.col == 1 && product.b.row == 1
}

/// The product; `shared` by the pool or not.
///
/// # Safety
/// That of [`super::Kernel::product`], for a product that this way fits.
pub(super) unsafe fn product(product: Product<'_>, shared: bool) {
    let c = product.c;
    parallel::run(c.cols.div_ceil(COLUMNS), if shared { 1 } else { usize::MAX }, &|i| {
        let (mut column, end) = (i * COLUMNS, c.cols.min((i + 1) * COLUMNS));
        while column < end {
            let beside = if end - column < BESIDE { 1 } else { BESIDE };
            for row in 0..c.rows {
                // SAFETY: the caller's: these elements of c are nobody else's.
                unsafe {
                    match beside {
                        1 => elements::<1>(&product, row, column),
                        _ => elements::<BESIDE>(&product, row, column),
                    }
                }
            }
            column += beside;
        }
    });
}

/// N elements of a row of c.
///
/// # Safety
/// That of [`product`], and the columns must be there.
#[target_feature(enable = "avx2,fma")]
unsafe fn elements<const N: usize>(product: &Product<'_>, row: usize, column: usize) {
    let &Product { alpha, a, b, onto, c, .. } = product;
    let (k, whole) = (a.cols, a.cols / 8 * 8);
    let mut sums = [_mm256_setzero_ps(); N];
    // SAFETY: k numbers of a row of a and of N columns of b, and N of a row of c: the caller's.
    unsafe {
        let (x, y) = (a.data.as_ptr().add(row * a.row), b.data.as_ptr().add(column * b.col));
        let mut i = 0;
        while i < whole {
            let x = _mm256_loadu_ps(x.add(i));
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_fmadd_ps(x, _mm256_loadu_ps(y.add(j * b.col + i)), *sum);
            }
            i += 8;
        }
        for (j, &sum) in sums.iter().enumerate() {
            let mut lanes = [0.0f32; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), sum);
            let mut dot = (lanes[0] + lanes[4])
                + (lanes[1] + lanes[5])
                + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
            for i in whole..k {
                dot = (*x.add(i)).mul_add(*y.add(j * b.col + i), dot);
            }
            let to = c.data.add(row * c.row + column + j);
            *to = match onto {
                Onto::Row(before) => alpha.mul_add(dot, before[column + j]),
                Onto::Itself(beta) if beta != 0.0 => alpha.mul_add(dot, beta * *to),
                Onto::Itself(_) => alpha * dot,
            };
        }
    }
}
