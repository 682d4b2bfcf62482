//! The kernel in AMX's tiles, where the processor has them and the system lets a program use them.
//!
//! TDPBF16PS multiplies a tile of 16×16 pairs of a by one of b: 16,384 operations in 16 cycles, sixteen times what
//! f32's vectors do. Factors are packed as for [`Avx512`]: sixteen rows of packed a are a tile, and so are sixteen
//! pairs of the columns of a panel. Its order is `Order::Tiles` (see [`micro`](crate::cpu::bf16::micro)), with one
//! rounding a step and denormal numbers taken for 0, whatever the processor's modes are. The loop over k alone, with the panel in the first cache and the
//! rows in the second, reaches 1.9 TFLOP/s on one thread (a Xeon, 2026-11-29); what is left of that in a product is
//! reading, packing and writing matrices in f32.
//!
//! The compiler has no stable names for these instructions, so they are written as assembler, and knows of no
//! tiles: they are set up and given back within [`multiply`], and no tile is alive outside of [`product`].

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;

use super::Avx512;
use crate::cpu::bf16::micro::{COLS, LANES, MicroKernel, PAIRS, Packed, Strip, finish_row};
use crate::cpu::gemm::{Mat, MatMut};
use crate::cpu::simd::prefetch_row;

/// Rows of a tile, and the pairs in each.
const TILE: usize = LANES;
/// Rows of two tiles: with those of COLS columns they make six of sums, which leaves one each for a and b of
/// the eight. Of 13 instructions for 16 pairs six are products, and loads take half of a product's time.
const ROWS: usize = 2 * TILE;
/// Bytes from one pair of a panel to the next, and from one row of sums to the next.
const LINE: usize = 4 * COLS;

/// AMX's tiles with products in bf16, and the vectors that factors are packed with. A value exists only where
/// [`Amx::detect`] has found them and the system's leave to use them: what makes calling the functions below
/// sound.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu::bf16) struct Amx(Avx512);

impl Amx {
    /// The tiles, where the processor has them and the operating system gives leave: to the process for as long as
    /// it lives, whose signals' frames then have room for tiles.
    pub(in crate::cpu::bf16) fn detect() -> Option<Amx> {
        Avx512::detect().filter(|_| has_tiles() && is_permitted()).map(Amx)
    }
}

impl MicroKernel for Amx {
    const ROWS: usize = ROWS;

    fn pack(self, x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]) {
        self.0.pack(x, lanes, layout, out);
    }

    fn multiply(self, strip: Strip<'_>) {
        // SAFETY: `self` shows that there are tiles and every feature that the function is compiled for.
        unsafe { multiply(strip) }
    }
}

/// Whether the processor has tiles, and products of them in bf16.
fn has_tiles() -> bool {
    const TILES: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    #[allow(unused_unsafe, reason = "safe in newer versions of the standard library")]
    // SAFETY: a processor with AVX-512 has this instruction and leaf 7.
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    features & (TILES | BF16) == TILES | BF16
}

/// Asks Linux for leave to use tiles in this process: their state is 8 KiB, which it saves only for those
/// who asked. It says no where it does not know of them.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call reads no memory of the process and writes none.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Others, as Windows, have calls of their own for it.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// The tiles' shapes, as LDTILECFG reads them: all eight of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

const SHAPES: Shapes = {
    let (mut bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (bytes[tile], rows[tile]) = (4 * TILE as u16, TILE as u8);
        tile += 1;
    }
    Shapes { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows }
};

/// Assembler that overwrites tiles.
macro_rules! with_tiles {
    ($($code:tt)*) => {
        asm!(
            $($code)*
            out("tmm0") _,
            out("tmm1") _,
            out("tmm2") _,
            out("tmm3") _,
            out("tmm4") _,
            out("tmm5") _,
            out("tmm6") _,
            out("tmm7") _,
            options(nostack),
        )
    };
}

/// That the tiles are set up on this thread; they are given back at the end, so that the system need not save
/// them and the core can rest.
struct SetUp(PhantomData<*const ()>);

impl SetUp {
    /// # Safety
    /// There must be tiles, and leave to use them, and no other value on this thread.
    unsafe fn new() -> SetUp {
        let shapes = &SHAPES;
        // SAFETY: the caller's; the instruction reads the 64 bytes of the shapes.
        unsafe { with_tiles!("ldtilecfg [{}]", in(reg) shapes,) };
        SetUp(PhantomData)
    }
}

impl Drop for SetUp {
    fn drop(&mut self) {
        // SAFETY: a value exists only where there are tiles.
        unsafe { with_tiles!("tilerelease",) };
    }
}

/// Numbers that begin where a line of the cache does, as every row of them then does.
#[repr(align(64))]
struct Aligned<T>(T);

/// See [`MicroKernel::multiply`].
///
/// # Safety
/// There must be tiles, leave to use them, and every feature that the function is compiled for.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw")]
unsafe fn multiply(strip: Strip<'_>) {
    let Strip { rows, panel, alpha, onto, mut c } = strip;
    assert!(rows.len() >= c.rows.next_multiple_of(ROWS) * PAIRS);
    assert!(panel.len() <= PAIRS * COLS && c.cols <= COLS);
    let pairs = panel.len() / COLS;
    let (whole, left) = (pairs / TILE * TILE, pairs % TILE);
    let (panel, rest) = panel.split_at(whole * COLS);
    let rest = columns_made_up(rest);
    // SAFETY: the caller's; it is the only one in a call, which calls no other.
    let tiles = unsafe { SetUp::new() };
    let mut sums = Aligned([0.0; ROWS * COLS]);
    for i in (0..c.rows).step_by(ROWS) {
        // Of rows made up for the lower tiles, sums are made and left.
        let rows = &rows[i * PAIRS..][..ROWS * PAIRS];
        ask_for(&c, i);
        if whole > 0 {
            product(&tiles, (rows, PAIRS), panel, false, &mut sums);
        }
        if left > 0 {
            let rows = rows_made_up(&rows[whole..], left);
            product(&tiles, (&rows.0, TILE), &rest.0, whole > 0, &mut sums);
        }
        for r in 0..ROWS.min(c.rows - i) {
            finish_row(&sums.0[r * COLS..], alpha, onto, &mut c, i + r);
        }
    }
}

/// Has the cache fetch the rows of c from `i` on, while they are computed.
#[inline(always)]
fn ask_for(c: &MatMut<'_, f32>, i: usize) {
    if c.col == 1 {
        for r in i..c.rows.min(i + ROWS) {
            prefetch_row(c.data.as_ptr().wrapping_add(r * c.row), c.cols);
        }
    }
}

/// A panel of fewer pairs than a tile's, made up with 0.
fn columns_made_up(panel: &[u32]) -> Aligned<[u32; TILE * COLS]> {
    let mut tile = Aligned([0; TILE * COLS]);
    tile.0[..panel.len()].copy_from_slice(panel);
    tile
}

/// The first `pairs` of each row, which are fewer than a tile's, made up with 0.
fn rows_made_up(rows: &[u32], pairs: usize) -> Aligned<[u32; ROWS * TILE]> {
    let mut tile = Aligned([0; ROWS * TILE]);
    for r in 0..ROWS {
        tile.0[r * TILE..][..pairs].copy_from_slice(&rows[r * PAIRS..][..pairs]);
    }
    tile
}

/// sums ← rows·panel, or with `more` that added to them. The rows lie `apart` pairs apart; the panel has a
/// multiple of TILE pairs, and not none.
#[inline(always)]
fn product(
    _: &SetUp,
    (rows, apart): (&[u32], usize),
    panel: &[u32],
    more: bool,
    sums: &mut Aligned<[f32; ROWS * COLS]>,
) {
    let steps = panel.len() / (TILE * COLS);
    assert!(steps > 0 && rows.len() >= (ROWS - 1) * apart + steps * TILE);
    let (upper, sums) = (rows.as_ptr(), sums.0.as_mut_ptr());
    // SAFETY: the tiles are set up. ROWS rows of as many pairs as the panel has were seen to be there, and sums
    // are of ROWS rows; every tile that is used is named.
    unsafe {
        with_tiles!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "tilezero tmm5",
            "test {more:e}, {more:e}",
            "jz 2f",
            "tileloadd tmm0, [{sums} + {line}]",
            "tileloadd tmm1, [{sums} + {line} + 64]",
            "tileloadd tmm2, [{sums} + {line} + 128]",
            "tileloadd tmm3, [{below} + {line}]",
            "tileloadd tmm4, [{below} + {line} + 64]",
            "tileloadd tmm5, [{below} + {line} + 128]",
            "2:",
            // The columns from left to right with the upper rows, and back with the lower ones.
            "tileloadd tmm6, [{upper} + {apart}]",
            "tileloadd tmm7, [{panel} + {line}]",
            "tdpbf16ps tmm0, tmm6, tmm7",
            "tileloadd tmm7, [{panel} + {line} + 64]",
            "tdpbf16ps tmm1, tmm6, tmm7",
            "tileloadd tmm7, [{panel} + {line} + 128]",
            "tdpbf16ps tmm2, tmm6, tmm7",
            "tileloadd tmm6, [{lower} + {apart}]",
            "tdpbf16ps tmm5, tmm6, tmm7",
            "tileloadd tmm7, [{panel} + {line} + 64]",
            "tdpbf16ps tmm4, tmm6, tmm7",
            "tileloadd tmm7, [{panel} + {line}]",
            "tdpbf16ps tmm3, tmm6, tmm7",
            "add {upper}, {wide}",
            "add {lower}, {wide}",
            "add {panel}, {deep}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 64], tmm1",
            "tilestored [{sums} + {line} + 128], tmm2",
            "tilestored [{below} + {line}], tmm3",
            "tilestored [{below} + {line} + 64], tmm4",
            "tilestored [{below} + {line} + 128], tmm5",
            more = in(reg) u32::from(more),
            steps = inout(reg) steps => _,
            upper = inout(reg) upper => _,
            lower = inout(reg) upper.add(TILE * apart) => _,
            panel = inout(reg) panel.as_ptr() => _,
            sums = in(reg) sums,
            below = in(reg) sums.add(TILE * COLS),
            apart = in(reg) 4 * apart,
            line = in(reg) LINE,
            wide = const 4 * TILE,
            deep = const TILE * LINE,
        );
    }
}
