//! Stochastic gradient descent.

use crate::compute;
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, dispatch, parallel};
use crate::dtype::Element;
use crate::error::Result;
use crate::grad::Gradients;
use crate::nn::Module;
use crate::opencl;
use crate::optim::{Memory, Optimizer};

/// Gradient descent with momentum: v ← μ·v + g + w·p, p ← p − η·v.
///
/// ```
/// let optimizer = randlora::optim::Sgd::new().momentum(0.9);
/// ```
#[derive(Debug, Default)]
pub struct Sgd {
    momentum: f64,
    weight_decay: f64,
    velocity: Memory<1>,
}

impl Sgd {
    /// Without momentum and weight decay.
    pub fn new() -> Sgd {
        Sgd::default()
    }

    /// How much of the last step's velocity stays: μ.
    pub fn momentum(self, momentum: f64) -> Sgd {
        Sgd { momentum, ..self }
    }

    /// What is added of a parameter to its gradient: w.
    pub fn weight_decay(self, weight_decay: f64) -> Sgd {
        Sgd { weight_decay, ..self }
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, model: &mut dyn Module, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        let (momentum, decay) = (self.momentum, self.weight_decay);
        self.velocity.update(model, gradients, |parameter, gradient, _, [velocity]| {
            if gradient.is_on_opencl() {
                let (g, p) = (compute::contiguous(gradient)?, parameter.cl_own()?);
                let v = compute::cl_own(velocity)?;
                return opencl::optim::sgd([p.cl()?, v.cl()?, g.cl()?], momentum, decay, learning_rate);
            }
            dispatch!("sgd", gradient.dtype(), T => {
                let [momentum, decay, rate] = [momentum, decay, learning_rate].map(T::from_f64);
                let gradient = compute::contiguous(gradient)?;
                let g = gradient.elements::<T>()?;
                let v = compute::write::<T>(velocity)?;
                parallel::together([parameter.elements_mut::<T>()?, v], &|at, [p, v]| {
                    vectorize(Step { g: &g[at..at + p.len()], p, v, momentum, decay, rate });
                });
                Ok(())
            })
        })
    }
}

struct Step<'a, T> {
    p: &'a mut [T],
    v: &'a mut [T],
    g: &'a [T],
    momentum: T,
    decay: T,
    rate: T,
}

impl<T: Float> Kernel for Step<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for ((p, v), &g) in self.p.iter_mut().zip(self.v).zip(self.g) {
            *v = self.momentum * *v + (g + self.decay * *p);
            *p = *p - self.rate * *v;
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
            || Box::new(Sgd::new().momentum(0.9).weight_decay(0.1)),
            |p, g, _, [v]| {
                *v = 0.9 * *v + g + 0.1 * *p;
                *p -= 0.01 * *v;
            },
        );
    }
}
