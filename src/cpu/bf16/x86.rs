//! The kernel in the AVX512-BF16 instructions: all that is unsafe about [`super`] is here.
//!
//! VDPBF16PS adds to each of sixteen f32 sums the product of the upper halves of two pairs and then that
//! of the lower halves, and VCVTNE2PS2BF16 rounds 32 numbers to nearest even. Every step rounds once, with
//! denormal operands and results taken for 0 whatever the processor's modes are (Intel's manual, volume 2).
//!
//! Loops here are written without closures and iterators over several slices: those are functions of `core`
//! that are not compiled for these instructions, and where one of them is not inlined, the sums go through
//! memory at a twentieth of the speed.

use std::arch::x86_64::*;

use super::micro::{COLS, LANES, MicroKernel, PAIRS, Packed, ROWS, Strip};
use crate::cpu::gemm::{Mat, MatMut, Onto};

/// Rows that memory is asked for before they are packed: its first answer for a row takes long.
const AHEAD: usize = 4;
/// Registers that a row of the tile takes.
const WIDE: usize = COLS / LANES;

/// The AVX512-BF16 instructions. A value exists only where [`Avx512::detect`] has found them, with all
/// other features that the functions below are compiled for: what makes calling them sound.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

impl Avx512 {
    /// The instructions, where the processor and the operating system have them.
    pub(super) fn detect() -> Option<Avx512> {
        let found = is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw");
        found.then_some(Avx512(()))
    }
}

impl MicroKernel for Avx512 {
    fn pack(self, x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]) {
        // SAFETY: `self` shows that the processor has every feature that the function is compiled for.
        unsafe { pack(x, lanes, layout, out) }
    }

    fn multiply(self, strip: Strip<'_>) {
        // SAFETY: as above.
        unsafe { multiply(strip) }
    }
}

/// See [`MicroKernel::multiply`].
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn multiply(strip: Strip<'_>) {
    let Strip { rows, panel, alpha, onto, c } = strip;
    assert!(
        rows.len() >= c.rows.next_multiple_of(ROWS) * PAIRS && panel.len() <= PAIRS * COLS && c.cols <= COLS
    );
    assert!(c.rows == 0 || c.cols == 0 || (c.rows - 1) * c.row + (c.cols - 1) * c.col < c.data.len());
    if c.col != 1 {
        return multiply_apart(Strip { rows, panel, alpha, onto, c });
    }
    let to = c.data.as_mut_ptr();
    let (before, before_row, beta) = match onto {
        Onto::Itself(beta) => (to.cast_const(), c.row, beta),
        Onto::Row(row) => (row[..c.cols].as_ptr(), 0, 1.0),
    };
    for i in (0..c.rows).step_by(ROWS) {
        let tile = Tile {
            a: rows[i * PAIRS..].as_ptr(),
            alpha,
            before: before.wrapping_add(i * before_row),
            before_row,
            beta,
            c: to.wrapping_add(i * c.row),
            c_row: c.row,
            rows: ROWS.min(c.rows - i),
            cols: c.cols,
        };
        // SAFETY: rows of packed a up to a multiple of ROWS and those of c were seen to be there.
        unsafe { product(tile, panel) }
    }
}

/// At most ROWS×COLS elements of c, and what they are made of beside a panel.
struct Tile {
    /// ROWS rows, PAIRS apart.
    a: *const u32,
    alpha: f32,
    before: *const f32,
    before_row: usize,
    beta: f32,
    c: *mut f32,
    c_row: usize,
    rows: usize,
    cols: usize,
}

/// c ← alpha·a·panel + beta·before. Where beta is 0, `before` is not read.
///
/// # Safety
/// ROWS rows of a as long as the panel, and the rows and columns of c and before, must be there.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
unsafe fn product(tile: Tile, panel: &[u32]) {
    for r in 0..ROWS {
        for v in 0..WIDE {
            // The sums take long enough for it to come from memory meanwhile.
            ask(tile.c.wrapping_add(r * tile.c_row + v * LANES));
        }
    }
    let mut sums = [[_mm512_setzero_ps(); WIDE]; ROWS];
    let (mut a, mut b) = (tile.a, panel.as_ptr());
    for _ in 0..panel.len() / COLS {
        // SAFETY: the caller's, and the pairs of COLS columns in the panel.
        unsafe {
            let b_now: [__m512bh; WIDE] = [load(b), load(b.add(LANES)), load(b.add(2 * LANES))];
            for r in 0..ROWS {
                let a = splat(*a.add(r * PAIRS));
                for v in 0..WIDE {
                    sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, b_now[v]);
                }
            }
            (a, b) = (a.add(1), b.add(COLS));
        }
    }
    let (alpha, beta) = (_mm512_set1_ps(tile.alpha), _mm512_set1_ps(tile.beta));
    for r in 0..ROWS {
        // By constant places: by any other, the sums would lie in memory from the start.
        if r < tile.rows {
            for v in 0..WIDE {
                let (at, mask) = (v * LANES, low(tile.cols.saturating_sub(v * LANES)));
                let mut sum = _mm512_mul_ps(alpha, sums[r][v]);
                // SAFETY: lanes of the mask are columns of this row, the caller's; no others are touched.
                unsafe {
                    if tile.beta != 0.0 {
                        let before = tile.before.wrapping_add(r * tile.before_row + at);
                        let before = _mm512_maskz_loadu_ps(mask, before);
                        sum = _mm512_add_ps(sum, _mm512_mul_ps(beta, before));
                    }
                    _mm512_mask_storeu_ps(tile.c.wrapping_add(r * tile.c_row + at), mask, sum);
                }
            }
        }
    }
}

/// [`multiply`] for a result whose columns lie apart: by way of a copy, tile by tile.
#[cold]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn multiply_apart(strip: Strip<'_>) {
    let c = strip.c;
    let mut copy = [0.0; ROWS * COLS];
    for i in (0..c.rows).step_by(ROWS) {
        let rows = ROWS.min(c.rows - i);
        for r in 0..rows {
            for j in 0..c.cols {
                copy[r * COLS + j] = c.data[(i + r) * c.row + j * c.col];
            }
        }
        let side_by_side = MatMut { data: &mut copy, rows, cols: c.cols, row: COLS, col: 1 };
        multiply(Strip { rows: &strip.rows[i * PAIRS..], c: side_by_side, ..strip });
        for r in 0..rows {
            for j in 0..c.cols {
                c.data[(i + r) * c.row + j * c.col] = copy[r * COLS + j];
            }
        }
    }
}

/// Sixteen pairs.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f")]
unsafe fn load(pairs: *const u32) -> __m512bh {
    // SAFETY: the caller's. Both types are 64 bytes of which every pattern is valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(pairs.cast())) }
}

/// The same pair sixteen times.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f")]
fn splat(pair: u32) -> __m512bh {
    // SAFETY: both types are 64 bytes of which every pattern is valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair.cast_signed())) }
}

/// A mask of the first `n` lanes, or of all.
#[inline]
#[target_feature(enable = "avx512f")]
fn low(n: usize) -> __mmask16 {
    if n >= LANES { !0 } else { !(!0 << n) }
}

/// See [`MicroKernel::pack`].
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn pack(x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]) {
    let pairs = x.cols.div_ceil(2);
    if lanes == 0 || pairs == 0 {
        return;
    }
    assert!((lanes - 1) * layout.lane + (pairs - 1) * layout.pair < out.len());
    assert!(x.rows == 0 || (x.rows - 1) * x.row + (x.cols - 1) * x.col < x.data.len());
    assert!(layout.pair == 1 || layout.lane == 1);
    if x.col == 1 && layout.pair == 1 {
        for lane in 0..lanes {
            row(x, lane, &mut out[lane * layout.lane..][..pairs]);
        }
        return;
    }
    // Along the lines of the matrix in memory, as many as the packed piece has.
    if x.row == 1 && x.col != 1 {
        for p in (0..pairs).step_by(LANES) {
            for lane in (0..lanes).step_by(LANES) {
                let lines = across(x, lane, p);
                let lines = if layout.pair == 1 { turned(&lines) } else { lines };
                put(&lines, (lane, lanes), (p, pairs), layout, out);
            }
        }
    } else {
        for lane in (0..lanes).step_by(LANES) {
            for p in (0..pairs).step_by(LANES) {
                let lines = along(x, lane, p);
                let lines = if layout.pair == 1 { lines } else { turned(&lines) };
                put(&lines, (lane, lanes), (p, pairs), layout, out);
            }
        }
    }
}

/// Writes a block of pairs from `lane` and `p` on, as far as there are lanes and pairs, in lines along the
/// side whose step is 1.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn put(
    lines: &[__m512i; LANES],
    (lane, lanes): (usize, usize),
    (p, pairs): (usize, usize),
    layout: Packed,
    out: &mut [u32],
) {
    let (step, count, mask) = match layout.pair {
        1 => (layout.lane, lanes - lane, low(pairs - p)),
        _ => (layout.pair, pairs - p, low(lanes - lane)),
    };
    let to = out[lane * layout.lane + p * layout.pair..].as_mut_ptr();
    for i in 0..LANES {
        if i < count {
            // SAFETY: `pack` has seen that all pairs and lanes have their place.
            unsafe { _mm512_mask_storeu_epi32(to.wrapping_add(i * step).cast(), mask, lines[i]) }
        }
    }
}

/// All pairs of a row of adjacent numbers; 0 beyond the matrix.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn row(x: Mat<'_, f32>, row: usize, out: &mut [u32]) {
    if row >= x.rows {
        return out.fill(0);
    }
    let (from, to) = (x.data[row * x.row..][..x.cols].as_ptr(), out.as_mut_ptr());
    for p in (0..out.len()).step_by(LANES) {
        let (at, left) = (from.wrapping_add(2 * p), x.cols - 2 * p);
        ask(at.wrapping_add(AHEAD * x.row));
        ask(at.wrapping_add(AHEAD * x.row + LANES));
        // SAFETY: `left` numbers of the row are read and the pairs that they make written.
        unsafe {
            let pairs = two(at, left);
            _mm512_mask_storeu_epi32(to.add(p).cast(), low(out.len() - p), pairs);
        }
    }
}

/// The pairs that the next 32 numbers make, or the `left` ones that there are and zeros.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
unsafe fn two(from: *const f32, left: usize) -> __m512i {
    // SAFETY: the caller's; numbers outside of the masks are not read.
    unsafe {
        let first = _mm512_maskz_loadu_ps(low(left), from);
        let second = _mm512_maskz_loadu_ps(low(left.saturating_sub(LANES)), from.wrapping_add(LANES));
        narrow(first, second)
    }
}

/// Sixteen pairs from pair `p` on, of each of sixteen rows; 0 beyond the matrix.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn along(x: Mat<'_, f32>, row: usize, p: usize) -> [__m512i; LANES] {
    let mut lines = [_mm512_setzero_si512(); LANES];
    let left = x.cols - 2 * p;
    for i in 0..LANES {
        if row + i >= x.rows {
            continue;
        }
        let from = &x.data[(row + i) * x.row + 2 * p * x.col..];
        let mut copy = [0.0; 2 * LANES];
        let mut from = from.as_ptr();
        if x.col != 1 {
            for k in 0..left.min(2 * LANES) {
                copy[k] = x.data[(row + i) * x.row + (2 * p + k) * x.col];
            }
            from = copy.as_ptr();
        }
        // SAFETY: `left` numbers are there, or as many as the copy holds; others are not read.
        unsafe {
            // The same of the rows that are packed next.
            ask(from.wrapping_add(LANES * x.row));
            ask(from.wrapping_add(LANES * x.row + LANES));
            lines[i] = two(from, left);
        }
    }
    lines
}

/// The pair `p` of each of sixteen rows and fifteen pairs after it, in a matrix whose columns lie in one
/// piece; 0 beyond it.
#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
fn across(x: Mat<'_, f32>, row: usize, p: usize) -> [__m512i; LANES] {
    let mut lines = [_mm512_setzero_si512(); LANES];
    if row >= x.rows {
        return lines;
    }
    let mask = low(x.rows - row);
    let in_turn = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
        2, 17, 1, 16, 0,
    );
    for i in 0..LANES {
        let k = 2 * (p + i);
        if k >= x.cols {
            continue;
        }
        // SAFETY: rows within the mask of columns within the matrix.
        unsafe {
            let from = x.data.as_ptr().add(row + k * x.col);
            ask(from.wrapping_add(2 * LANES * x.col));
            ask(from.wrapping_add((2 * LANES + 1) * x.col));
            let first = _mm512_maskz_loadu_ps(mask, from);
            let second_mask = if k + 1 < x.cols { mask } else { 0 };
            let second = _mm512_maskz_loadu_ps(second_mask, from.wrapping_add(x.col));
            lines[i] = _mm512_permutexvar_epi16(in_turn, narrow(first, second));
        }
    }
    lines
}

/// Has the cache fetch a line: a hint, for any address.
#[inline]
#[target_feature(enable = "avx512f")]
#[allow(unused_unsafe, reason = "safe in newer versions of the standard library")]
fn ask(line: *const f32) {
    // SAFETY: it reads nothing that the program sees.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
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
