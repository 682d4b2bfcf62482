//! The singular value decomposition, by one-sided Jacobi rotations in f64.
//!
//! A tall X is first made small by Householder's reflections, X = Q·R. Hestenes' method then turns pairs of
//! columns of L = Rᵀ until all are orthogonal: L·W = V·Σ, so that X = (Q·W)·Σ·Vᵀ. What is left of a column
//! is v times its length, σ; each σ comes out to a relative accuracy of about 1e-15 of the largest. In a
//! round of a tournament every column meets one other, so the pairs of a round are turned beside each other
//! without touching.

use rayon::prelude::*;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// X = U·diag(σ)·Vᵀ with k = min(rows, columns) singular values, largest first, in f64. Vectors that belong
/// to a σ of 0 may be 0.
#[derive(Debug)]
pub(crate) struct Svd {
    /// The left vectors (rows, k).
    pub(crate) u: Tensor,
    /// σ (k).
    pub(crate) values: Vec<f64>,
    /// The right vectors (columns, k).
    pub(crate) v: Tensor,
}

/// The decomposition of a matrix. The same input gives the same bits on any number of threads.
///
/// # Errors
/// [`Error::Shape`] where `x` is no matrix, [`Error::NonFinite`] where it holds a NaN or infinity.
pub(crate) fn svd(x: &Tensor) -> Result<Svd> {
    let (wide, [count, len], mut columns) = columns(x)?;
    let reflections = reduce(&mut columns);
    let sorted = turned(rows_of_r(&columns, true));
    let values: Vec<f64> = sorted.iter().map(|column| column.square.sqrt()).collect();
    let unit = |(column, &length): (&Column, &f64)| {
        let inverse = if length > 0.0 { 1.0 / length } else { 0.0 };
        column.x.iter().map(|x| x * inverse).collect::<Vec<f64>>()
    };
    let short: Vec<f64> = sorted.iter().zip(&values).flat_map(unit).collect();
    // Q is the product of the reflections, so the last comes first.
    let lifted = |column: &Column| {
        let mut y = column.turns.clone();
        y.resize(len, 0.0);
        reflections.iter().enumerate().rev().for_each(|(k, v)| reflect(v, &mut y[k..]));
        y
    };
    let long: Vec<f64> = sorted.par_iter().with_min_len(8).flat_map_iter(lifted).collect();
    let long = Tensor::from_vec(long, [count, len], x.device())?.t()?;
    let short = Tensor::from_vec(short, [count, count], x.device())?.t()?;
    // A wide matrix was taken by its rows, as Xᵀ = V·Σ·Uᵀ.
    let (u, v) = if wide { (short, long) } else { (long, short) };
    Ok(Svd { u, values, v })
}

/// The singular values alone, largest first.
///
/// # Errors
/// As [`svd`].
pub(crate) fn singular_values(x: &Tensor) -> Result<Vec<f64>> {
    let (_, _, mut columns) = columns(x)?;
    reduce(&mut columns);
    Ok(turned(rows_of_r(&columns, false)).iter().map(|column| column.square.sqrt()).collect())
}

/// The Frobenius norm, summed in f64.
pub(crate) fn norm(x: &Tensor) -> Result<f64> {
    let x = x.to_dtype(DType::F64)?.to_vec::<f64>()?;
    Ok(x.iter().map(|x| x * x).sum::<f64>().sqrt())
}

/// The columns of a tall matrix or the rows of a wide one, their number and their length, and whether it was
/// wide.
fn columns(x: &Tensor) -> Result<(bool, [usize; 2], Vec<Vec<f64>>)> {
    let &[rows, cols] = x.dims() else {
        return Err(Error::shape("singular values", format!("{} is no matrix", x.shape())));
    };
    let x = x.detach().to_dtype(DType::F64)?;
    let wide = rows < cols;
    let (count, len) = (rows.min(cols), rows.max(cols));
    let numbers = if wide { x } else { x.t()? }.to_vec::<f64>()?;
    if !numbers.iter().all(|x| x.is_finite()) {
        let what = "a matrix whose singular values were asked for".into();
        return Err(Error::NonFinite { what, step: 0 });
    }
    Ok((wide, [count, len], numbers.chunks(len.max(1)).take(count).map(<[f64]>::to_vec).collect()))
}

/// Makes the columns those of R, and says by which reflections I − v·vᵀ, of which the kth leaves the first k
/// elements as they are.
fn reduce(columns: &mut [Vec<f64>]) -> Vec<Vec<f64>> {
    let mut reflections = Vec::with_capacity(columns.len());
    for k in 0..columns.len() {
        let (done, rest) = columns.split_at_mut(k + 1);
        let column = &mut done[k][k..];
        let length = dot(column, column).sqrt();
        // Away from what is there, so that nothing cancels.
        let image = if column[0] > 0.0 { -length } else { length };
        let mut v = column.to_vec();
        v[0] -= image;
        let square = dot(&v, &v);
        let scale = if square > 0.0 { (2.0 / square).sqrt() } else { 0.0 };
        v.iter_mut().for_each(|v| *v *= scale);
        column.fill(0.0);
        column[0] = image;
        rest.par_iter_mut().with_min_len(8).for_each(|column| reflect(&v, &mut column[k..]));
        reflections.push(v);
    }
    reflections
}

/// x − v·⟨v, x⟩.
fn reflect(v: &[f64], x: &mut [f64]) {
    let product = dot(v, x);
    x.iter_mut().zip(v).for_each(|(x, v)| *x -= product * v);
}

/// A column on its way to being orthogonal to all others.
#[derive(Clone, Debug, Default)]
struct Column {
    x: Vec<f64>,
    /// The column of W; empty where only the values are wanted.
    turns: Vec<f64>,
    /// ⟨x, x⟩.
    square: f64,
}

/// The rows of R, which are the columns of L, from R's columns.
fn rows_of_r(columns: &[Vec<f64>], vectors: bool) -> Vec<Column> {
    let count = columns.len();
    let row = |i: usize| {
        let x: Vec<f64> = columns.iter().map(|column| column[i]).collect();
        let turns = if vectors { (0..count).map(|j| f64::from(u8::from(i == j))).collect() } else { vec![] };
        Column { square: dot(&x, &x), x, turns }
    };
    (0..count).map(row).collect()
}

/// The columns made orthogonal, longest first.
fn turned(columns: Vec<Column>) -> Vec<Column> {
    let count = columns.len();
    // A column of nothing rests the one that it meets.
    let mut columns: Vec<Column> =
        columns.into_iter().chain((count % 2 == 1).then(Column::default)).collect();
    let mut right = columns.split_off(columns.len() / 2);
    let mut left = columns;
    // Rotations converge quadratically; sweeps beyond a few do nothing.
    for _ in 0..60 {
        if !sweep(&mut left, &mut right) {
            break;
        }
        // What the rotations have updated, once more from the numbers.
        left.iter_mut().chain(&mut right).for_each(|column| column.square = dot(&column.x, &column.x));
    }
    let mut all: Vec<Column> = left.into_iter().chain(right).filter(|column| !column.x.is_empty()).collect();
    all.sort_by(|a, b| b.square.total_cmp(&a.square));
    all
}

/// Lets every column meet every other once; whether there was anything to turn.
fn sweep(left: &mut [Column], right: &mut [Column]) -> bool {
    let pairs = left.len();
    let mut turned = false;
    for _ in 1..2 * pairs {
        let one = |(a, b): (&mut Column, &mut Column)| meet(a, b);
        turned |= left
            .par_iter_mut()
            .with_min_len(8)
            .zip(right.par_iter_mut())
            .map(one)
            .reduce(|| false, |a, b| a | b);
        // All but the first move on by one place, around both rows.
        if pairs > 1 {
            right.rotate_left(1);
            left[1..].rotate_right(1);
            std::mem::swap(&mut left[1], &mut right[pairs - 1]);
        }
    }
    turned
}

/// Turns two columns so that they become orthogonal; whether they were not.
fn meet(a: &mut Column, b: &mut Column) -> bool {
    if a.x.is_empty() || b.x.is_empty() {
        return false;
    }
    let product = dot(&a.x, &b.x);
    // What rounding leaves of the product of orthogonal vectors, as LAPACK has it.
    let rounding = f64::EPSILON * (a.x.len() as f64).sqrt();
    if product.abs() <= rounding * (a.square * b.square).max(0.0).sqrt() {
        return false;
    }
    let zeta = (b.square - a.square) / (2.0 * product);
    let tan = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
    let cos = 1.0 / (1.0 + tan * tan).sqrt();
    turn(&mut a.x, &mut b.x, cos, cos * tan);
    turn(&mut a.turns, &mut b.turns, cos, cos * tan);
    (a.square, b.square) = (a.square - tan * product, b.square + tan * product);
    true
}

fn turn(a: &mut [f64], b: &mut [f64], cos: f64, sin: f64) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (cos * *a - sin * *b, sin * *a + cos * *b);
    }
}

/// Eight sums side by side, which the processor's vectors take at a time.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 8];
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::random;

    fn matrix(rows: usize, cols: usize, seed: u64) -> Tensor {
        let mut words = vec![0; rows * cols];
        random::words(seed, 0, 0, &mut words);
        let values = words.into_iter().map(random::normal).collect();
        Tensor::from_vec(values, [rows, cols], &Device::cpu()).unwrap()
    }

    fn far(a: &Tensor, b: &Tensor) -> f64 {
        let (a, b) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
        a.iter().zip(&b).fold(0.0, |far, (a, b)| f64::max(far, (a - b).abs()))
    }

    fn identity(n: usize) -> Tensor {
        let one = |i: usize| f64::from(u8::from(i / n == i % n));
        Tensor::from_vec((0..n * n).map(one).collect(), [n, n], &Device::cpu()).unwrap()
    }

    #[test]
    fn the_parts_are_orthonormal_and_multiply_to_the_matrix() {
        for (rows, cols) in [(7, 12), (12, 7), (1, 5), (5, 1), (1, 1), (2, 2), (33, 33), (64, 40)] {
            let x = matrix(rows, cols, 1);
            let Svd { u, values, v } = svd(&x).unwrap();
            let k = rows.min(cols);
            assert!(values.len() == k && values.windows(2).all(|w| w[0] >= w[1]));
            let sigma = Tensor::from_vec(values.clone(), [k], &Device::cpu()).unwrap();
            let back = u.mul(&sigma).unwrap().matmul(&v.t().unwrap()).unwrap();
            assert!(far(&back, &x) < 1e-13, "{rows}×{cols}");
            for part in [&u, &v] {
                assert!(far(&part.t().unwrap().matmul(part).unwrap(), &identity(k)) < 1e-13);
            }
            let alone = singular_values(&x).unwrap();
            assert!(values.iter().zip(alone).all(|(a, b)| (a - b).abs() < 1e-13));
        }
    }

    #[test]
    fn nothing_of_no_size_and_vectors_of_nothing() {
        let empty = svd(&Tensor::zeros([0, 3], DType::F64, &Device::cpu()).unwrap()).unwrap();
        assert_eq!((empty.u.dims(), empty.v.dims()), (&[0, 0][..], &[3, 0][..]));
        let low = matrix(6, 2, 2).matmul(&matrix(2, 4, 3)).unwrap();
        let Svd { u, values, .. } = svd(&low).unwrap();
        assert!(values[1] > 0.1 && values[2] < 1e-14);
        assert!(u.to_vec::<f64>().unwrap().iter().all(|u| u.is_finite()));
    }

    #[test]
    fn the_same_bits_on_any_number_of_threads() {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| svd(&matrix(90, 61, 4)).unwrap().u.to_vec::<f64>().unwrap())
        };
        let one = run(1);
        assert!([2, 5].into_iter().all(|threads| run(threads) == one));
    }
}
