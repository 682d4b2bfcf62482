//! The size of all gradients together, and its limit.

use crate::compute;
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, dispatch, parallel};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::Gradients;
use crate::nn::Module;
use crate::opencl;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// The Euclidean norm of the gradients of all trained parameters as one vector, in f64.
///
/// # Errors
/// [`Error::NonFinite`] for a gradient with a NaN or an infinity in it, called by its parameter's
/// name; `step` is only told on.
pub fn gradient_norm(model: &dyn Module, gradients: &Gradients, step: usize) -> Result<f64> {
    let trained = model.parameters().into_iter().filter(|(_, p)| p.is_trainable());
    let found: Vec<(String, &Tensor)> =
        trained.filter_map(|(name, p)| Some((name, gradients.get(p.leaf())?))).collect();
    let tensors: Vec<&Tensor> = found.iter().map(|(_, gradient)| *gradient).collect();
    let mut sum = 0.0;
    for ((name, _), square) in found.iter().zip(squares_of_all(&tensors)?) {
        if !square.is_finite() {
            return Err(Error::NonFinite { what: format!("the gradient of `{name}`"), step });
        }
        sum += square;
    }
    Ok(sum.sqrt())
}

/// Scales all gradients down so that their norm is at most `limit` (Pascanu, Mikolov and Bengio,
/// 2013), and gives the norm from before. The factor is limit/(norm + 10⁻⁶), as in PyTorch, so that
/// runs compare. Errors as for [`gradient_norm`].
pub fn clip_gradients(model: &dyn Module, gradients: &mut Gradients, limit: f64, step: usize) -> Result<f64> {
    if limit.is_nan() || limit <= 0.0 {
        return Err(Error::config("clip", format!("a largest norm of {limit} is not above 0")));
    }
    let norm = gradient_norm(model, gradients, step)?;
    if norm > limit {
        gradients.scale(limit / (norm + 1e-6))?;
    }
    Ok(norm)
}

/// The sum of the squares of each tensor. Those on an OpenCL device are read back in one go.
fn squares_of_all(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    if tensors.iter().any(|x| x.is_on_opencl()) {
        let ordered = tensors.iter().map(|x| compute::contiguous(x)).collect::<Result<Vec<_>>>()?;
        let views = ordered.iter().map(|x| x.cl()).collect::<Result<Vec<_>>>()?;
        let found = opencl::optim::squares(&views)?;
        let found = Tensor::from_cl(found, DType::F32, Shape::new(&[tensors.len(), 2])?, tensors[0].device());
        let square = |x: &[f32]| (x[0] as f64).powi(2) * x[1] as f64;
        return Ok(found.to_vec::<f32>()?.chunks_exact(2).map(square).collect());
    }
    let squares = |x: &&Tensor| dispatch!("gradient_norm", x.dtype(), T => squares::<T>(x));
    tensors.iter().map(squares).collect()
}

/// Elements whose squares are added up in one go.
const CHUNK: usize = 4096;
const LANES: usize = 8;

/// The sum of the squares, in chunks of a constant size combined in order.
fn squares<T: Float>(x: &Tensor) -> Result<f64> {
    let x = compute::contiguous(x)?;
    let x = x.elements::<T>()?;
    let parts = parallel::map(x.len().div_ceil(CHUNK), CHUNK, &|i| {
        vectorize(Squares(&x[i * CHUNK..x.len().min((i + 1) * CHUNK)]))
    });
    Ok(parts.into_iter().sum())
}

struct Squares<'a, T>(&'a [T]);

impl<T: Float> Kernel for Squares<'_, T> {
    type Element = T;
    type Out = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        let mut lanes = [0.0; LANES];
        let groups = self.0.chunks_exact(LANES);
        let rest: f64 = groups.remainder().iter().map(|x| x.to_f64() * x.to_f64()).sum();
        for group in groups {
            for (lane, x) in lanes.iter_mut().zip(group) {
                *lane += x.to_f64() * x.to_f64();
            }
        }
        lanes.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::nn::Parameter;
    use crate::optim::tests::{Two, tensor, values};

    fn setup(a: &[f64], b: &[f64]) -> (Two, Gradients) {
        let model =
            Two { a: Parameter::new(tensor(a, DType::F32)), b: Parameter::new(tensor(b, DType::F64)) };
        let mut gradients = Gradients::default();
        gradients.insert(model.a.leaf(), tensor(a, DType::F32)).unwrap();
        gradients.insert(model.b.leaf(), tensor(b, DType::F64)).unwrap();
        (model, gradients)
    }

    #[test]
    fn the_norm_is_over_all_trained_parameters() {
        let (mut model, gradients) = setup(&[3.0, 0.0], &[4.0]);
        assert_eq!(gradient_norm(&model, &gradients, 0).unwrap(), 5.0);
        model.b.set_trainable(false);
        assert_eq!(gradient_norm(&model, &gradients, 0).unwrap(), 3.0);
        let (a, b) = (values(3, 1), values(50_001, 2));
        let want =
            a.iter().map(|&x| (x as f32 as f64).powi(2)).chain(b.iter().map(|x| x * x)).sum::<f64>().sqrt();
        let (model, gradients) = setup(&a, &b);
        assert!((gradient_norm(&model, &gradients, 0).unwrap() / want - 1.0).abs() < 1e-13);
        // A square that f32 cannot hold.
        let (model, gradients) = setup(&[3e30], &[]);
        assert!((gradient_norm(&model, &gradients, 0).unwrap() / 3e30 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn clipping_keeps_the_direction() {
        let (model, mut gradients) = setup(&[3.0], &[4.0]);
        assert_eq!(clip_gradients(&model, &mut gradients, 10.0, 0).unwrap(), 5.0);
        assert_eq!(gradients.get(model.b.leaf()).unwrap().item().unwrap(), 4.0);
        assert_eq!(clip_gradients(&model, &mut gradients, 1.0, 0).unwrap(), 5.0);
        assert!((gradients.get(model.a.leaf()).unwrap().item().unwrap() - 0.6).abs() < 1e-6);
        assert!((gradient_norm(&model, &gradients, 0).unwrap() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        for bad in [f64::NAN, f64::INFINITY] {
            let (model, mut gradients) = setup(&[1.0], &[0.0, bad]);
            let error = clip_gradients(&model, &mut gradients, 1.0, 7).unwrap_err();
            assert!(matches!(error, Error::NonFinite { what, step: 7 } if what == "the gradient of `b`"));
        }
    }
}
