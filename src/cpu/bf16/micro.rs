//! What the product in [`super`] is built around: packing of a factor, and the result by strips.

use crate::cpu::gemm::{Mat, MatMut, Onto};

/// Numbers in one register.
pub(super) const LANES: usize = 16;
/// Rows and columns of the tile in registers: 24 registers of sums, 3 of b and 1 of a make 28 of the 32,
/// and 24 sums between one use of a register and the next hide the instruction's latency.
pub(super) const ROWS: usize = 8;
pub(super) const COLS: usize = 3 * LANES;
/// The part of k that is summed in registers, at most: a panel of b of this depth is 36 KiB, which stays
/// in the first cache while the rows of a go by.
pub(super) const DEPTH: usize = 384;
/// Pairs between one row of packed a and the next: a constant, so that the kernel reads all rows by one
/// pointer.
pub(super) const PAIRS: usize = DEPTH / 2;

/// How a packed factor lies in memory: the pair `p` of lane `i` at `p·pair + i·lane`. One of the two is 1.
///
/// A pair is a u32: two bf16 numbers that follow each other along k, the first in the lower half.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    pub(super) pair: usize,
    pub(super) lane: usize,
}

/// Some rows and at most COLS columns of a product.
#[derive(Debug)]
pub(super) struct Strip<'a> {
    /// Packed a, made up to a multiple of ROWS rows, PAIRS pairs each, of which as many count as the panel
    /// has.
    pub(super) rows: &'a [u32],
    /// A panel of packed b: COLS lanes side by side for each pair.
    pub(super) panel: &'a [u32],
    pub(super) alpha: f32,
    pub(super) onto: Onto<'a, f32>,
    pub(super) c: MatMut<'a, f32>,
}

/// The arithmetic of the product, as some processor has it. The bits are the same for all of them: for each
/// piece of k, a sum starts with 0 and goes along k in order, and of a pair the second product is added first;
/// then it is multiplied by alpha, and what it is put onto (for the first piece times its factor) is added.
/// Each of these steps rounds once. Denormal numbers in factors and sums of products are taken for 0.
pub(super) trait MicroKernel: Copy + Send + Sync {
    /// Rounds a matrix, whose rows are lanes and whose columns are k, to bf16 and packs it. An odd k is made
    /// up with 0, and so are lanes up to `lanes`, of which the matrix may have fewer.
    fn pack(self, x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]);

    /// c ← alpha·rows·panel + what it is put onto.
    fn multiply(self, strip: Strip<'_>);
}

/// Whether this processor has instructions for these products.
pub(super) fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::x86::Avx512::detect().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The same arithmetic in plain code: what tests the rest of the product on any processor, and the
/// instructions where there are some.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Emulated;

#[cfg(test)]
impl MicroKernel for Emulated {
    fn pack(self, x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]) {
        for i in 0..lanes {
            let number =
                |k: usize| if i < x.rows && k < x.cols { x.data[i * x.row + k * x.col] } else { 0.0 };
            for p in 0..x.cols.div_ceil(2) {
                out[p * layout.pair + i * layout.lane] = pair(number(2 * p), number(2 * p + 1));
            }
        }
    }

    fn multiply(self, strip: Strip<'_>) {
        crate::cpu::simd::vectorize(strip);
    }
}

/// Two numbers that follow each other along k.
#[cfg(test)]
fn pair(first: f32, second: f32) -> u32 {
    (rounded(first) >> 16) | (rounded(second) & 0xffff_0000)
}

/// A number's bits of which the upper half is the bf16 number nearest to it, or to 0 if it is denormal.
#[cfg(test)]
fn rounded(x: f32) -> u32 {
    let bits = normal(x).to_bits();
    // Rounding up could make another number of a NaN.
    let nan = bits | 0x0040_0000;
    if x.is_nan() { nan } else { bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) }
}

/// The number, or 0 with its sign if it is denormal.
#[cfg(test)]
#[inline(always)]
fn normal(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}

/// The product of two bf16 numbers is exact in f32 unless it leaves f32's range, so that a
/// multiplication and an addition round once, as the instruction does.
#[cfg(test)]
impl crate::cpu::simd::Kernel for Strip<'_> {
    type Element = f32;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let upper = |pair: u32| f32::from_bits(pair & 0xffff_0000);
        let lower = |pair: u32| f32::from_bits(pair << 16);
        for i in 0..self.c.rows {
            let mut sums = [0.0; COLS];
            for (b, &a) in self.panel.chunks_exact(COLS).zip(&self.rows[i * PAIRS..]) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = normal(upper(a) * upper(b) + *sum);
                    *sum = normal(lower(a) * lower(b) + *sum);
                }
            }
            for (j, &sum) in sums.iter().enumerate().take(self.c.cols) {
                let c = &mut self.c.data[i * self.c.row + j * self.c.col];
                *c = match self.onto {
                    Onto::Itself(0.0) => self.alpha * sum,
                    Onto::Itself(beta) => self.alpha * sum + beta * *c,
                    Onto::Row(row) => self.alpha * sum + row[j],
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{BF16, Element};
    use proptest::prelude::*;

    /// What the processor has, if anything, and its emulation.
    fn kernels() -> Vec<(&'static str, Pack)> {
        let mut all: Vec<(&'static str, Pack)> =
            vec![("emulated", |x, n, layout, out| Emulated.pack(x, n, layout, out))];
        #[cfg(target_arch = "x86_64")]
        if super::super::x86::Avx512::detect().is_some() {
            all.push(("native", |x, n, layout, out| {
                if let Some(native) = super::super::x86::Avx512::detect() {
                    native.pack(x, n, layout, out);
                }
            }));
        }
        all
    }

    type Pack = fn(Mat<'_, f32>, usize, Packed, &mut [u32]);

    fn bf16(x: f32) -> BF16 {
        BF16::from_f64(if x.is_subnormal() { 0f32.copysign(x) } else { x } as f64)
    }

    proptest! {
        #[test]
        fn rounds_as_storage_does_but_for_denormal_numbers(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            for (name, pack) in kernels() {
                let mut out = [0];
                pack(Mat::new(&[x], 1, 1), 1, Packed { pair: 1, lane: 1 }, &mut out);
                let (got, want) = (BF16(out[0] as u16), bf16(x));
                prop_assert!(got == want || (got.to_f32().is_nan() && x.is_nan()), "{name}: {x:e}: {got:?} {want:?}");
            }
        }

        #[test]
        fn every_number_comes_to_its_place(
            (lanes, k) in (0usize..40, 1usize..70),
            (row_pad, col_pad) in (0usize..3, 0usize..2),
            turned in any::<bool>(),
            lanes_beside_each_other in any::<bool>(),
        ) {
            let (row, col) = match turned {
                false => (k * (1 + col_pad) + row_pad, 1 + col_pad),
                true => (1 + col_pad, lanes * (1 + col_pad) + row_pad),
            };
            let data: Vec<f32> = (0..lanes.max(1) * row + k * col).map(|i| 1.0 + i as f32).collect();
            let x = Mat { data: &data, rows: lanes, cols: k, row, col };
            let (padded, pairs) = (lanes.next_multiple_of(8), k.div_ceil(2));
            let layout = match lanes_beside_each_other {
                true => Packed { pair: padded, lane: 1 },
                false => Packed { pair: 1, lane: pairs + 3 },
            };
            let number = |i: usize, k: usize| match i < x.rows && k < x.cols {
                true => bf16(data[i * row + k * col]).0 as u32,
                false => 0,
            };
            for (name, pack) in kernels() {
                let mut out = vec![u32::MAX; padded * (pairs + 3)];
                pack(x, padded, layout, &mut out);
                for i in 0..padded {
                    for p in 0..pairs {
                        let got = out[p * layout.pair + i * layout.lane];
                        prop_assert_eq!(got, number(i, 2 * p) | number(i, 2 * p + 1) << 16, "{}", name);
                    }
                }
            }
        }
    }
}
