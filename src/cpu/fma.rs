//! Large products in f32 on processors with AVX2 and FMA, shared by the threads of the pool.
//!
//! For c = a·b the right factor is packed once, into panels of 16 columns that all threads read; the
//! left one is read where it lies. A thread takes 48 rows of c at a time, which stay in its cache with
//! the rows of a that they need, and walks the panels. The innermost loop holds 6 × 16 elements of c in
//! registers and reads 6 numbers of a and one row of the panel for 12 multiply-adds of 8 lanes: close to
//! the processor's peak. All sizes are constants, so the result has the same bits on any number of
//! threads.
//!
//! Inner loops are written without closures: one that passes through a function of `core` is inlined by
//! link-time optimisation or not at all.
//!
//! With AVX-512 the kernels of `gemm` are faster and this module steps aside.

use std::arch::x86_64::*;
use std::sync::Arc;

use crate::cpu::gemm::{Mat, Onto, Out};
use crate::cpu::parallel;
use crate::device::CpuDevice;

/// Rows of c that are held in registers.
const STRIP: usize = 6;
/// Columns of c that are held in registers: a row of a panel.
const WIDTH: usize = 16;
/// Rows of c that a thread takes at a time.
const ROWS: usize = 48;
/// Terms that are summed in registers before they are added to c: a panel of so many rows stays in the
/// first cache.
const DEPTH: usize = 384;
/// Columns of c that panels are packed for at a time.
const COLUMNS: usize = 512;
/// Elements that are packed at a time, about: 4 MiB.
const PACKED: usize = 1 << 20;
/// Panels that a thread packs at a time.
const PANELS: usize = 8;

/// A row of a panel: one line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; WIDTH]);

/// Whether this processor is one for this module.
fn suits() -> bool {
    !is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
}

/// c ← alpha·a·b + what it is put onto, if this processor, these strides and the memory suit; whether
/// they did.
///
/// # Safety
/// Every element that the strides reach must lie in its slice or matrix, the elements of c must be
/// distinct and nobody else's, and no dimension may be 0.
pub(super) unsafe fn product(
    device: &Arc<CpuDevice>,
    alpha: f32,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    onto: Onto<'_, f32>,
    c: Out<f32>,
) -> bool {
    if a.col != 1 || c.col != 1 || (b.row != 1 && b.col != 1) || !suits() {
        return false;
    }
    let (m, n, k) = (c.rows, c.cols, a.cols);
    let at_once = (PACKED / k / WIDTH * WIDTH).clamp(4 * WIDTH, COLUMNS);
    let lines = at_once.min(n).div_ceil(WIDTH) * k;
    // One line more than is packed, to begin where a line of the cache does.
    let Ok(mut memory) = device.buffer::<f32>((lines + 1) * WIDTH) else { return false };
    // SAFETY: every pattern of bits is a line.
    let (_, aligned, _) = unsafe { memory.align_to_mut::<Line>() };
    let Some(aligned) = aligned.get_mut(..lines) else { return false };
    for from in (0..n).step_by(at_once) {
        let width = at_once.min(n - from);
        let packed = &mut aligned[..width.div_ceil(WIDTH) * k];
        parallel::chunks(packed, PANELS * k, &|i, panels| {
            for (panel, to) in panels.chunks_mut(k).enumerate() {
                let first = from + (i * PANELS + panel) * WIDTH;
                // SAFETY: the features were found, and the columns lie within b.
                unsafe { pack(b.columns(first, WIDTH.min(n - first)), to) }
            }
        });
        let packed = &*packed;
        parallel::run(m.div_ceil(ROWS), 1, &|i| {
            let rows = ROWS.min(m - i * ROWS);
            // SAFETY: the features were found; the caller vouches for the rest, and no other call has
            // these rows of c.
            unsafe { tile(alpha, a.rows(i * ROWS, rows), packed, onto, c, (i * ROWS, from, width)) }
        });
    }
    true
}

/// The columns of b, at most [`WIDTH`], as a panel: line i holds row i, and zeros after it.
///
/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2,fma")]
unsafe fn pack(b: Mat<'_, f32>, to: &mut [Line]) {
    if b.cols < WIDTH {
        for (i, line) in to.iter_mut().enumerate() {
            let element = |j| if j < b.cols { b.data[i * b.row + j * b.col] } else { 0.0 };
            *line = Line(std::array::from_fn(element));
        }
        return;
    }
    if b.col == 1 {
        for (i, line) in to.iter_mut().enumerate() {
            let row = b.data[i * b.row..][..WIDTH].as_ptr();
            // SAFETY: a row of 16 elements, a line for as many.
            unsafe {
                let to = line.0.as_mut_ptr();
                _mm256_store_ps(to, _mm256_loadu_ps(row));
                _mm256_store_ps(to.add(8), _mm256_loadu_ps(row.add(8)));
            }
        }
        return;
    }
    let (columns, whole) = (&b.data[..(WIDTH - 1) * b.col + b.rows], b.rows / 8 * 8);
    for i in (0..whole).step_by(8) {
        for half in [0, 8] {
            // SAFETY: rows i..i + 8 of these 8 columns lie in `columns`, and so do the lines in `to`.
            unsafe {
                let from = columns.as_ptr().add(half * b.col + i);
                transpose(from, b.col, to[i..i + 8].as_mut_ptr().cast::<f32>().add(half));
            }
        }
    }
    for i in whole..b.rows {
        to[i] = Line(std::array::from_fn(|j| columns[j * b.col + i]));
    }
}

/// Writes 8 rows of 8 numbers, `stride` apart, as columns into 8 lines.
///
/// # Safety
/// All of them must be there, and the processor must have AVX2.
#[target_feature(enable = "avx2,fma")]
unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32) {
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
            let (first, second) = (to.add(i * WIDTH), to.add((i + 4) * WIDTH));
            _mm256_storeu_ps(first, _mm256_permute2f128_ps::<0x20>(top[i], bottom[i]));
            _mm256_storeu_ps(second, _mm256_permute2f128_ps::<0x31>(top[i], bottom[i]));
        }
    }
}

/// The rows of c that belong to `a`, from row `first` on, for the `width` columns from `from` on that
/// were packed.
///
/// # Safety
/// As for [`product`]; the processor must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile(
    alpha: f32,
    a: Mat<'_, f32>,
    packed: &[Line],
    onto: Onto<'_, f32>,
    c: Out<f32>,
    (first, from, width): (usize, usize, usize),
) {
    let k = a.cols;
    let depth = k.div_ceil(k.div_ceil(DEPTH));
    for start in (0..k).step_by(depth) {
        for (j, panel) in packed.chunks(k).enumerate() {
            let panel = &panel[start..k.min(start + depth)];
            let (column, columns) = (from + j * WIDTH, WIDTH.min(width - j * WIDTH));
            for row in (0..a.rows).step_by(STRIP) {
                // SAFETY: the strip's elements of a and c are among those that the caller vouches for.
                unsafe {
                    let c = c.tile(first + row, column, STRIP.min(a.rows - row), columns);
                    let before = match onto {
                        Onto::Row(row) if start == 0 => (row.as_ptr().add(column), 0, 1.0),
                        Onto::Itself(beta) if start == 0 => (c.data.cast_const(), c.row, beta),
                        _ => (c.data.cast_const(), c.row, 1.0),
                    };
                    let a = (a.data.as_ptr().add(row * a.row + start), a.row);
                    match c.rows {
                        6 => strip::<6>(alpha, a, panel, before, c),
                        5 => strip::<5>(alpha, a, panel, before, c),
                        4 => strip::<4>(alpha, a, panel, before, c),
                        3 => strip::<3>(alpha, a, panel, before, c),
                        2 => strip::<2>(alpha, a, panel, before, c),
                        _ => strip::<1>(alpha, a, panel, before, c),
                    }
                }
            }
        }
    }
}

/// c ← alpha·a·panel + beta·before for R rows that lie `a_row` and `before_row` apart. Where beta is 0,
/// `before` is not read.
///
/// # Safety
/// R rows of a as long as the panel, and those of c and before as wide as c, must be there; the
/// processor must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn strip<const R: usize>(
    alpha: f32,
    (mut a, a_row): (*const f32, usize),
    panel: &[Line],
    (before, before_row, beta): (*const f32, usize, f32),
    c: Out<f32>,
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for Line(line) in panel {
        // SAFETY: a line has 16 elements; the rest is the caller's.
        unsafe {
            let (low, high) = (_mm256_load_ps(line.as_ptr()), _mm256_load_ps(line.as_ptr().add(8)));
            for (r, sum) in sums.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*a.add(r * a_row));
                sum[0] = _mm256_fmadd_ps(x, low, sum[0]);
                sum[1] = _mm256_fmadd_ps(x, high, sum[1]);
            }
            a = a.add(1);
        }
    }
    let (alpha, keeps) = (_mm256_set1_ps(alpha), beta != 0.0);
    for (r, sum) in sums.iter().enumerate() {
        let (low, high) = (_mm256_mul_ps(alpha, sum[0]), _mm256_mul_ps(alpha, sum[1]));
        // SAFETY: rows of c.cols elements, all 16 of them where they are read and written as vectors.
        unsafe {
            let (before, to) = (before.add(r * before_row), c.data.add(r * c.row));
            if c.cols == WIDTH {
                let (mut low, mut high) = (low, high);
                if keeps {
                    let beta = _mm256_set1_ps(beta);
                    low = _mm256_fmadd_ps(beta, _mm256_loadu_ps(before), low);
                    high = _mm256_fmadd_ps(beta, _mm256_loadu_ps(before.add(8)), high);
                }
                _mm256_storeu_ps(to, low);
                _mm256_storeu_ps(to.add(8), high);
            } else {
                let mut row = Line([0.0; WIDTH]);
                _mm256_store_ps(row.0.as_mut_ptr(), low);
                _mm256_store_ps(row.0.as_mut_ptr().add(8), high);
                for (j, &sum) in row.0.iter().enumerate().take(c.cols) {
                    *to.add(j) = if keeps { beta.mul_add(*before.add(j), sum) } else { sum };
                }
            }
        }
    }
}
