//! Adam with decoupled weight decay.

use crate::compute;
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, dispatch, parallel};
use crate::dtype::Element;
use crate::error::Result;
use crate::grad::Gradients;
use crate::nn::Module;
use crate::opencl;
use crate::optim::{Memory, Optimizer};

/// AdamW (Loshchilov and Hutter, 2019), step by step as in PyTorch. At a parameter's step t:
///
/// p ← p − η·w·p, m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g²,
/// p ← p − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
///
/// ```
/// let optimizer = randlora::optim::AdamW::new().betas(0.9, 0.98).weight_decay(0.05);
/// ```
#[derive(Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    moments: Memory<2>,
}

impl Default for AdamW {
    fn default() -> AdamW {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, moments: Memory::default() }
    }
}

impl AdamW {
    /// With β₁ = 0.9, β₂ = 0.999, ε = 1e-8 and a weight decay of 0.01.
    pub fn new() -> AdamW {
        AdamW::default()
    }

    /// The decay rates of the two moments: β₁ and β₂.
    pub fn betas(self, beta1: f64, beta2: f64) -> AdamW {
        AdamW { beta1, beta2, ..self }
    }

    /// What is added to the denominator: ε.
    pub fn eps(self, eps: f64) -> AdamW {
        AdamW { eps, ..self }
    }

    /// How much parameters shrink per unit of learning rate: w.
    pub fn weight_decay(self, weight_decay: f64) -> AdamW {
        AdamW { weight_decay, ..self }
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, model: &mut dyn Module, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        let AdamW { beta1, beta2, eps, weight_decay, .. } = *self;
        self.moments.update(model, gradients, |parameter, gradient, t, [m, v]| {
            let correction = |beta: f64| 1.0 - beta.powf(t as f64);
            if gradient.is_on_opencl() {
                let coefficients = opencl::optim::AdamW {
                    beta1,
                    beta2,
                    keep: 1.0 - learning_rate * weight_decay,
                    rate: learning_rate / correction(beta1),
                    root: 1.0 / correction(beta2).sqrt(),
                    eps,
                };
                let (g, p) = (compute::contiguous(gradient)?, parameter.cl_own()?);
                let (m, v) = (compute::cl_own(m)?, compute::cl_own(v)?);
                return opencl::optim::adamw([p.cl()?, m.cl()?, v.cl()?, g.cl()?], coefficients);
            }
            dispatch!("adamw", gradient.dtype(), T => {
                let gradient = compute::contiguous(gradient)?;
                let g = gradient.elements::<T>()?;
                let c = Coefficients {
                    beta1: T::from_f64(beta1),
                    rest1: T::from_f64(1.0 - beta1),
                    beta2: T::from_f64(beta2),
                    rest2: T::from_f64(1.0 - beta2),
                    keep: T::from_f64(1.0 - learning_rate * weight_decay),
                    rate: T::from_f64(learning_rate / correction(beta1)),
                    root: T::from_f64(1.0 / correction(beta2).sqrt()),
                    eps: T::from_f64(eps),
                };
                let (m, v) = (compute::write::<T>(m)?, compute::write::<T>(v)?);
                parallel::together([parameter.elements_mut::<T>()?, m, v], &|at, [p, m, v]| {
                    vectorize(Step { g: &g[at..at + p.len()], p, m, v, c });
                });
                Ok(())
            })
        })
    }
}

/// What is the same for all elements of a step.
#[derive(Clone, Copy)]
struct Coefficients<T> {
    beta1: T,
    rest1: T,
    beta2: T,
    rest2: T,
    keep: T,
    rate: T,
    root: T,
    eps: T,
}

struct Step<'a, T> {
    p: &'a mut [T],
    m: &'a mut [T],
    v: &'a mut [T],
    g: &'a [T],
    c: Coefficients<T>,
}

impl<T: Float> Kernel for Step<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let c = self.c;
        for (((p, m), v), &g) in self.p.iter_mut().zip(self.m).zip(self.v).zip(self.g) {
            *m = c.beta1 * *m + c.rest1 * g;
            *v = c.beta2 * *v + c.rest2 * g * g;
            *p = c.keep * *p - c.rate * *m / (v.sqrt() * c.root + c.eps);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::tests::against_a_twin;

    #[test]
    fn follows_its_formula() {
        against_a_twin(
            || Box::new(AdamW::new().weight_decay(0.1)),
            |p, g, t, [m, v]| {
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                *p -= 0.01 * 0.1 * *p;
                let denominator = v.sqrt() / (1.0 - 0.999f64.powi(t)).sqrt() + 1e-8;
                *p -= 0.01 / (1.0 - 0.9f64.powi(t)) * *m / denominator;
            },
        );
    }

    #[test]
    fn the_first_step_is_the_learning_rate_long() {
        use crate::dtype::DType;
        use crate::nn::Parameter;
        use crate::optim::tests::{Two, tensor};
        let mut model = Two {
            a: Parameter::new(tensor(&[1.0, 1.0], DType::F64)),
            b: Parameter::frozen(tensor(&[], DType::F64)),
        };
        let mut gradients = Gradients::default();
        gradients.insert(model.a.leaf(), tensor(&[1e-3, -40.0], DType::F64)).unwrap();
        AdamW::new().weight_decay(0.0).step(&mut model, &gradients, 0.1).unwrap();
        let p = model.a.value().to_vec::<f64>().unwrap();
        assert!((p[0] - 0.9).abs() < 1e-5 && (p[1] - 1.1).abs() < 1e-5, "{p:?}");
    }
}
