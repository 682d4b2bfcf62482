//! Products with a matrix of few ones and minus ones among zeros, by lists of where they are.
//!
//! A row of t·x is the sum of some rows of x less the sum of some others: additions alone, and none for the
//! zeros. x is laid out in tiles of 64 columns, whose sums stay in registers (8 of 8 lanes) while a row's lists
//! are walked: one load and addition for 8 numbers. A tile has to come from the second cache, and so a number
//! added costs about 2.6 multiply-adds of a dense product: with a share of 1/14 of the entries, as of very sparse
//! bases for 768 columns, the product is 5 times cheaper, with a third, as of sparse ones, not.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::cpu::gemm::{Mat, MatMut};
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, parallel};
use crate::device::{Buffer, CpuDevice};
use crate::error::Result;

/// Where a matrix has ones and where it has minus ones, row by row.
pub(crate) struct Lists {
    /// For each row, where in `columns` its ones begin and where its minus ones do; after the last row, the
    /// end.
    starts: Buffer<u32>,
    /// In rising order within a list.
    columns: Buffer<u16>,
}

impl fmt::Debug for Lists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lists({} × ±1 in {} rows)", self.columns.len(), self.starts.len() / 2)
    }
}

impl Lists {
    /// The columns of a row's ones or minus ones that are among `columns`.
    fn list(&self, row: usize, minus: bool, columns: &Range<usize>) -> &[u16] {
        let at = 2 * row + minus as usize;
        let list = &self.columns[self.starts[at] as usize..self.starts[at + 1] as usize];
        let ends =
            (list.first().map_or(columns.start, |&c| c as usize), list.last().map_or(0, |&c| c as usize));
        if ends.0 >= columns.start && ends.1 < columns.end {
            return list;
        }
        let before = |end: usize| list.partition_point(|&column| (column as usize) < end);
        &list[before(columns.start)..before(columns.end)]
    }

    /// The lists of a matrix of so many rows with these entries, each a row, a column and whether it is −1.
    /// In each row the columns must rise.
    fn new(
        device: &Arc<CpuDevice>,
        rows: usize,
        entries: impl Iterator<Item = (usize, usize, bool)> + Clone,
    ) -> Result<Lists> {
        let mut starts = device.buffer::<u32>(2 * rows + 1)?;
        starts.fill(0);
        entries.clone().for_each(|(row, _, minus)| starts[2 * row + minus as usize + 1] += 1);
        for i in 1..starts.len() {
            starts[i] += starts[i - 1];
        }
        let mut columns = device.buffer::<u16>(starts[2 * rows] as usize)?;
        let mut next = device.scratch::<u32>(starts.len())?;
        next.copy_from_slice(&starts);
        for (row, column, minus) in entries {
            let at = &mut next[2 * row + minus as usize];
            columns[*at as usize] = column as u16;
            *at += 1;
        }
        Ok(Lists { starts, columns })
    }

    fn entries(&self) -> impl Iterator<Item = (usize, usize, bool)> + Clone {
        let lists = self.starts.windows(2).enumerate();
        lists.flat_map(|(i, ends)| {
            let list = &self.columns[ends[0] as usize..ends[1] as usize];
            list.iter().map(move |&column| (i / 2, column as usize, i % 2 == 1))
        })
    }
}

/// A matrix of ones, minus ones and zeros, by rows and by columns.
#[derive(Debug)]
pub(crate) struct Ternary {
    by_row: Lists,
    by_column: Lists,
}

impl Ternary {
    /// `dense` over the one absolute value that all its numbers have that are not 0, and that value; None
    /// where there are several or more than a share of `most` is not 0.
    pub(crate) fn of<T: Float>(
        device: &Arc<CpuDevice>,
        dense: &[T],
        columns: usize,
        most: f64,
    ) -> Result<Option<(Ternary, T)>> {
        let Some(&first) = dense.iter().find(|&&x| x != T::ZERO) else { return Ok(None) };
        let value = if first < T::ZERO { -first } else { first };
        if !dense.iter().all(|&x| x == T::ZERO || x == value || x == -value) {
            return Ok(None);
        }
        let count = dense.iter().filter(|&&x| x != T::ZERO).count();
        let rows = dense.len() / columns;
        let longest = u16::MAX as usize + 1;
        if count as f64 > most * dense.len() as f64
            || rows.max(columns) > longest
            || count > u32::MAX as usize
        {
            return Ok(None);
        }
        let entries = dense.iter().enumerate().filter(|&(_, &x)| x != T::ZERO);
        let entries = entries.map(|(i, &x)| (i / columns, i % columns, x < T::ZERO));
        let by_row = Lists::new(device, rows, entries)?;
        let flipped = by_row.entries().map(|(row, column, minus)| (column, row, minus));
        let by_column = Lists::new(device, columns, flipped)?;
        Ok(Some((Ternary { by_row, by_column }, value)))
    }

    /// Writes `value` times this, row after row.
    pub(crate) fn write_out<T: Float>(&self, value: T, columns: usize, out: &mut [T]) {
        out.fill(T::ZERO);
        for (row, column, minus) in self.by_row.entries() {
            out[row * columns + column] = if minus { -value } else { value };
        }
    }

    /// The number of ones and minus ones.
    pub(crate) fn count(&self) -> usize {
        self.by_row.columns.len()
    }

    /// The memory that it takes.
    pub(crate) fn bytes(&self) -> usize {
        [&self.by_row, &self.by_column]
            .map(|lists| 4 * lists.starts.len() + 2 * lists.columns.len())
            .iter()
            .sum()
    }

    /// Some rows and columns of it, as a factor.
    pub(crate) fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Part<'_> {
        Part { lists: &self.by_row, rows, columns }
    }

    /// The transpose of that.
    pub(crate) fn transposed(&self, rows: Range<usize>, columns: Range<usize>) -> Part<'_> {
        Part { lists: &self.by_column, rows: columns, columns: rows }
    }
}

/// A factor of a product: some rows and columns of a matrix.
#[derive(Clone, Debug)]
pub(crate) struct Part<'a> {
    lists: &'a Lists,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// Columns of x in a tile.
pub(crate) const WIDTH: usize = 64;
/// Elements of x that are laid out at a time, about: 4 MiB of f32.
const PACKED: usize = 1 << 20;
/// Rows of the result that a thread takes at a time.
const ROWS: usize = 128;
/// Rows of a tile's results that are turned into columns at a time.
const TURNED: usize = 16;

/// A row of a tile.
type Line<T> = [T; WIDTH];

/// Writes columns of x, at most [`WIDTH`], as the rows of a tile.
pub(crate) type Fill<'a, T> = &'a (dyn Fn(Range<usize>, &mut [Line<T>]) + Sync);

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Base<'a, T> {
    Nothing,
    /// What the result held.
    Itself,
    /// This matrix, which has its elements as the result has them side by side.
    Other(Mat<'a, T>),
}

/// c ← alpha·t·x + what it is put onto. Either the rows of c or its columns have their elements side by side.
pub(crate) fn product<T: Float>(
    device: &Arc<CpuDevice>,
    alpha: T,
    t: &Part<'_>,
    x: Fill<'_, T>,
    base: Base<'_, T>,
    c: MatMut<'_, T>,
) -> Result<()> {
    let (depth, all) = (t.columns.len(), c.cols);
    assert!(c.rows == t.rows.len() && (c.col == 1 || c.row == 1), "product of matrices that do not fit");
    if c.rows == 0 || all == 0 {
        return Ok(());
    }
    let tile = (depth * WIDTH).max(1);
    let at_once = (PACKED / tile).max(1) * WIDTH;
    let mut packed = device.buffer::<T>(at_once.min(all).div_ceil(WIDTH) * tile)?;
    for from in (0..all).step_by(at_once) {
        let width = at_once.min(all - from);
        let tiles = &mut packed[..width.div_ceil(WIDTH) * tile];
        parallel::chunks(tiles, tile, &|i, tile| {
            let from = from + i * WIDTH;
            x(from..all.min(from + WIDTH), &mut tile.as_chunks_mut().0[..depth]);
        });
        let sums = Sums { alpha, t, tiles: &*tiles, tile };
        if c.col == 1 {
            // Of a single row the stride may be anything.
            let stride = c.row.max(all);
            let data = &mut c.data[..(c.rows - 1) * stride + all];
            parallel::chunks(data, ROWS * stride, &|i, rows| {
                vectorize(ByRows { sums, base, first: i * ROWS, columns: from..from + width, stride, rows });
            });
        } else {
            let data = &mut c.data[from * c.col..];
            let data = &mut data[..(width - 1) * c.col + c.rows];
            parallel::chunks(data, WIDTH * c.col, &|i, columns| {
                let from = from + i * WIDTH;
                vectorize(ByColumns { sums, base, i, from, count: c.rows, stride: c.col, columns });
            });
        }
    }
    Ok(())
}

/// Lays out columns of a matrix as the rows of a tile.
pub(crate) fn fill<T: Float>(x: Mat<'_, T>, columns: Range<usize>, tile: &mut [Line<T>]) {
    let x = x.columns(columns.start, columns.len());
    if x.col == 1 {
        for (i, line) in tile.iter_mut().enumerate() {
            line[..x.cols].copy_from_slice(&x.data[i * x.row..][..x.cols]);
        }
        return;
    }
    // A few columns at a time: their elements' lines of the cache must not push each other out.
    for from in (0..x.cols).step_by(8) {
        for (i, line) in tile.iter_mut().enumerate() {
            for (j, to) in line[..x.cols].iter_mut().enumerate().skip(from).take(8) {
                *to = x.data[i * x.row + j * x.col];
            }
        }
    }
}

/// What the parts of a result are summed up from.
#[derive(Clone, Copy)]
struct Sums<'a, T> {
    alpha: T,
    t: &'a Part<'a>,
    tiles: &'a [T],
    /// Elements of a tile.
    tile: usize,
}

impl<'a, T: Float> Sums<'a, T> {
    #[inline(always)]
    fn tile(&self, i: usize) -> &'a [Line<T>] {
        self.tiles[i * self.tile..][..self.tile].as_chunks().0
    }

    /// Row `row` of the part times a tile.
    #[inline(always)]
    fn row(&self, row: usize, tile: &[Line<T>]) -> Line<T> {
        let Part { lists, rows, columns } = self.t;
        let row = rows.start + row;
        let mut sums = [T::ZERO; WIDTH];
        for &column in lists.list(row, false, columns) {
            let x = &tile[column as usize - columns.start];
            sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += x);
        }
        for &column in lists.list(row, true, columns) {
            let x = &tile[column as usize - columns.start];
            sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum = *sum - x);
        }
        sums
    }

    /// out ← what it is put onto + alpha·sums, where what it is put onto begins at `at` if it is another.
    #[inline(always)]
    fn write(&self, sums: impl Iterator<Item = T>, base: Base<'_, T>, at: usize, out: &mut [T]) {
        let n = out.len();
        match base {
            Base::Nothing => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = self.alpha * sum),
            Base::Itself => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += self.alpha * sum),
            Base::Other(base) => {
                let base = &base.data[at..][..n];
                out.iter_mut()
                    .zip(sums)
                    .zip(base)
                    .for_each(|((out, sum), &base)| *out = base + self.alpha * sum);
            }
        }
    }
}

/// Some rows of a result whose rows have their elements side by side.
struct ByRows<'a, T> {
    sums: Sums<'a, T>,
    base: Base<'a, T>,
    /// The first row.
    first: usize,
    /// The columns that the tiles are for.
    columns: Range<usize>,
    stride: usize,
    rows: &'a mut [T],
}

impl<T: Float> Kernel for ByRows<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (i, from) in self.columns.clone().step_by(WIDTH).enumerate() {
            let (tile, width) = (self.sums.tile(i), WIDTH.min(self.columns.end - from));
            for (row, out) in (self.first..).zip(self.rows.chunks_mut(self.stride)) {
                let sums = self.sums.row(row, tile);
                let at = if let Base::Other(base) = self.base { row * base.row + from } else { 0 };
                self.sums.write(sums.iter().copied(), self.base, at, &mut out[from..from + width]);
            }
        }
    }
}

/// The columns of a result that belong to one tile, where columns have their elements side by side.
struct ByColumns<'a, T> {
    sums: Sums<'a, T>,
    base: Base<'a, T>,
    /// The tile.
    i: usize,
    /// Its first column.
    from: usize,
    /// Elements of a column.
    count: usize,
    stride: usize,
    columns: &'a mut [T],
}

impl<T: Float> Kernel for ByColumns<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let tile = self.sums.tile(self.i);
        let mut turned = [[T::ZERO; WIDTH]; TURNED];
        for first in (0..self.count).step_by(TURNED) {
            let rows = TURNED.min(self.count - first);
            for (row, sums) in (first..).zip(&mut turned[..rows]) {
                *sums = self.sums.row(row, tile);
            }
            for (j, out) in self.columns.chunks_mut(self.stride).enumerate() {
                let column = turned[..rows].iter().map(|sums| sums[j]);
                let at =
                    if let Base::Other(base) = self.base { (self.from + j) * base.col + first } else { 0 };
                self.sums.write(column, self.base, at, &mut out[first..first + rows]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::random;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u64) -> Vec<f64> {
        let mut words = vec![0; n];
        random::words(seed, 0, 0, &mut words);
        words.into_iter().map(random::symmetric).collect()
    }

    /// −v, 0 and v, of which about a share is not 0.
    fn ternary(n: usize, share: f64, v: f64) -> Vec<f64> {
        numbers(n, 7).into_iter().map(|x| if x.abs() < share { v * x.signum() } else { 0.0 }).collect()
    }

    fn size() -> impl Strategy<Value = usize> {
        prop_oneof![0usize..6, 60usize..70, 120usize..150]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        /// Parts of a matrix and of its transpose, in f64 and f32, x and c by rows and by columns, on what is
        /// there, on something else, and on nothing.
        #[test]
        fn equals_the_slow_twin(
            (rows, columns, n) in (size(), size(), size()),
            (cut, transposed) in ((0usize..5, 0usize..5), any::<bool>()),
            (x_turned, c_turned, kind) in (any::<bool>(), any::<bool>(), 0usize..3),
            share in prop_oneof![Just(0.1), Just(0.9)],
        ) {
            let device = Device::cpu();
            let (all, across) = (rows + cut.0 + 2, columns + cut.1 + 1);
            let mut dense = ternary(all * across, share, 0.5);
            dense[0] = -0.5;
            let (t, v) = Ternary::of(device.host(), &dense, across, 1.0).unwrap().unwrap();
            prop_assert_eq!(v, 0.5);
            prop_assert_eq!(t.count(), dense.iter().filter(|&&x| x != 0.0).count());
            let mut written = vec![f64::NAN; dense.len()];
            t.write_out(v, across, &mut written);
            prop_assert_eq!(&written, &dense);

            let (down, right) = (cut.0..cut.0 + rows, cut.1..cut.1 + columns);
            let (part, m, k) = match transposed {
                false => (t.part(down, right), rows, columns),
                true => (t.transposed(down, right), columns, rows),
            };
            let t_at = |i: usize, q: usize| {
                let (i, q) = if transposed { (q, i) } else { (i, q) };
                dense[(cut.0 + i) * across + cut.1 + q] / v
            };
            let (x, c, other) = (numbers(k * n, 1), numbers(m * n, 2), numbers(m * n, 3));
            fn of(rows: usize, cols: usize, turned: bool, i: usize, j: usize) -> usize {
                if turned { j * rows + i } else { i * cols + j }
            }
            let before = |at: usize| [0.0, c[at], other[at]][kind];
            let mut want = c.clone();
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let sum: f64 = (0..k).map(|q| t_at(i, q) * x[of(k, n, x_turned, q, j)]).sum();
                let at = of(m, n, c_turned, i, j);
                want[at] = before(at) + 0.7 * sum;
            }
            fn view<T>(data: &[T], rows: usize, cols: usize, turned: bool) -> Mat<'_, T> {
                if turned { Mat::new(data, cols, rows).t() } else { Mat::new(data, rows, cols) }
            }
            fn run<T: Float>(
                device: &Device,
                part: &Part<'_>,
                kind: usize,
                [x, other, c]: [&[f64]; 3],
                ((k, x_turned), (m, c_turned), n): ((usize, bool), (usize, bool), usize),
            ) -> Vec<f64> {
                let [x, other, mut c] =
                    [x, other, c].map(|v| v.iter().map(|&v| T::from_f64(v)).collect::<Vec<T>>());
                let base =
                    [Base::Nothing, Base::Itself, Base::Other(view(&other, m, n, c_turned))][kind];
                let x = view(&x, k, n, x_turned);
                let out = match c_turned {
                    true => MatMut::new(&mut c, n, m).t(),
                    false => MatMut::new(&mut c, m, n),
                };
                let tiles = |columns: Range<usize>, tile: &mut [Line<T>]| fill(x, columns, tile);
                product(device.host(), T::from_f64(0.7), part, &tiles, base, out).unwrap();
                c.into_iter().map(|c| c.to_f64()).collect()
            }
            let form = ((k, x_turned), (m, c_turned), n);
            let wide = run::<f64>(&device, &part, kind, [&x, &other, &c], form);
            let narrow = run::<f32>(&device, &part, kind, [&x, &other, &c], form);
            for ((wide, narrow), want) in wide.iter().zip(&narrow).zip(&want) {
                prop_assert!((wide - want).abs() < 1e-12, "{wide} {want}");
                prop_assert!((narrow - want).abs() < 1e-5 * want.abs().max(1.0), "{narrow} {want}");
            }
        }
    }

    #[test]
    fn what_is_not_ternary_or_not_sparse_is_not_taken_for_it() {
        let device = Device::cpu();
        let is = |dense: &[f32], most| Ternary::of(device.host(), dense, 2, most).unwrap().is_some();
        assert!(is(&[0.0, 2.0, -2.0, 0.0], 0.5));
        assert!(!is(&[0.0, 2.0, -2.0, 2.0], 0.5));
        assert!(!is(&[0.0, 2.0, 1.0, 0.0], 0.5));
        assert!(!is(&[0.0, 2.0, f32::NAN, 0.0], 1.0));
        assert!(!is(&[0.0; 4], 1.0));
        assert!(!is(&[], 1.0));
    }

    /// Where a device counts them.
    #[test]
    fn the_places_are_counted() {
        let device = Device::cpu();
        let dense = ternary(400 * 300, 0.07, 1.0);
        let (t, _) = Ternary::of(device.host(), &dense, 300, 0.2).unwrap().unwrap();
        assert_eq!(device.memory().live_bytes, t.bytes());
        assert_eq!(t.bytes(), 2 * 2 * t.count() + 4 * (2 * 400 + 1 + 2 * 300 + 1));
    }
}
