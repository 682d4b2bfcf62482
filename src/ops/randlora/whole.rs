//! Products with bases of which every row of B belongs to all: a dense B is one matrix among others, a
//! ternary one is added up by the places of its ones and minus ones (`cpu::ternary`), at a cost that goes by
//! their number.

use std::ops::Range;

use super::bases::Whole;
use super::layer::{FillC, Layer};
use crate::cpu::Float;
use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::ternary::{Base, Part, WIDTH, fill, product};
use crate::error::Result;

/// c ← alpha·t·x + what it is put onto.
fn add_up<T: Float>(
    layer: &Layer<'_, T>,
    alpha: T,
    t: &Part<'_>,
    x: Mat<'_, T>,
    base: Base<'_, T>,
    c: MatMut<'_, T>,
) -> Result<()> {
    product(layer.weight.device().host(), alpha, t, &|columns, tile| fill(x, columns, tile), base, c)
}

/// h ← v·B_Q.
pub(super) fn collect<T: Float>(
    layer: &Layer<'_, T>,
    b: Whole<'_, T>,
    q: &Range<usize>,
    v: Mat<'_, T>,
    h: &mut [T],
) -> Result<()> {
    let h = MatMut::new(h, v.rows, q.len());
    match b {
        Whole::Dense(b) => layer.gemm(T::ONE, v, b.columns(q.start, q.len()), Onto::NOTHING, h),
        Whole::Ternary(b) => {
            let b = b.transposed(0..layer.sizes.large(), q.clone());
            add_up(layer, T::ONE, &b, v.t(), Base::Nothing, h.t())
        }
    }
}

/// v += s·z·B_Qᵀ.
pub(super) fn spread<T: Float>(
    layer: &Layer<'_, T>,
    b: Whole<'_, T>,
    q: &Range<usize>,
    z: Mat<'_, T>,
    v: &mut [T],
) -> Result<()> {
    let v = MatMut::new(v, z.rows, layer.sizes.large());
    match b {
        Whole::Dense(b) => {
            layer.gemm(layer.scale, z, b.columns(q.start, q.len()).t(), Onto::Itself(T::ONE), v)
        }
        Whole::Ternary(b) => {
            let b = b.part(0..layer.sizes.large(), q.clone());
            add_up(layer, layer.scale, &b, z.t(), Base::Itself, v.t())
        }
    }
}

/// M_J ← s·Bᵀ·G_J.
pub(super) fn pull<T: Float>(
    layer: &Layer<'_, T>,
    b: Whole<'_, T>,
    g: Mat<'_, T>,
    m: &mut [T],
) -> Result<()> {
    let c = layer.sizes.columns();
    let m = MatMut::new(m, c, g.cols);
    match b {
        Whole::Dense(b) => layer.gemm(layer.scale, b.t(), g, Onto::NOTHING, m),
        Whole::Ternary(b) => {
            let b = b.transposed(0..layer.sizes.large(), 0..c);
            add_up(layer, layer.scale, &b, g, Base::Nothing, m)
        }
    }
}

/// Writes W̃[:, j] = W̃0[:, j] + s·B·C_J, or ΔW̃ alone, as it lies in memory: all rows by j for in ≤ out, j by all
/// rows for in > out. `c_j` has room for C_J with dense bases.
pub(super) fn build<T: Float>(
    layer: &Layer<'_, T>,
    b: Whole<'_, T>,
    j: Range<usize>,
    with_base: bool,
    c_j: &mut [T],
    w: &mut [T],
) -> Result<()> {
    let (large, c) = (layer.sizes.large(), layer.sizes.columns());
    let in_place = match b {
        Whole::Ternary(_) if with_base => layer.weight_in_place(0..large, j.clone())?,
        _ => None,
    };
    if with_base && in_place.is_none() {
        layer.read_weight(0..large, j.clone(), w)?;
    }
    let out = match layer.is_wide() {
        false => MatMut::new(w, large, j.len()),
        true => MatMut::new(w, j.len(), large).t(),
    };
    match b {
        Whole::Dense(b) => {
            layer.fill_c(0..c, j.clone(), c_j);
            let onto = Onto::Itself(if with_base { T::ONE } else { T::ZERO });
            layer.gemm(layer.scale, b, Mat::new(c_j, c, j.len()), onto, out)
        }
        Whole::Ternary(b) => {
            let base = match in_place {
                Some(weight) if layer.is_wide() => Base::Other(weight.t()),
                Some(weight) => Base::Other(weight),
                None if with_base => Base::Itself,
                None => Base::Nothing,
            };
            let fill_c = |columns: Range<usize>, tile: &mut [[T; WIDTH]]| {
                vectorize(FillTile { layer, columns: j.start + columns.start..j.start + columns.end, tile });
            };
            let device = layer.weight.device().host();
            product(device, layer.scale, &b.part(0..large, 0..c), &fill_c, base, out)
        }
    }
}

/// Writes columns of C as the rows of a tile.
struct FillTile<'a, T: Float> {
    layer: &'a Layer<'a, T>,
    columns: Range<usize>,
    tile: &'a mut [[T; WIDTH]],
}

impl<T: Float> Kernel for FillTile<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (q, line) in self.tile.iter_mut().enumerate() {
            let (a, gamma, lambda) = self.layer.factors(q, &self.columns);
            FillC { out: line, a, gamma, lambda }.run();
        }
    }
}
