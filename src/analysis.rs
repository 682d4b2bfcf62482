//! What an update is made of: its singular values and its rank.

use crate::dtype::DType;
use crate::error::Result;
use crate::linalg;
use crate::tensor::Tensor;

/// The singular values of a matrix, largest first, computed in f64 by one-sided Jacobi rotations
/// (each to a relative accuracy of about 1e-15 of the largest).
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

/// The number of singular values above max(rows, columns)·eps·σ₁, with the eps of the type that
/// the matrix was computed in.
///
/// # Errors
/// Those of [`singular_values`].
pub fn rank(x: &Tensor) -> Result<usize> {
    let eps = if x.dtype() == DType::F64 { f64::EPSILON } else { f32::EPSILON as f64 };
    let values = singular_values(x)?;
    let threshold =
        x.dims().iter().max().map_or(0.0, |&side| side as f64) * eps * values.first().unwrap_or(&0.0);
    Ok(values.iter().filter(|&&v| v > threshold).count())
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
    fn no_matrix_and_no_numbers() {
        let device = Device::cpu();
        assert!(singular_values(&Tensor::from_vec(vec![1.0], [1], &device).unwrap()).is_err());
        assert!(rank(&Tensor::from_vec(vec![f64::NAN], [1, 1], &device).unwrap()).is_err());
        assert_eq!(singular_values(&Tensor::zeros([0, 3], DType::F64, &device).unwrap()).unwrap(), [0f64; 0]);
    }
}
