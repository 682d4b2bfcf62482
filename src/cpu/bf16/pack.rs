//! Factors of a product, rounded to bf16 in pairs along k and laid out as the kernel reads them.

use crate::cpu::bf16::lanes::LANES;
use crate::cpu::gemm::Mat;

/// Pairs, and lanes, that are packed at a time.
const SIDE: usize = LANES;

/// How the packed factor lies in memory: the pair `p` of lane `i` at `p·pair + i·lane`. One of the two
/// is 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    pub(super) pair: usize,
    pub(super) lane: usize,
}

/// Two numbers that follow each other along k, rounded to nearest even.
#[inline(always)]
fn pair(first: f32, second: f32) -> u32 {
    (rounded(first) >> 16) | (rounded(second) & 0xffff_0000)
}

/// A number's bits of which the upper half is the bf16 number nearest to it.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    // Rounding up could make another number of a NaN.
    let nan = bits | 0x0040_0000;
    if x.is_nan() { nan } else { bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) }
}

/// Packs a matrix whose rows are lanes and whose columns are k; an odd k is made up with 0. Lanes up to
/// `lanes`, of which the matrix may have fewer, are made up with 0 too.
#[inline(always)]
pub(super) fn pack(x: Mat<'_, f32>, lanes: usize, layout: Packed, out: &mut [u32]) {
    let pairs = x.cols.div_ceil(2);
    match (x.col, layout.pair) {
        (1, 1) => {
            for lane in 0..lanes {
                along(x, lane, 0, &mut out[lane * layout.lane..][..pairs]);
            }
        }
        (1, line) => {
            for lane in (0..lanes).step_by(SIDE) {
                for p in (0..pairs).step_by(SIDE) {
                    let mut block = [[0; SIDE]; SIDE];
                    for (i, to) in block.iter_mut().enumerate() {
                        along(x, lane + i, p, to);
                    }
                    turn(&block, (lanes - lane, pairs - p), line, &mut out[p * line + lane..]);
                }
            }
        }
        (_, 1) => {
            for lane in (0..lanes).step_by(SIDE) {
                for p in (0..pairs).step_by(SIDE) {
                    let mut block = [[0; SIDE]; SIDE];
                    for (i, to) in block.iter_mut().enumerate() {
                        across(x, lane, p + i, to);
                    }
                    turn(&block, (pairs - p, lanes - lane), layout.lane, &mut out[lane * layout.lane + p..]);
                }
            }
        }
        (_, line) => {
            for p in 0..pairs {
                across(x, 0, p, &mut out[p * line..][..lanes]);
            }
        }
    }
}

/// Pairs of one row of a matrix whose rows lie in one piece, from pair p.
#[inline(always)]
fn along(x: Mat<'_, f32>, row: usize, p: usize, out: &mut [u32]) {
    let mut twos: &[[f32; 2]] = &[];
    let mut rest: &[f32] = &[];
    if row < x.rows {
        (twos, rest) = x.data[row * x.row..][..x.cols].as_chunks::<2>();
        twos = &twos[p.min(twos.len())..];
    }
    // A length that the compiler knows makes the usual case fast.
    if let (Ok(out), Some(twos)) = (<&mut [u32; SIDE]>::try_from(&mut *out), twos.first_chunk::<SIDE>()) {
        for i in 0..SIDE {
            out[i] = pair(twos[i][0], twos[i][1]);
        }
        return;
    }
    let (whole, beyond) = out.split_at_mut(twos.len().min(out.len()));
    for (out, &[first, second]) in whole.iter_mut().zip(twos) {
        *out = pair(first, second);
    }
    beyond.fill(0);
    if let (Some(out), &[last]) = (beyond.first_mut(), rest) {
        *out = pair(last, 0.0);
    }
}

/// One pair of rows of any other matrix, from row `row`: fast if their numbers lie side by side.
#[inline(always)]
fn across(x: Mat<'_, f32>, row: usize, p: usize, out: &mut [u32]) {
    let n = x.rows.saturating_sub(row).min(out.len());
    let (out, beyond) = out.split_at_mut(n);
    beyond.fill(0);
    let at = |k: usize| &x.data[row * x.row + k * x.col..];
    match x.cols.saturating_sub(2 * p) {
        0 => out.fill(0),
        _ if n == 0 => {}
        1 => {
            let first = at(2 * p);
            for (i, out) in out.iter_mut().enumerate() {
                *out = pair(first[i * x.row], 0.0);
            }
        }
        _ if x.row == 1 => {
            let (first, second) = (&at(2 * p)[..n], &at(2 * p + 1)[..n]);
            if let (Ok(out), Some(first), Some(second)) = (
                <&mut [u32; SIDE]>::try_from(&mut *out),
                first.first_chunk::<SIDE>(),
                second.first_chunk::<SIDE>(),
            ) {
                for i in 0..SIDE {
                    out[i] = pair(first[i], second[i]);
                }
                return;
            }
            for ((out, &first), &second) in out.iter_mut().zip(first).zip(second) {
                *out = pair(first, second);
            }
        }
        _ => {
            let (first, second) = (at(2 * p), at(2 * p + 1));
            for (i, out) in out.iter_mut().enumerate() {
                *out = pair(first[i * x.row], second[i * x.row]);
            }
        }
    }
}

/// Writes the columns of a block as lines that lie `line` apart: `len` long and as many, at most.
#[inline(always)]
fn turn(block: &[[u32; SIDE]; SIDE], (len, lines): (usize, usize), line: usize, out: &mut [u32]) {
    for j in 0..lines.min(SIDE) {
        let to = &mut out[j * line..];
        if let (Some(to), true) = (to.first_chunk_mut::<SIDE>(), len >= SIDE) {
            for (to, row) in to.iter_mut().zip(block) {
                *to = row[j];
            }
            continue;
        }
        for (to, row) in to[..len].iter_mut().zip(block) {
            *to = row[j];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{BF16, Element};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounds_as_storage_does(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            let (got, want) = (BF16((rounded(x) >> 16) as u16), BF16::from_f64(x as f64));
            prop_assert!(got == want || (got.to_f32().is_nan() && x.is_nan()), "{x:e}: {got:?} {want:?}");
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
            let mut out = vec![u32::MAX; padded * (pairs + 3)];
            pack(x, padded, layout, &mut out);
            let number = |i: usize, k: usize| match i < x.rows && k < x.cols {
                true => BF16::from_f64(data[i * row + k * col] as f64).0 as u32,
                false => 0,
            };
            for i in 0..padded {
                for p in 0..pairs {
                    let got = out[p * layout.pair + i * layout.lane];
                    prop_assert_eq!(got, number(i, 2 * p) | number(i, 2 * p + 1) << 16);
                }
            }
        }
    }
}
