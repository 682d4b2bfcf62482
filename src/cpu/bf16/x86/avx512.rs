//! The kernel in the AVX512-BF16 instructions.
//!
//! VDPBF16PS adds to each of sixteen f32 sums the product of the upper halves of two pairs and then that
//! of the lower halves, and VCVTNE2PS2BF16 rounds 32 numbers to nearest even. Every step rounds once, with
//! denormal operands and results taken for 0 whatever the processor's modes are (Intel's manual, volume 2).
//! The loop over k compiles to 3 loads, 8 broadcasts, 24 VDPBF16PS and 3 instructions of control, in 28 registers
//! and without spills.

use std::arch::x86_64::*;

use super::{low, pack};
use crate::cpu::bf16::micro::{COLS, LANES, MicroKernel, PAIRS, Packed, Strip};
use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::cpu::simd::prefetch;

/// Rows of the tile in registers: 24 registers of sums, 3 of b and 1 of a make 28 of the 32, and 24 sums
/// between one use of a register and the next hide the instruction's latency.
const ROWS: usize = 8;
/// Registers that a row of the tile takes.
const WIDE: usize = COLS / LANES;

/// The AVX512-BF16 instructions. A value exists only where [`Avx512::detect`] has found them, with all
/// other features that the functions below are compiled for: what makes calling them sound.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu::bf16) struct Avx512(());

impl Avx512 {
    /// The instructions, where the processor and the operating system have them.
    pub(in crate::cpu::bf16) fn detect() -> Option<Avx512> {
        let found = is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw");
        found.then_some(Avx512(()))
    }
}

impl MicroKernel for Avx512 {
    const ROWS: usize = ROWS;

    fn pack(self, x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]) {
        // SAFETY: `self` shows that the processor has every feature that the function is compiled for.
        unsafe { pack::pack(x, lanes, layout, out) }
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
            prefetch(tile.c.wrapping_add(r * tile.c_row + v * LANES));
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
