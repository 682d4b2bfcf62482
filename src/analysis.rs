//! What an update is made of: its singular values and its rank.

use crate::dtype::DType;
use crate::error::{Error, Result};
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
/// [`Error::Shape`] where `x` is no matrix, [`Error::NonFinite`] where it holds a NaN or infinity.
pub fn singular_values(x: &Tensor) -> Result<Vec<f64>> {
    let &[rows, cols] = x.dims() else {
        return Err(Error::shape("singular_values", format!("{} is no matrix", x.shape())));
    };
    let x = x.detach().to_dtype(DType::F64)?;
    // Vectors along the longer side: there are as many as singular values.
    let vectors = if rows < cols { x } else { x.t()? }.to_vec::<f64>()?;
    if vectors.iter().any(|v| !v.is_finite()) {
        return Err(Error::NonFinite {
            what: "a matrix whose singular values were asked for".into(),
            step: 0,
        });
    }
    let (count, len) = (rows.min(cols), rows.max(cols));
    let mut vectors: Vec<Vec<f64>> = vectors.chunks(len.max(1)).map(<[f64]>::to_vec).collect();
    vectors.truncate(count);
    // Rotations converge quadratically; sweeps beyond a few do nothing.
    for _ in 0..60 {
        if !sweep(&mut vectors) {
            break;
        }
    }
    let mut values: Vec<f64> = vectors.iter().map(|v| dot(v, v).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    Ok(values)
}

/// Makes every pair of vectors orthogonal once; whether there was anything to do.
fn sweep(vectors: &mut [Vec<f64>]) -> bool {
    let mut turned = false;
    for j in 1..vectors.len() {
        let (head, tail) = vectors.split_at_mut(j);
        let b = &mut tail[0];
        for a in head {
            let (aa, bb, ab) = (dot(a, a), dot(b, b), dot(a, b));
            if ab.abs() <= f64::EPSILON * (aa * bb).sqrt() {
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
        }
    }
    turned
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
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
