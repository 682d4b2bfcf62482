//! Matrix products whose factors are rounded to bf16, with sums in f32: what [`Precision::Bf16`] is.
//!
//! The sibling of [`gemm`](crate::cpu::gemm), cut up in the same way as most are: a block of b and in
//! turn blocks of a are rounded and packed so that the kernel reads both in order, and the kernel keeps
//! a tile of c in registers while it runs along k. All sizes are constants or follow from the shape:
//! the same call gives the same bits on any number of threads.
//!
//! Only the instruction itself ([`lanes`]) depends on the processor. Where it is missing, layers are
//! computed in f32. It has not run on hardware yet: in an emulator (Bochs 3.0, its Sapphire Rapids) the
//! whole product gave the bits of the arithmetic that the tests use everywhere. The loop over k compiles
//! to 3 loads, 8 broadcasts, 24 VDPBF16PS and 7 instructions of control, in 29 registers and without
//! spills; counted there, 384 rows of 768×768 take 2.1–2.2 instructions for each VDPBF16PS with all
//! packing and writing, where the loop alone takes 1.75.

// Other processors' instructions are not used so far.
#![cfg_attr(not(any(test, target_arch = "x86_64")), allow(dead_code))]

mod lanes;
mod pack;

use std::sync::Arc;

use crate::cpu::gemm::{Mat, MatMut, Onto, Threads, gemm_onto};
use crate::cpu::parallel;
use crate::cpu::simd::Kernel;
use crate::device::{CpuDevice, Precision};
use crate::error::Result;
use lanes::{LANES, Lanes};
use pack::{Packed, pack};

/// Rows and columns of the tile in registers: 24 registers of sums, 3 of b and 1 of a make 28 of the 32,
/// and 24 sums between one use of a register and the next hide the instruction's latency.
const ROWS: usize = 8;
const COLS: usize = 3 * LANES;

/// The part of k that is summed in registers, at most: a panel of b of this depth is 36 KiB, which stays
/// in the first cache while the rows of a go by.
const DEPTH: usize = 384;
/// Pairs between one row of packed a and the next: a constant, so that the kernel reads all rows by one
/// pointer.
const PAIRS: usize = DEPTH / 2;
/// Rows of a and c in one task: their packed part of a is 72 KiB, for the second cache.
const HEIGHT: usize = 96;
/// Columns of b that are packed at a time, at most: 2.25 MiB.
const WIDTH: usize = 3072;

impl Precision {
    /// Whether this processor computes layers in this precision. Where it does not, they are computed in
    /// f32.
    pub fn is_native(self) -> bool {
        self == Precision::F32 || lanes::is_native()
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
        if device.precision() == Precision::Bf16 && c.rows.min(c.cols) >= WORTHWHILE && a.cols > 0 {
            #[cfg(test)]
            if device.emulates_bf16() {
                return product(lanes::Emulated, device, alpha, a, b, onto, c);
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(lanes) = lanes::Avx512::detect() {
                return product(lanes, device, alpha, a, b, onto, c);
            }
        }
        gemm_onto(alpha, a, b, onto, c, Threads::Pool(device));
        Ok(())
    }
}

/// c ← alpha·a·b + what it is put onto, with a and b rounded to bf16; k must not be 0.
fn product<L: Lanes>(
    lanes: L,
    device: &Arc<CpuDevice>,
    alpha: f32,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    onto: Onto<'_, f32>,
    mut c: MatMut<'_, f32>,
) -> Result<()> {
    assert_eq!((a.rows, b.cols, a.cols), (c.rows, c.cols, b.rows), "product of matrices that do not fit");
    if c.rows == 0 || c.cols == 0 {
        return Ok(());
    }
    let beta = match onto {
        Onto::Itself(beta) => beta,
        Onto::Row(row) => {
            put_row(row, &mut c);
            1.0
        }
    };
    // Each task has rows of c to itself: they must lie apart.
    let (a, b, c) = if c.row < c.col { (b.t(), a.t(), c.t()) } else { (a, b, c) };
    let (m, n, k) = (c.rows, c.cols, a.cols);
    assert!(m == 1 || c.row >= n * c.col, "result overlaps itself");
    let data = &mut c.data[..(m - 1) * c.row + (n - 1) * c.col + 1];
    let (width, depth) = (pieces(n, WIDTH, COLS), pieces(k, DEPTH, 2));
    let mut packed = device.buffer::<u32>(depth / 2 * width + LANES)?;
    // Where lines of the cache begin: no load of 16 lanes takes two.
    let aligned = packed.as_ptr().align_offset(64).min(LANES);
    for j in (0..n).step_by(width) {
        let width = width.min(n - j);
        for p in (0..k).step_by(depth) {
            let depth = depth.min(k - p);
            let packed = &mut packed[aligned..][..depth.div_ceil(2) * width.next_multiple_of(COLS)];
            pack_b(lanes, b.columns(j, width).rows(p, depth), packed);
            let (a, packed, beta) = (a.columns(p, depth), &*packed, if p == 0 { beta } else { 1.0 });
            let cost = HEIGHT.min(m) * width * depth / 64;
            parallel::each(data.chunks_mut(HEIGHT * c.row).collect(), cost, &|i, rows| {
                let height = HEIGHT.min(m - i * HEIGHT);
                let mut packed_a = device.buffer::<u32>(height.next_multiple_of(ROWS) * PAIRS)?;
                let c =
                    MatMut { data: rows, rows: height, cols: n, row: c.row, col: c.col }.columns(j, width);
                let a = a.rows(i * HEIGHT, height);
                lanes.run(Rows { lanes, alpha, a, packed_a: &mut packed_a, packed_b: packed, beta, c });
                Ok(())
            })?;
        }
    }
    Ok(())
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

/// The size of the equal pieces, at most `most` each, that `all` is cut into: a multiple of `of`.
fn pieces(all: usize, most: usize, of: usize) -> usize {
    all.div_ceil(all.div_ceil(most)).next_multiple_of(of)
}

/// Packs b in panels of COLS columns.
fn pack_b<L: Lanes>(lanes: L, b: Mat<'_, f32>, packed: &mut [u32]) {
    let panel = b.rows.div_ceil(2) * COLS;
    parallel::rows(packed, panel, COLS * b.rows, &|first, panels| {
        let from = first * COLS;
        let columns = b.columns(from, (panels.len() / panel * COLS).min(b.cols - from));
        lanes.run(Panels { b: columns, panel, packed: panels });
    });
}

/// Packs some panels of b.
struct Panels<'a> {
    b: Mat<'a, f32>,
    panel: usize,
    packed: &'a mut [u32],
}

impl Kernel for Panels<'_> {
    type Element = f32;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (i, packed) in self.packed.chunks_exact_mut(self.panel).enumerate() {
            let columns = self.b.columns(i * COLS, COLS.min(self.b.cols - i * COLS));
            pack(columns.t(), COLS, Packed { pair: COLS, lane: 1 }, packed);
        }
    }
}

/// Some rows of c, from as many rows of a and all packed panels of b.
struct Rows<'a, L> {
    lanes: L,
    alpha: f32,
    a: Mat<'a, f32>,
    packed_a: &'a mut [u32],
    packed_b: &'a [u32],
    beta: f32,
    c: MatMut<'a, f32>,
}

impl<L: Lanes> Kernel for Rows<'_, L> {
    type Element = f32;
    type Out = ();
    #[inline(always)]
    fn run(mut self) {
        pack(self.a, self.a.rows, Packed { pair: 1, lane: PAIRS }, self.packed_a);
        let pairs = self.a.cols.div_ceil(2);
        for (j, panel) in self.packed_b.chunks_exact(pairs * COLS).enumerate() {
            for (i, rows) in self.packed_a.chunks_exact(ROWS * PAIRS).enumerate() {
                let tile = tile(self.lanes, rows, panel);
                write(self.alpha, &tile, self.beta, &mut self.c, (i * ROWS, j * COLS));
            }
        }
    }
}

/// A tile of a·b.
type Tile = [[[f32; LANES]; COLS / LANES]; ROWS];

/// The tile of ROWS rows of packed a and one panel of b.
#[inline(always)]
fn tile<L: Lanes>(lanes: L, rows: &[u32], panel: &[u32]) -> Tile {
    let (rows, (panel, _)) = (rows.as_chunks::<PAIRS>().0, panel.as_chunks::<COLS>());
    let mut sums = [[lanes.zero(); COLS / LANES]; ROWS];
    for (p, b) in panel.iter().enumerate().take(PAIRS) {
        let b = b.as_chunks::<LANES>().0;
        let b: [L::Pairs; COLS / LANES] = std::array::from_fn(|v| lanes.load(&b[v]));
        for (row, sums) in rows.iter().zip(&mut sums) {
            let a = lanes.splat(row[p]);
            for (sum, &b) in sums.iter_mut().zip(&b) {
                *sum = lanes.dot(*sum, a, b);
            }
        }
    }
    let mut tile = [[[0.0; LANES]; COLS / LANES]; ROWS];
    for (to, sums) in tile.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
        lanes.store(*sums, to);
    }
    tile
}

/// c ← alpha·tile + beta·c for the part of the tile that lies within c.
#[inline(always)]
fn write(alpha: f32, tile: &Tile, beta: f32, c: &mut MatMut<'_, f32>, (i, j): (usize, usize)) {
    let cols = COLS.min(c.cols - j);
    for (tile, i) in tile.iter().zip(i..c.rows) {
        let (sums, row) = (&tile.as_flattened()[..cols], &mut c.data[i * c.row + j * c.col..]);
        // A loop of its own where it vectorises.
        match c.col {
            1 => row[..cols].iter_mut().zip(sums).for_each(|(c, &sum)| *c = mix(alpha, sum, beta, *c)),
            step => {
                row.iter_mut().step_by(step).zip(sums).for_each(|(c, &sum)| *c = mix(alpha, sum, beta, *c))
            }
        }
    }
}

#[inline(always)]
fn mix(alpha: f32, sum: f32, beta: f32, c: f32) -> f32 {
    if beta == 0.0 { alpha * sum } else { alpha * sum + beta * c }
}

#[cfg(test)]
mod tests;
