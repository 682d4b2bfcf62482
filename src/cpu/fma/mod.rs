//! Large products in f32 on x86-64, shared by the threads of the pool.
//!
//! For c = a·b the right factor is packed once, into panels as wide as a few registers, that all threads
//! read; the left one is read where it lies, or a block at a time is copied into the thread's cache where
//! its rows do not lie one after another (dyᵀ·x). A thread takes 48 rows of c at a time, for which a block of a
//! stays in its cache, and walks the panels. The innermost loop holds a strip of c in registers, of 6 × 16
//! elements with AVX2 and 12 × 32 with AVX-512, and reads a number of a for each of its rows and one row of the
//! panel: close to the processor's peak. An element of c is the same sum in the same order wherever it lies, so
//! the result has the same bits on any number of threads.
//!
//! Inner loops are written without closures: one that passes through a function of `core` is inlined by
//! link-time optimisation or not at all.

mod avx2;
mod avx512;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use crate::cpu::gemm::{Mat, Onto, Out};
use crate::cpu::parallel;
use crate::cpu::simd::prefetch;
use crate::device::CpuDevice;

/// Rows of c that a thread takes at a time: a multiple of every kernel's strip.
const ROWS: usize = 48;
/// Terms that are summed in registers before they are added to c, at most: a panel of so many rows stays
/// in the cache.
const DEPTH: usize = 384;
/// Elements that are packed at a time, at most, but for a rounded width: 2 MiB.
const PACKED: usize = 1 << 19;
/// Columns of a piece of c, at least.
const NARROW: usize = 128;
/// Rows that lie far apart are asked for so many before they are read: the processor does not guess them.
const AHEAD: usize = 16;
/// Pieces of a product there should be at least, for processors with many cores.
const PIECES: usize = 16;

/// A line of the cache, which rows of panels begin with.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// What the inner loops read a row of c from before they add to it: `beta` times this. Where beta is 0, it is not
/// read.
#[derive(Clone, Copy)]
struct Before {
    data: *const f32,
    row: usize,
    beta: f32,
}

/// Rows of the left factor: element (i, j) at `data + i·row + j·col`.
#[derive(Clone, Copy)]
struct Left {
    data: *const f32,
    row: usize,
    col: usize,
}

/// What depends on the processor's registers.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    /// Columns of c that are held in registers: a row of a panel.
    width: usize,
    /// Whether left factors whose rows do not lie one after another gain by it too.
    turns: bool,
    /// The rows of c that it takes to make up for packing a right factor whose rows lie one after another.
    fewest: usize,
    /// Writes the columns of b, at most `width`, as a panel: a row of it holds a row of b, and zeros after it.
    pack: unsafe fn(b: Mat<'_, f32>, panel: &mut [f32]),
    /// c ← alpha·a·panel + before for the first rows of c, which has at most `width` columns: as many as it holds
    /// in registers. How many these were.
    strip: unsafe fn(alpha: f32, a: Left, panel: &[f32], before: Before, c: Out<f32>) -> usize,
}

impl Kernel {
    /// Those that this processor has what they need for, the fastest first.
    fn all() -> impl Iterator<Item = Kernel> {
        let kernels = [(avx512::KERNEL, avx512::is_there()), (avx2::KERNEL, avx2::is_there())];
        kernels.into_iter().filter(|(_, is_there)| *is_there).map(|(kernel, _)| kernel)
    }

    /// The fastest, if there is one.
    pub(super) fn fastest() -> Option<Kernel> {
        Kernel::all().next()
    }

    /// c ← alpha·a·b + what it is put onto, if these strides and the memory suit; whether they did.
    ///
    /// # Safety
    /// Every element that the strides reach must lie in its slice or matrix, the elements of c must be
    /// distinct and nobody else's, and no dimension may be 0. The processor must have what the kernel needs.
    pub(super) unsafe fn product(
        self,
        device: &Arc<CpuDevice>,
        alpha: f32,
        a: Mat<'_, f32>,
        b: Mat<'_, f32>,
        onto: Onto<'_, f32>,
        c: Out<f32>,
    ) -> bool {
        // Where columns of c lie one after another instead of rows, cᵀ = bᵀ·aᵀ.
        let turned = c.col != 1 && matches!(onto, Onto::Itself(_));
        let (a, b, c) = if turned { (b.t(), a.t(), c.t()) } else { (a, b, c) };
        let left = a.col == 1 || a.row == 1 && self.turns;
        let right = b.row == 1 || b.col == 1 && c.rows >= self.fewest;
        if !left || !right || c.col != 1 {
            return false;
        }
        let (n, k, wide) = (c.cols, a.cols, self.width);
        let depth = k.div_ceil(k.div_ceil(DEPTH));
        let columns = n.div_ceil(n.div_ceil(PACKED / depth)).next_multiple_of(wide);
        let deep = (PACKED / columns / depth).clamp(1, k.div_ceil(depth)) * depth;
        // A line more than is packed, to begin where a line of the cache does. As much for every product, so that one
        // that is done leaves the next what it asks for.
        let Ok(mut memory) = device.buffer::<f32>((columns * deep).max(PACKED) + 16) else { return false };
        // SAFETY: every pattern of bits is a line.
        let (before, _, _) = unsafe { memory.align_to_mut::<Line>() };
        let first = before.len();
        let Some(data) = memory.get_mut(first..first + columns * deep) else { return false };
        for start in (0..k).step_by(deep) {
            let deep = deep.min(k - start);
            let (a, b) = (a.columns(start, deep), b.rows(start, deep));
            let onto = if start == 0 { onto } else { Onto::Itself(1.0) };
            for from in (0..n).step_by(columns) {
                let width = columns.min(n - from);
                // SAFETY: the caller's, and the processor has what the kernel needs.
                unsafe {
                    let panels = Panels::pack(self, b.columns(from, width), depth, data);
                    panels.product(
                        alpha,
                        a,
                        onto.columns(from..from + width),
                        c.tile(0, from, c.rows, width),
                    );
                }
            }
        }
        true
    }
}

/// The right factor, in panels of a kernel's width and at most `depth` rows: all panels of the first `depth` rows,
/// then those of the next.
struct Panels<'a> {
    kernel: Kernel,
    depth: usize,
    data: &'a [f32],
}

impl<'a> Panels<'a> {
    /// # Safety
    /// The processor must have what the kernel needs.
    unsafe fn pack(kernel: Kernel, b: Mat<'_, f32>, depth: usize, data: &'a mut [f32]) -> Panels<'a> {
        let (wide, across) = (kernel.width, b.cols.div_ceil(kernel.width));
        let data = &mut data[..b.rows.div_ceil(depth) * across * wide * depth];
        parallel::chunks(data, wide * depth, &|i, panel| {
            let (start, first) = (i / across * depth, i % across * wide);
            let b = b.rows(start, depth.min(b.rows - start)).columns(first, wide.min(b.cols - first));
            // SAFETY: the caller's.
            unsafe { (kernel.pack)(b, &mut panel[..b.rows * wide]) }
        });
        Panels { kernel, depth, data }
    }

    /// c ← alpha·a·panels + what it is put onto, in pieces that threads share out.
    ///
    /// # Safety
    /// That of [`Kernel::product`].
    unsafe fn product(&self, alpha: f32, a: Mat<'_, f32>, onto: Onto<'_, f32>, c: Out<f32>) {
        let down = c.rows.div_ceil(ROWS);
        let columns = c.cols.div_ceil(PIECES.div_ceil(down)).max(NARROW).next_multiple_of(self.kernel.width);
        let across = c.cols.div_ceil(columns);
        parallel::run(down * across, 1, &|i| {
            let (i, j) = (i / across * ROWS, i % across * columns);
            let (height, width) = (ROWS.min(c.rows - i), columns.min(c.cols - j));
            // SAFETY: the caller's; no other piece has these elements of c.
            unsafe { self.piece(alpha, a.rows(i, height), onto, c.tile(i, 0, height, c.cols), j..j + width) }
        });
    }

    /// [`Panels::product`] for at most [`ROWS`] rows and these columns.
    ///
    /// # Safety
    /// That of [`Panels::product`].
    unsafe fn piece(
        &self,
        alpha: f32,
        a: Mat<'_, f32>,
        onto: Onto<'_, f32>,
        c: Out<f32>,
        columns: Range<usize>,
    ) {
        let (wide, depth) = (self.kernel.width, self.depth);
        let mut copy = [const { MaybeUninit::uninit() }; ROWS * DEPTH];
        let rows = self.data.chunks(c.cols.div_ceil(wide) * wide * depth);
        for (panels, start) in rows.zip((0..a.cols).step_by(depth)) {
            let a = a.columns(start, depth.min(a.cols - start));
            let left = match a.col {
                1 => Left { data: a.data.as_ptr(), row: a.row, col: 1 },
                _ => copied(a, &mut copy),
            };
            for column in columns.clone().step_by(wide) {
                let panel = &panels[column * depth..][..wide * a.cols];
                // SAFETY: these elements of c are among those that the caller vouches for.
                let c = unsafe { c.tile(0, column, c.rows, wide.min(columns.end - column)) };
                let itself = |beta| Before { data: c.data.cast_const(), row: c.row, beta };
                let before = match onto {
                    Onto::Row(row) if start == 0 => {
                        Before { data: row[column..].as_ptr(), row: 0, beta: 1.0 }
                    }
                    Onto::Itself(beta) if start == 0 => itself(beta),
                    _ => itself(1.0),
                };
                // SAFETY: as above, and as many rows of a and of what c is put onto.
                unsafe { self.strips(alpha, left, panel, before, c) }
            }
        }
    }

    /// c ← alpha·a·panel + before, strip by strip.
    ///
    /// # Safety
    /// As many rows of a as long as the panel, and of `before` as wide as c, must be there.
    unsafe fn strips(&self, alpha: f32, a: Left, panel: &[f32], before: Before, c: Out<f32>) {
        let mut row = 0;
        while row < c.rows {
            // SAFETY: what is left of the caller's rows.
            unsafe {
                let a = Left { data: a.data.add(row * a.row), ..a };
                let before = Before { data: before.data.add(row * before.row), ..before };
                row += (self.kernel.strip)(alpha, a, panel, before, c.tile(row, 0, c.rows - row, c.cols));
            }
        }
    }
}

/// At most [`ROWS`] rows and [`DEPTH`] columns, column after column.
fn copied(a: Mat<'_, f32>, to: &mut [MaybeUninit<f32>; ROWS * DEPTH]) -> Left {
    for (j, column) in to.chunks_exact_mut(ROWS).take(a.cols).enumerate() {
        prefetch_row(a.data.as_ptr().wrapping_add((j + AHEAD) * a.col), a.rows);
        for (to, &from) in column.iter_mut().zip(&a.data[j * a.col..][..a.rows]) {
            to.write(from);
        }
    }
    Left { data: to.as_ptr().cast(), row: 1, col: ROWS }
}

/// Has the cache fetch the lines of `count` numbers from `first` on, which need not be there.
#[inline]
fn prefetch_row(first: *const f32, count: usize) {
    for at in (0..count + 15).step_by(16) {
        prefetch(first.wrapping_add(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::MatMut;
    use crate::cpu::gemm::tests::{naive, narrow, random};
    use crate::device::Device;

    /// Every kernel of this processor, at shapes with and without whole strips, panels and blocks.
    #[test]
    fn every_kernel_equals_the_slow_twin() {
        let shapes =
            [(1, 1, 1), (12, 32, 5), (48, 64, 8), (50, 33, 385), (13, 600, 1900), (7, 1, 800), (97, 300, 17)];
        let all = Kernel::all().map(|kernel| Kernel { fewest: 0, ..kernel });
        for (kernel, (m, n, k)) in all.flat_map(|kernel| shapes.map(|shape| (kernel, shape))) {
            // Numbers that f32 holds exactly.
            let (a, b, start, row) = (random(m * k, 1), random(k * n, 2), random(m * n, 3), random(n, 4));
            let [a32, b32, start32, row32] = [&a, &b, &start, &row].map(|numbers| narrow(numbers));
            for (turned, other, beta) in
                [(false, false, Some(0.0)), (kernel.turns, true, Some(-0.5)), (kernel.turns, false, None)]
            {
                fn view<T>(data: &[T], rows: usize, cols: usize, t: bool) -> Mat<'_, T> {
                    if t { Mat::new(data, cols, rows).t() } else { Mat::new(data, rows, cols) }
                }
                let mut want = if beta.is_some() { start.clone() } else { row.repeat(m) };
                let (left, right) = (view(&a, m, k, turned), view(&b, k, n, other));
                naive(0.7, left, right, beta.unwrap_or(1.0), MatMut::new(&mut want, m, n));
                let onto = beta.map_or(Onto::Row(&row32), |beta| Onto::Itself(beta as f32));
                let mut got = start32.clone();
                let c = Out { data: got.as_mut_ptr(), rows: m, cols: n, row: n, col: 1 };
                let (left, right) = (view(&a32, m, k, turned), view(&b32, k, n, other));
                // SAFETY: the matrices are as large as their slices, and the processor has the kernel.
                assert!(unsafe { kernel.product(Device::cpu().host(), 0.7, left, right, onto, c) });
                for (at, (&got, want)) in got.iter().zip(&want).enumerate() {
                    let apart = (got as f64 - want).abs();
                    assert!(apart < 1e-6 * (k as f64).sqrt(), "{m}×{k}→{n}, {at}: {got} {want}");
                }
            }
        }
    }
}
