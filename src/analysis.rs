//! What an update is made of: its singular values and its rank.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The singular values of a matrix, largest first, computed in f64 (each to a relative accuracy of about
/// 1e-15 of the largest).
///
/// ```
/// use randlora::{Device, Tensor, analysis};
///
/// let x = Tensor::from_vec(vec![3.0, 0.0, 0.0, 4.0], [2, 2], &Device::cpu())?;
/// assert_eq!(analysis::singular_values(&x)?, [4.0, 3.0]);
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] where `x` is no matrix, [`Error::NonFinite`] where it holds a NaN or infinity.
pub fn singular_values(x: &Tensor) -> Result<Vec<f64>> {
    let rotated = rotate(triangle(short_rows(x)?));
    Ok(rotated.into_iter().map(|(value, _)| value).collect())
}

/// The matrix of this rank that is nearest to a matrix (Eckart and Young, 1936), as two factors in f64: B (rows, r)
/// and A (r, columns) with X ≈ B·A, their columns and rows of the same length √σᵢ. The rank is at most the smaller
/// side.
///
/// ```
/// use randlora::{Device, Tensor, analysis};
///
/// let x = Tensor::from_vec(vec![3.0, 0.0, 0.0, 4.0], [2, 2], &Device::cpu())?;
/// let (b, a) = analysis::low_rank(&x, 1)?;
/// assert_eq!(b.matmul(&a)?.to_vec::<f64>()?, [0.0, 0.0, 0.0, 4.0]);
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// # Errors
/// Those of [`singular_values`].
pub fn low_rank(x: &Tensor, rank: usize) -> Result<(Tensor, Tensor)> {
    let rows = short_rows(x)?;
    let (count, rank) = (rows.len(), rank.min(rows.len()));
    let triangle = triangle(rows);
    // L·zᵢ = σᵢ·uᵢ gives the vectors of the shorter side, those of the longer follow: Xᵀ·uᵢ = σᵢ·vᵢ.
    let rotated = rotate(triangle.clone());
    let mut short = Vec::with_capacity(rank * count);
    for (value, z) in &rotated[..rank] {
        let scale = if *value > 0.0 { 1.0 / (value * value) } else { 0.0 };
        short.extend(triangle.iter().map(|row| dot(row, z) * scale));
    }
    let lengths: Vec<f64> = rotated[..rank].iter().map(|(value, _)| value.sqrt()).collect();
    let column = |values: Vec<f64>| Tensor::from_vec(values, [rank, 1], x.device());
    let inverse = lengths.iter().map(|&l| if l > 0.0 { 1.0 / l } else { 0.0 }).collect();
    let wide = x.detach().to_dtype(DType::F64)?;
    let wide = if x.dims()[0] < x.dims()[1] { wide } else { wide.t()? };
    let short = Tensor::from_vec(short, [rank, count], x.device())?;
    let long = short.matmul(&wide)?.mul(&column(inverse)?)?;
    let short = short.mul(&column(lengths)?)?;
    match x.dims()[0] < x.dims()[1] {
        true => Ok((short.t()?, long)),
        false => Ok((long.t()?, short)),
    }
}

/// How many directions an update uses: e^H with the entropy H = −Σ pᵢ·ln pᵢ of the singular values' shares
/// pᵢ = σᵢ/Σσ (Roy and Vetterli, 2007). Between 1 and the rank; 0 where all are 0.
///
/// ```
/// use randlora::analysis;
///
/// assert!((analysis::effective_rank(&[2.0, 2.0, 2.0, 0.0]) - 3.0).abs() < 1e-12);
/// assert_eq!(analysis::effective_rank(&[5.0, 0.0]), 1.0);
/// ```
pub fn effective_rank(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    if sum <= 0.0 {
        return 0.0;
    }
    let shares = values.iter().map(|value| value / sum).filter(|share| *share > 0.0);
    (-shares.map(|share| share * share.ln()).sum::<f64>()).exp()
}

/// The vectors of a matrix along its longer side, of which there are as many as singular values.
fn short_rows(x: &Tensor) -> Result<Vec<Vec<f64>>> {
    let &[rows, cols] = x.dims() else {
        return Err(Error::shape("singular_values", format!("{} is no matrix", x.shape())));
    };
    let x = x.detach().to_dtype(DType::F64)?;
    let values = if rows < cols { x } else { x.t()? }.to_vec::<f64>()?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(Error::NonFinite {
            what: "a matrix whose singular values were asked for".into(),
            step: 0,
        });
    }
    let (count, len) = (rows.min(cols), rows.max(cols));
    let mut vectors: Vec<Vec<f64>> = values.chunks(len.max(1)).map(<[f64]>::to_vec).collect();
    vectors.truncate(count);
    Ok(vectors)
}

/// L of X = L·Q, lower triangular, by Householder reflections: as many columns as rows, with the singular values
/// and the left singular vectors of X.
fn triangle(mut rows: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    for i in 0..rows.len() {
        let (head, tail) = rows.split_at_mut(i + 1);
        let row = &mut head[i];
        let mut mirror = row[i..].to_vec();
        let length = dot(&mirror, &mirror).sqrt();
        let corner = if mirror[0] > 0.0 { -length } else { length };
        mirror[0] -= corner;
        let square = dot(&mirror, &mirror);
        if square > 0.0 {
            for other in tail {
                let factor = 2.0 * dot(&mirror, &other[i..]) / square;
                other[i..].iter_mut().zip(&mirror).for_each(|(x, m)| *x -= factor * m);
            }
        }
        row[i] = corner;
        row[i + 1..].fill(0.0);
    }
    let count = rows.len();
    rows.iter_mut().for_each(|row| row.truncate(count));
    rows
}

/// The rows, turned into each other until they are orthogonal (one-sided Jacobi rotations), with their lengths: the
/// singular values, largest first.
fn rotate(mut rows: Vec<Vec<f64>>) -> Vec<(f64, Vec<f64>)> {
    // Rotations converge quadratically; sweeps beyond a few do nothing.
    for _ in 0..60 {
        if !sweep(&mut rows) {
            break;
        }
    }
    let mut rotated: Vec<(f64, Vec<f64>)> =
        rows.into_iter().map(|row| (dot(&row, &row).sqrt(), row)).collect();
    rotated.sort_by(|a, b| b.0.total_cmp(&a.0));
    rotated
}

/// Makes every pair of vectors orthogonal once; whether there was anything to do.
fn sweep(vectors: &mut [Vec<f64>]) -> bool {
    let mut turned = false;
    let mut squares: Vec<f64> = vectors.iter().map(|v| dot(v, v)).collect();
    for j in 1..vectors.len() {
        let (head, tail) = vectors.split_at_mut(j);
        let b = &mut tail[0];
        for (i, a) in head.iter_mut().enumerate() {
            let (aa, bb, ab) = (squares[i], squares[j], dot(a, b));
            if ab.abs() <= f64::EPSILON * (aa * bb).max(0.0).sqrt() {
                continue;
            }
            turned = true;
            let zeta = (bb - aa) / (2.0 * ab);
            let tan = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
            let cos = 1.0 / (1.0 + tan * tan).sqrt();
            let sin = cos * tan;
            for (a, b) in a.iter_mut().zip(b.iter_mut()) {
                (*a, *b) = (cos * *a - sin * *b, sin * *a + cos * *b);
            }
            (squares[i], squares[j]) = (aa - tan * ab, bb + tan * ab);
        }
    }
    turned
}

/// In eight sums side by side, which are one instruction or two.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (heads, tails) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = heads.remainder().iter().zip(tails.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 8];
    for (a, b) in heads.zip(tails) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + rest
}

/// The number of singular values above max(rows, columns)·eps·σ₁, with the eps of the type that
/// the matrix was computed in.
///
/// # Errors
/// Those of [`singular_values`].
pub fn rank(x: &Tensor) -> Result<usize> {
    let eps = if x.dtype() == DType::F64 { f64::EPSILON } else { f32::EPSILON as f64 };
    let values = singular_values(x)?;
    let side = x.dims().iter().max().map_or(0.0, |&side| side as f64);
    Ok(numeric_rank(&values, side * eps))
}

/// The number of singular values, largest first, above this share of the largest.
pub fn numeric_rank(values: &[f64], share: f64) -> usize {
    let threshold = share * values.first().unwrap_or(&0.0);
    values.iter().filter(|&&v| v > threshold).count()
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

    #[test]
    fn squares_sum_to_the_frobenius_norm_and_products_have_low_rank() {
        for (rows, cols) in [(7, 12), (12, 7), (1, 5), (20, 20)] {
            let x = matrix(rows, cols, 1);
            let values = singular_values(&x).unwrap();
            let norm: f64 = x.to_vec::<f64>().unwrap().iter().map(|v| v * v).sum();
            assert!((values.iter().map(|v| v * v).sum::<f64>() - norm).abs() < 1e-11 * norm);
            assert_eq!(rank(&x).unwrap(), rows.min(cols));
        }
        let low = matrix(15, 3, 2).matmul(&matrix(3, 11, 3)).unwrap();
        assert_eq!(rank(&low).unwrap(), 3);
        assert_eq!(rank(&low.scale(0.0).unwrap()).unwrap(), 0);
    }

    #[test]
    fn the_nearest_matrix_of_a_rank() {
        let norm = |x: &Tensor| x.to_vec::<f64>().unwrap().iter().map(|v| v * v).sum::<f64>().sqrt();
        for (rows, cols) in [(7, 12), (12, 7), (9, 9), (1, 5), (30, 2)] {
            let x = matrix(rows, cols, 4);
            let values = singular_values(&x).unwrap();
            for rank in [0, 1, 2, rows.min(cols), 100] {
                let (b, a) = low_rank(&x, rank).unwrap();
                let rank = rank.min(rows.min(cols));
                assert_eq!((b.dims(), a.dims()), (&[rows, rank][..], &[rank, cols][..]));
                // What is left are the other singular values: no matrix of the rank comes nearer.
                let left = if rank > 0 { norm(&x.sub(&b.matmul(&a).unwrap()).unwrap()) } else { norm(&x) };
                let tail = values[rank..].iter().map(|v| v * v).sum::<f64>().sqrt();
                assert!((left - tail).abs() < 1e-12 * values[0], "{rows}×{cols}, {rank}: {left} {tail}");
                assert!((norm(&a) - norm(&b)).abs() < 1e-12 * values[0]);
            }
        }
        let zero = matrix(4, 6, 5).scale(0.0).unwrap();
        let (b, a) = low_rank(&zero, 2).unwrap();
        assert_eq!((norm(&b), norm(&a)), (0.0, 0.0));
    }

    #[test]
    fn no_matrix_and_no_numbers() {
        let device = Device::cpu();
        assert!(singular_values(&Tensor::from_vec(vec![1.0], [1], &device).unwrap()).is_err());
        assert!(rank(&Tensor::from_vec(vec![f64::NAN], [1, 1], &device).unwrap()).is_err());
        assert_eq!(singular_values(&Tensor::zeros([0, 3], DType::F64, &device).unwrap()).unwrap(), [0f64; 0]);
    }
}
