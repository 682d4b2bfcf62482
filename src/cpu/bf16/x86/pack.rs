//! Packing: numbers are rounded 32 at a time, and turned in registers where they lie the other way. Where
//! memory is slow is at a line's start, so that what comes next is asked for ahead.

use std::arch::x86_64::*;

use super::low;
use crate::cpu::bf16::micro::{LANES, Packed};
use crate::cpu::gemm::Mat;
use crate::cpu::simd::prefetch;

/// Rows that memory is asked for before they are packed.
const AHEAD: usize = 4;

/// See [`MicroKernel::pack`](crate::cpu::bf16::micro::MicroKernel::pack).
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
pub(super) fn pack(x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]) {
    let pairs = x.cols.div_ceil(2);
    if lanes == 0 || pairs == 0 {
        return;
    }
    assert!((lanes - 1) * layout.lane + (pairs - 1) * layout.pair < out.len());
    assert!(x.rows == 0 || (x.rows - 1) * x.row + (x.cols - 1) * x.col < x.data.len());
    assert!(layout.pair == 1 || layout.lane == 1);
    if x.col == 1 && layout.pair == 1 {
        for lane in 0..lanes {
            pack_row(x, lane, &mut out[lane * layout.lane..][..pairs]);
        }
        return;
    }
    // Along lines of the matrix in memory that are as long as the packed piece has it.
    if x.row == 1 && x.col != 1 {
        for p in (0..pairs).step_by(LANES) {
            for lane in (0..lanes).step_by(LANES) {
                pack_block(x, (lane, lanes), (p, pairs), layout, out);
            }
        }
    } else {
        for lane in (0..lanes).step_by(LANES) {
            for p in (0..pairs).step_by(LANES) {
                pack_block(x, (lane, lanes), (p, pairs), layout, out);
            }
        }
    }
}

/// Packs sixteen pairs of sixteen lanes from `lane` and `p` on, as far as there are lanes and pairs.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn pack_block(
    x: Mat<'_, f32>,
    (lane, lanes): (usize, usize),
    (p, pairs): (usize, usize),
    layout: Packed,
    out: &mut [u32],
) {
    let to = out[lane * layout.lane + p * layout.pair..].as_mut_ptr();
    let step = layout.lane.max(layout.pair);
    let whole = lane + LANES <= x.rows.min(lanes) && 2 * (p + LANES) <= x.cols;
    // SAFETY: whole blocks lie within the matrix, and the packed ones where `pack` has seen that all lanes and
    // pairs have their place.
    unsafe {
        if whole && x.row == 1 && x.col != 1 {
            let lines = across(x.data.as_ptr().add(lane + 2 * p * x.col), x.col);
            return put(&if layout.pair == 1 { turned(&lines) } else { lines }, to, step);
        }
        if whole && x.col == 1 {
            let lines = along(x.data.as_ptr().add(lane * x.row + 2 * p), x.row);
            return put(&if layout.pair == 1 { lines } else { turned(&lines) }, to, step);
        }
        let (numbers, mut packed) = (copy(x, lane, 2 * p), [[0; LANES]; LANES]);
        let lines = along(numbers.as_ptr().cast(), 2 * LANES);
        put(&lines, packed.as_mut_ptr().cast(), LANES);
        for i in 0..LANES.min(lanes - lane) {
            for j in 0..LANES.min(pairs - p) {
                *to.add(i * layout.lane + j * layout.pair) = packed[i][j];
            }
        }
    }
}

/// Part of any matrix: 32 columns of sixteen rows; 0 beyond it.
#[cold]
fn copy(x: Mat<'_, f32>, row: usize, col: usize) -> [[f32; 2 * LANES]; LANES] {
    let mut part = [[0.0; 2 * LANES]; LANES];
    for i in row..x.rows.min(row + LANES) {
        for k in col..x.cols.min(col + 2 * LANES) {
            part[i - row][k - col] = x.data[i * x.row + k * x.col];
        }
    }
    part
}

/// Writes sixteen lines that lie `step` apart.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn put(lines: &[__m512i; LANES], to: *mut u32, step: usize) {
    for i in 0..LANES {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(to.add(i * step).cast(), lines[i]) }
    }
}

/// All pairs of a row of adjacent numbers; 0 beyond the matrix.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn pack_row(x: Mat<'_, f32>, row: usize, out: &mut [u32]) {
    if row >= x.rows {
        return out.fill(0);
    }
    let (from, to) = (x.data[row * x.row..][..x.cols].as_ptr(), out.as_mut_ptr());
    let whole = x.cols / (2 * LANES) * LANES;
    // SAFETY: numbers of the row are read, and the pairs that they make written; outside of the masks are none.
    unsafe {
        for p in (0..whole).step_by(LANES) {
            let line = two(from.add(2 * p), from.wrapping_add(AHEAD * x.row + 2 * p));
            _mm512_storeu_si512(to.add(p).cast(), line);
        }
        let (from, left) = (from.wrapping_add(2 * whole), x.cols - 2 * whole);
        let first = _mm512_maskz_loadu_ps(low(left), from);
        let second = _mm512_maskz_loadu_ps(low(left.saturating_sub(LANES)), from.wrapping_add(LANES));
        let mask = low(out.len() - whole);
        _mm512_mask_storeu_epi32(to.wrapping_add(whole).cast(), mask, narrow(first, second));
    }
}

/// The pairs that 32 numbers make; those from `next` on are asked for.
///
/// # Safety
/// The numbers must be there.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
unsafe fn two(from: *const f32, next: *const f32) -> __m512i {
    prefetch(next);
    prefetch(next.wrapping_add(LANES));
    // SAFETY: the caller's.
    unsafe { narrow(_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(LANES))) }
}

/// Sixteen pairs of each of sixteen rows that lie `row` apart; the sixteen rows after them are asked for.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
unsafe fn along(from: *const f32, row: usize) -> [__m512i; LANES] {
    let mut lines = [_mm512_setzero_si512(); LANES];
    for i in 0..LANES {
        // SAFETY: the caller's.
        unsafe { lines[i] = two(from.add(i * row), from.wrapping_add((LANES + i) * row)) }
    }
    lines
}

/// Sixteen pairs of each of sixteen rows that lie side by side, in columns `col` apart; the columns after them
/// are asked for.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
unsafe fn across(from: *const f32, col: usize) -> [__m512i; LANES] {
    let in_turn = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
        2, 17, 1, 16, 0,
    );
    let mut lines = [_mm512_setzero_si512(); LANES];
    for i in 0..LANES {
        prefetch(from.wrapping_add((2 * LANES + 2 * i) * col));
        prefetch(from.wrapping_add((2 * LANES + 2 * i + 1) * col));
        // SAFETY: the caller's.
        unsafe {
            let first = from.add(2 * i * col);
            let both = narrow(_mm512_loadu_ps(first), _mm512_loadu_ps(first.add(col)));
            lines[i] = _mm512_permutexvar_epi16(in_turn, both);
        }
    }
    lines
}

/// The numbers of both, one after the other, rounded to bf16.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f")]
fn narrow(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes of which every pattern is valid.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// The transpose.
#[inline]
#[target_feature(enable = "avx512f")]
fn turned(x: &[__m512i; LANES]) -> [__m512i; LANES] {
    let (mut twos, mut fours, mut all) = (*x, *x, *x);
    for i in 0..8 {
        twos[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        twos[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for four in 0..4 {
        let i = 4 * four;
        fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
    }
    // Each 128 bits of `fours[4i + j]` hold one column of rows 4i to 4i + 3.
    for j in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(fours[j], fours[j + 4]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(fours[j], fours[j + 4]);
        let even_below = _mm512_shuffle_i32x4::<0x88>(fours[j + 8], fours[j + 12]);
        let odd_below = _mm512_shuffle_i32x4::<0xdd>(fours[j + 8], fours[j + 12]);
        all[j] = _mm512_shuffle_i32x4::<0x88>(even, even_below);
        all[j + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd_below);
        all[j + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even_below);
        all[j + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_below);
    }
    all
}
