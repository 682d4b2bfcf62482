//! Strips of 12 × 32 elements in 24 registers of 16 lanes.

use std::arch::x86_64::*;

use super::{Before, Kernel, Left, Right, avx2, copied};
use crate::cpu::gemm::{Mat, Out};
use crate::cpu::simd::{prefetch, prefetch_row};

const STRIP: usize = 12;
const WIDTH: usize = 32;
/// Rows of a panel that the first cache is asked for before they are read: a panel fills it, so they come from the
/// second one, and Intel's processors do not fetch them early enough by themselves.
const AHEAD: usize = 12;

pub(super) const KERNEL: Kernel = Kernel { width: WIDTH, copied: copied::<STRIP>, pack, strip };

pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx512f") && avx2::is_there()
}

#[target_feature(enable = "avx2,fma")]
unsafe fn pack(b: Mat<'_, f32>, panel: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { avx2::pack_columns::<WIDTH>(b, panel) }
}

#[target_feature(enable = "avx512f")]
unsafe fn strip(alpha: f32, a: Left, b: Right, before: Before, c: Out<f32>) -> usize {
    // SAFETY: the caller's.
    unsafe {
        match c.cols {
            ..=16 => lines::<1>(alpha, a, b, before, c),
            _ => lines::<2>(alpha, a, b, before, c),
        }
    }
}

/// [`strip`] for H registers in a row of c: one where c has no more columns, and the other would hold zeros.
///
/// # Safety
/// That of [`strip`], and c must have at most 16·H columns.
#[target_feature(enable = "avx512f")]
unsafe fn lines<const H: usize>(alpha: f32, a: Left, b: Right, before: Before, c: Out<f32>) -> usize {
    // SAFETY: the caller's.
    unsafe {
        match c.rows {
            STRIP.. if (a.row, a.col) == (1, STRIP) => rows::<STRIP, H, true>(alpha, a, b, before, c),
            STRIP.. => rows::<STRIP, H, false>(alpha, a, b, before, c),
            8.. => rows::<8, H, false>(alpha, a, b, before, c),
            6.. => rows::<6, H, false>(alpha, a, b, before, c),
            4.. => rows::<4, H, false>(alpha, a, b, before, c),
            3 => rows::<3, H, false>(alpha, a, b, before, c),
            2 => rows::<2, H, false>(alpha, a, b, before, c),
            _ => rows::<1, H, false>(alpha, a, b, before, c),
        }
    }
}

/// [`strip`] for R rows of H registers; COPIED if R numbers of a lie beside each other, and then the next: their places
/// are constants then, and no arithmetic of addresses competes with the products for the processor's ports.
///
/// # Safety
/// R rows of a as long as b has rows, b's rows in the kernel's width, and R rows of c and before as wide as c, which has
/// at most 16·H columns, must be there; the processor must have AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn rows<const R: usize, const H: usize, const COPIED: bool>(
    alpha: f32,
    a: Left,
    b: Right,
    before: Before,
    c: Out<f32>,
) -> usize {
    let mut sums = [[_mm512_setzero_ps(); H]; R];
    let (mut from, mut line) = (a.data, b.data);
    let (row, col) = if COPIED { (1, R) } else { (a.row, a.col) };
    // What c is added to, or overwritten, is on its way while the products are summed.
    for r in 0..R {
        prefetch_row(c.data.wrapping_add(r * c.row), c.cols);
    }
    for _ in 0..b.rows {
        // With few rows the time goes into loads, and there is none for more.
        if R >= 6 {
            for h in 0..H {
                prefetch(line.wrapping_add(AHEAD * b.row + 16 * h));
            }
        }
        // SAFETY: the caller's.
        unsafe {
            let mut of_b = [_mm512_setzero_ps(); H];
            for (h, of_b) in of_b.iter_mut().enumerate() {
                *of_b = _mm512_loadu_ps(line.add(16 * h));
            }
            for (r, sum) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*from.add(r * row));
                for h in 0..H {
                    sum[h] = _mm512_fmadd_ps(x, of_b[h], sum[h]);
                }
            }
            // After the last line nothing need be there.
            (from, line) = (from.wrapping_add(col), line.wrapping_add(b.row));
        }
    }
    let (alpha, beta) = (_mm512_set1_ps(alpha), _mm512_set1_ps(before.beta));
    for (r, sum) in sums.iter().enumerate() {
        for (h, &sum) in sum.iter().enumerate() {
            let there = c.cols.saturating_sub(16 * h).min(16);
            let there = ((1u32 << there) - 1) as __mmask16;
            let mut sum = _mm512_mul_ps(alpha, sum);
            // SAFETY: of rows of c.cols elements, those that are there.
            unsafe {
                if before.beta != 0.0 {
                    let before = before.data.add(r * before.row).wrapping_add(16 * h);
                    sum = _mm512_fmadd_ps(beta, _mm512_maskz_loadu_ps(there, before), sum);
                }
                _mm512_mask_storeu_ps(c.data.add(r * c.row).wrapping_add(16 * h), there, sum);
            }
        }
    }
    R
}
