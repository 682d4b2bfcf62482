//! Strips of 6 × 16 elements in 12 registers of 8 lanes.

use std::arch::x86_64::*;

use super::{AHEAD, Before, Kernel, Left, Right, copied};
use crate::cpu::gemm::{Mat, Out};
use crate::cpu::simd::prefetch_row;

const STRIP: usize = 6;
const WIDTH: usize = 16;

pub(super) const KERNEL: Kernel = Kernel { width: WIDTH, copied: copied::<STRIP>, pack, strip };

pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[target_feature(enable = "avx2,fma")]
unsafe fn pack(b: Mat<'_, f32>, panel: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { pack_columns::<WIDTH>(b, panel) }
}

/// See [`Kernel::pack`], for panels of W columns, 8 or a multiple of it.
///
/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn pack_columns<const W: usize>(b: Mat<'_, f32>, panel: &mut [f32]) {
    let (lines, _) = panel.as_chunks_mut::<W>();
    if b.cols < W || b.col != 1 && b.row != 1 {
        for (i, line) in lines.iter_mut().enumerate() {
            line.fill(0.0);
            for (j, to) in line.iter_mut().enumerate().take(b.cols) {
                *to = b.data[i * b.row + j * b.col];
            }
        }
        return;
    }
    if b.col == 1 {
        for (i, line) in lines.iter_mut().enumerate() {
            prefetch_row(b.data.as_ptr().wrapping_add((i + AHEAD) * b.row), W);
            line.copy_from_slice(&b.data[i * b.row..][..W]);
        }
        return;
    }
    let (columns, whole) = (&b.data[..(W - 1) * b.col + b.rows], b.rows / 8 * 8);
    for i in (0..whole).step_by(8) {
        let to = lines[i..i + 8].as_flattened_mut();
        for j in (0..W).step_by(8) {
            // SAFETY: rows i..i + 8 of these 8 columns lie in `columns`, and in `to`.
            unsafe { transpose(columns.as_ptr().add(j * b.col + i), b.col, to.as_mut_ptr().add(j), W) }
        }
    }
    for (i, line) in lines.iter_mut().enumerate().skip(whole) {
        for (j, to) in line.iter_mut().enumerate() {
            *to = columns[j * b.col + i];
        }
    }
}

/// Writes 8 rows of 8 numbers, `stride` apart, as columns, whose numbers lie in rows `to_stride` apart.
///
/// # Safety
/// All of them must be there, and the processor must have AVX2.
#[target_feature(enable = "avx2,fma")]
unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
    let (mut top, mut bottom) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
    for (i, four) in [(0, &mut top), (4, &mut bottom)] {
        // SAFETY: the caller's.
        unsafe {
            let from = from.add(i * stride);
            let (a, b) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(stride)));
            let (c, d) = (_mm256_loadu_ps(from.add(2 * stride)), _mm256_loadu_ps(from.add(3 * stride)));
            // Pairs of rows, then all four, of both halves of their numbers.
            let (low, low_cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (high, high_cd) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            *four = [
                _mm256_shuffle_ps::<0x44>(low, low_cd),
                _mm256_shuffle_ps::<0xee>(low, low_cd),
                _mm256_shuffle_ps::<0x44>(high, high_cd),
                _mm256_shuffle_ps::<0xee>(high, high_cd),
            ];
        }
    }
    for i in 0..4 {
        // SAFETY: the caller's.
        unsafe {
            let (first, second) = (to.add(i * to_stride), to.add((i + 4) * to_stride));
            _mm256_storeu_ps(first, _mm256_permute2f128_ps::<0x20>(top[i], bottom[i]));
            _mm256_storeu_ps(second, _mm256_permute2f128_ps::<0x31>(top[i], bottom[i]));
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn strip(alpha: f32, a: Left, b: Right, before: Before, c: Out<f32>) -> usize {
    // SAFETY: the caller's.
    unsafe {
        match c.rows {
            STRIP.. => rows::<STRIP>(alpha, a, b, before, c),
            5 => rows::<5>(alpha, a, b, before, c),
            4 => rows::<4>(alpha, a, b, before, c),
            3 => rows::<3>(alpha, a, b, before, c),
            2 => rows::<2>(alpha, a, b, before, c),
            _ => rows::<1>(alpha, a, b, before, c),
        }
    }
}

/// [`strip`] for R rows.
///
/// # Safety
/// R rows of a as long as b has rows, b's rows in the kernel's width, and R rows of c and before as wide as c must be
/// there; the processor must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const R: usize>(alpha: f32, a: Left, b: Right, before: Before, c: Out<f32>) -> usize {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let (mut from, mut line) = (a.data, b.data);
    // What c is added to, or overwritten, is on its way while the products are summed.
    for r in 0..R {
        prefetch_row(c.data.wrapping_add(r * c.row), c.cols);
    }
    for _ in 0..b.rows {
        // SAFETY: the caller's.
        unsafe {
            let (low, high) = (_mm256_loadu_ps(line), _mm256_loadu_ps(line.add(8)));
            for (r, sum) in sums.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*from.add(r * a.row));
                sum[0] = _mm256_fmadd_ps(x, low, sum[0]);
                sum[1] = _mm256_fmadd_ps(x, high, sum[1]);
            }
            // After the last line nothing need be there.
            (from, line) = (from.wrapping_add(a.col), line.wrapping_add(b.row));
        }
    }
    let (alpha, beta) = (_mm256_set1_ps(alpha), before.beta);
    for (r, sum) in sums.iter().enumerate() {
        let (low, high) = (_mm256_mul_ps(alpha, sum[0]), _mm256_mul_ps(alpha, sum[1]));
        // SAFETY: rows of c.cols elements, all 16 of them where they are read and written as vectors.
        unsafe {
            let (before, to) = (before.data.add(r * before.row), c.data.add(r * c.row));
            if c.cols == WIDTH {
                let (mut low, mut high) = (low, high);
                if beta != 0.0 {
                    let beta = _mm256_set1_ps(beta);
                    low = _mm256_fmadd_ps(beta, _mm256_loadu_ps(before), low);
                    high = _mm256_fmadd_ps(beta, _mm256_loadu_ps(before.add(8)), high);
                }
                _mm256_storeu_ps(to, low);
                _mm256_storeu_ps(to.add(8), high);
            } else {
                let mut row = [0.0; WIDTH];
                _mm256_storeu_ps(row.as_mut_ptr(), low);
                _mm256_storeu_ps(row.as_mut_ptr().add(8), high);
                for (j, &sum) in row.iter().enumerate().take(c.cols) {
                    *to.add(j) = if beta != 0.0 { beta.mul_add(*before.add(j), sum) } else { sum };
                }
            }
        }
    }
    R
}
