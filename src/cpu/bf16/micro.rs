//! What the product in [`super`] is built around: packing of a factor, and the result by strips.

use crate::cpu::gemm::{Mat, MatMut, Onto};

/// Numbers in one register.
pub(super) const LANES: usize = 16;
/// Columns of c in one strip.
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
    /// Packed a, made up to a multiple of the kernel's ROWS rows, PAIRS pairs each, of which as many count as
    /// the panel has.
    pub(super) rows: &'a [u32],
    /// A panel of packed b: COLS lanes side by side for each pair.
    pub(super) panel: &'a [u32],
    pub(super) alpha: f32,
    pub(super) onto: Onto<'a, f32>,
    pub(super) c: MatMut<'a, f32>,
}

/// The arithmetic of the product, as some processor has it. For each piece of k, a sum starts with 0 and goes
/// along k in the `Order` of the kernel; then it is multiplied by alpha, and what it is put onto (for the first
/// piece times its factor) is added. Each of these steps rounds once. Denormal numbers in factors and sums of
/// products are taken for 0.
pub(super) trait MicroKernel: Copy + Send + Sync {
    /// Rows that are multiplied at a time.
    const ROWS: usize;

    /// Rounds a matrix, whose rows are lanes and whose columns are k, to bf16 and packs it. An odd k is made
    /// up with 0, and so are lanes up to `lanes`, of which the matrix may have fewer.
    fn pack(self, x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]);

    /// c ← alpha·rows·panel + what it is put onto.
    fn multiply(self, strip: Strip<'_>);
}

/// In what order the products along k are added up.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// One pair after the other; of a pair the second product is added first.
    Pairs,
    /// Sixteen pairs at a time: their first products are one sum and their second ones another, both from 0 on.
    /// The sum of the two is added to what there is.
    Tiles,
}

/// Whether this processor has instructions for these products that are faster than those in f32.
pub(super) fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::x86::fastest().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A row of c from its sums: alpha times each, plus what it is put onto.
#[inline(always)]
pub(super) fn finish_row(sums: &[f32], alpha: f32, onto: Onto<'_, f32>, c: &mut MatMut<'_, f32>, i: usize) {
    let sums = &sums[..c.cols];
    if c.col != 1 {
        for j in 0..c.cols {
            let to = &mut c.data[i * c.row + j * c.col];
            *to = match onto {
                Onto::Itself(0.0) => alpha * sums[j],
                Onto::Itself(beta) => alpha * sums[j] + beta * *to,
                Onto::Row(row) => alpha * sums[j] + row[j],
            };
        }
        return;
    }
    // With the choice outside of the loops the compiler vectorises them.
    let to = &mut c.data[i * c.row..][..c.cols];
    match onto {
        Onto::Itself(0.0) => {
            for j in 0..sums.len() {
                to[j] = alpha * sums[j];
            }
        }
        Onto::Itself(beta) => {
            for j in 0..sums.len() {
                to[j] = alpha * sums[j] + beta * to[j];
            }
        }
        Onto::Row(row) => {
            let row = &row[..sums.len()];
            for j in 0..sums.len() {
                to[j] = alpha * sums[j] + row[j];
            }
        }
    }
}

/// The same arithmetic in plain code: what tests the rest of the product on any processor, and the
/// instructions where there are some.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Emulated<const ROWS: usize>(pub(super) Order);

#[cfg(test)]
impl<const ROWS: usize> MicroKernel for Emulated<ROWS> {
    const ROWS: usize = ROWS;

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
        crate::cpu::simd::vectorize(Emulation { order: self.0, strip });
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

#[cfg(test)]
struct Emulation<'a> {
    order: Order,
    strip: Strip<'a>,
}

/// The product of two bf16 numbers is exact in f32 unless it leaves f32's range, so that a
/// multiplication and an addition round once, as the instruction does.
#[cfg(test)]
impl crate::cpu::simd::Kernel for Emulation<'_> {
    type Element = f32;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let upper = |pair: u32| f32::from_bits(pair & 0xffff_0000);
        let lower = |pair: u32| f32::from_bits(pair << 16);
        let Strip { rows, panel, alpha, onto, mut c } = self.strip;
        for i in 0..c.rows {
            let mut sums = [0.0; COLS];
            let rows = &rows[i * PAIRS..];
            match self.order {
                Order::Pairs => {
                    for (b, &a) in panel.chunks_exact(COLS).zip(rows) {
                        for (sum, &b) in sums.iter_mut().zip(b) {
                            *sum = normal(upper(a) * upper(b) + *sum);
                            *sum = normal(lower(a) * lower(b) + *sum);
                        }
                    }
                }
                Order::Tiles => {
                    for (b, a) in panel.chunks(LANES * COLS).zip(rows.chunks(LANES)) {
                        let (mut first, mut second) = ([0.0; COLS], [0.0; COLS]);
                        for (b, &a) in b.chunks_exact(COLS).zip(a) {
                            for (j, &b) in b.iter().enumerate() {
                                first[j] = normal(lower(a) * lower(b) + first[j]);
                                second[j] = normal(upper(a) * upper(b) + second[j]);
                            }
                        }
                        if b.len() < LANES * COLS {
                            // The tile is made up with 0, which makes 0 of −0.
                            (first, second) = (first.map(|x| x + 0.0), second.map(|x| x + 0.0));
                        }
                        for (j, sum) in sums.iter_mut().enumerate() {
                            *sum = normal(*sum + normal(first[j] + second[j]));
                        }
                    }
                }
            }
            finish_row(&sums, alpha, onto, &mut c, i);
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
            vec![("emulated", |x, n, layout, out| Emulated::<8>(Order::Pairs).pack(x, n, layout, out))];
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
