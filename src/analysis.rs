//! What an update is made of: its singular values and its rank.

use crate::dtype::DType;
use crate::error::Result;
use crate::linalg::{self, Svd};
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
/// [`Error::Shape`](crate::Error::Shape) where `x` is no matrix,
/// [`Error::NonFinite`](crate::Error::NonFinite) where it holds a NaN or infinity.
pub fn singular_values(x: &Tensor) -> Result<Vec<f64>> {
    linalg::singular_values(x)
}

/// The Frobenius norm √Σ xᵢⱼ² of a tensor of any type, summed in f64.
///
/// # Errors
/// None for a tensor that can be read.
pub fn norm(x: &Tensor) -> Result<f64> {
    linalg::norm(x)
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
/// let near = b.matmul(&a)?.to_vec::<f64>()?;
/// assert!(near.iter().zip([0.0, 0.0, 0.0, 4.0]).all(|(x, want)| (x - want).abs() < 1e-14));
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// # Errors
/// Those of [`singular_values`].
pub fn low_rank(x: &Tensor, rank: usize) -> Result<(Tensor, Tensor)> {
    let Svd { u, values, v } = linalg::svd(x)?;
    let rank = rank.min(values.len());
    let lengths = values[..rank].iter().map(|value| value.sqrt()).collect();
    let lengths = Tensor::from_vec::<f64>(lengths, [rank], x.device())?;
    let scaled = |vectors: &Tensor| vectors.slice(1, 0..rank)?.mul(&lengths);
    Ok((scaled(&u)?, scaled(&v)?.t()?))
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
