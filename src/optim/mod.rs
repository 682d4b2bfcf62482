//! Optimisers, learning rate schedules and gradient clipping.

mod adamw;
mod clip;
mod schedule;
mod sgd;

use std::collections::{BTreeMap, BTreeSet};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::Gradients;
use crate::nn::{ItemMut, Module, Parameter};
use crate::tensor::Tensor;

pub use adamw::AdamW;
pub use clip::{clip_gradients, gradient_norm};
pub use schedule::{Decay, Schedule};
pub use sgd::Sgd;

/// What changes parameters by their gradients.
pub trait Optimizer {
    /// Makes one step on every trained parameter of the model, in place.
    ///
    /// # Errors
    /// [`Error::NoGradient`] for a trained parameter that the loss does not depend on, before
    /// anything is changed.
    fn step(&mut self, model: &mut dyn Module, gradients: &Gradients, learning_rate: f64) -> Result<()>;
}

/// What an optimiser remembers of each parameter, by name: N tensors of the parameter's shape and
/// the number of steps made on it.
#[derive(Debug)]
struct Memory<const N: usize>(BTreeMap<String, (u64, [Tensor; N])>);

impl<const N: usize> Default for Memory<N> {
    fn default() -> Self {
        Memory(BTreeMap::new())
    }
}

impl<const N: usize> Memory<N> {
    /// Calls `update` with every trained parameter, its gradient, how many steps the parameter has
    /// seen with this one, and what is remembered of it, zeros at first.
    fn update(
        &mut self,
        model: &mut dyn Module,
        gradients: &Gradients,
        update: impl Fn(&mut Parameter, &Tensor, u64, &mut [Tensor; N]) -> Result<()>,
    ) -> Result<()> {
        check(model, gradients)?;
        model.try_visit_mut(&mut |name, item| {
            let ItemMut::Parameter(parameter) = item else { return Ok(()) };
            let Some(gradient) = gradients.get(parameter.leaf()).filter(|_| parameter.is_trainable()) else {
                return Ok(());
            };
            if !self.0.contains_key(name) {
                let zeros = || Tensor::zeros(gradient.shape(), gradient.dtype(), gradient.device());
                let tensors = (0..N).map(|_| zeros()).collect::<Result<Vec<_>>>()?;
                self.0.insert(name.into(), (0, tensors.try_into().expect("N were made")));
            }
            let (steps, remembered) = self.0.get_mut(name).expect("it was just made");
            if remembered.iter().any(|x| x.shape() != gradient.shape() || x.dtype() != gradient.dtype()) {
                let message =
                    format!("`{name}` had another shape or type before: use a new optimiser for a new model");
                return Err(Error::config("optimizer", message));
            }
            *steps += 1;
            update(parameter, gradient, *steps, remembered)
        })
    }
}

/// An error if a trained parameter has no gradient, a type that is not computed in, or a name that
/// another one has.
fn check(model: &dyn Module, gradients: &Gradients) -> Result<()> {
    let mut names = BTreeSet::new();
    for (name, parameter) in model.parameters().into_iter().filter(|(_, p)| p.is_trainable()) {
        if !names.insert(name.clone()) {
            return Err(Error::config(
                "module",
                format!("two parameters are called `{name}`: give them names"),
            ));
        }
        let dtype = parameter.value().dtype();
        match gradients.get(parameter.leaf()) {
            None => return Err(Error::NoGradient { parameter: name }),
            Some(gradient) if gradient.dtype() != dtype || gradient.shape() != parameter.value().shape() => {
                let message = format!("`{name}` is {:?}, its gradient {gradient:?}", parameter.value());
                return Err(Error::shape("step", message));
            }
            Some(_) if !matches!(dtype, DType::F32 | DType::F64) => {
                let message =
                    format!("`{name}` is {dtype}, which stores frozen weights only: freeze or cast it");
                return Err(Error::dtype("step", message));
            }
            Some(gradient) if gradient.is_on_opencl() && dtype != DType::F32 => {
                let message = format!("`{name}` is {dtype}: an OpenCL device trains in f32");
                return Err(Error::dtype("step", message));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::Device;
    use crate::nn::Item;
    use crate::random;

    pub(crate) struct Two {
        pub(crate) a: Parameter,
        pub(crate) b: Parameter,
    }
    crate::module!(Two { a, b });

    pub(crate) fn values(n: usize, seed: u64) -> Vec<f64> {
        let mut words = vec![0; n];
        random::words(seed, 0, 0, &mut words);
        words.into_iter().map(random::normal).collect()
    }

    pub(crate) fn tensor(values: &[f64], dtype: DType) -> Tensor {
        Tensor::from_slice(values, [values.len()], &Device::cpu()).unwrap().to_dtype(dtype).unwrap()
    }

    /// Runs five steps with random gradients on 3 and on 40,000 numbers, and the same on every
    /// number alone in f64 by `twin(p, g, t, state)`.
    pub(crate) fn against_a_twin<const N: usize>(
        optimizer: impl Fn() -> Box<dyn Optimizer>,
        twin: impl Fn(&mut f64, f64, i32, &mut [f64; N]),
    ) {
        for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 2e-6)] {
            let (a, b) = (values(3, 1), values(40_000, 2));
            let mut model =
                Two { a: Parameter::new(tensor(&a, dtype)), b: Parameter::new(tensor(&b, dtype)) };
            let mut want: Vec<f64> = a.into_iter().chain(b).collect();
            let mut state = vec![[0.0; N]; want.len()];
            let mut optimizer = optimizer();
            for t in 1..=5 {
                let (da, db) = (values(3, 10 + t), values(40_000, 20 + t));
                let mut gradients = Gradients::default();
                gradients.insert(model.a.leaf(), tensor(&da, dtype)).unwrap();
                gradients.insert(model.b.leaf(), tensor(&db, dtype)).unwrap();
                optimizer.step(&mut model, &gradients, 0.01).unwrap();
                for ((p, g), state) in want.iter_mut().zip(da.into_iter().chain(db)).zip(&mut state) {
                    twin(p, g, t as i32, state);
                }
            }
            let got = [&model.a, &model.b]
                .map(|p| p.value().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap());
            for (got, want) in got.concat().iter().zip(&want) {
                assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "{dtype}: {got} {want}");
            }
        }
    }

    #[test]
    fn a_missing_gradient_is_named_before_anything_changes() {
        let mut model = Two {
            a: Parameter::new(tensor(&[1.0], DType::F64)),
            b: Parameter::new(tensor(&[2.0], DType::F64)),
        };
        let mut gradients = Gradients::default();
        gradients.insert(model.a.leaf(), tensor(&[1.0], DType::F64)).unwrap();
        let mut sgd = Sgd::new();
        let error = sgd.step(&mut model, &gradients, 0.1).unwrap_err();
        assert!(matches!(error, Error::NoGradient { parameter } if parameter == "b"));
        assert_eq!(model.a.value().item().unwrap(), 1.0);
        model.b.set_trainable(false);
        sgd.step(&mut model, &gradients, 0.1).unwrap();
        assert_eq!((model.a.value().item().unwrap(), model.b.value().item().unwrap()), (0.9, 2.0));
    }

    #[test]
    fn two_parameters_of_one_name_are_refused() {
        struct Same(Parameter, Parameter);
        impl Module for Same {
            fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
                [&self.0, &self.1].into_iter().for_each(|p| p.visit(path, f));
            }
            fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
                [&mut self.0, &mut self.1].into_iter().for_each(|p| p.visit_mut(path, f));
            }
        }
        let same = || Parameter::new(tensor(&[1.0], DType::F64));
        let mut model = Same(same(), same());
        let mut gradients = Gradients::default();
        gradients.insert(model.0.leaf(), tensor(&[1.0], DType::F64)).unwrap();
        gradients.insert(model.1.leaf(), tensor(&[1.0], DType::F64)).unwrap();
        assert!(matches!(AdamW::new().step(&mut model, &gradients, 0.1), Err(Error::Config { .. })));
    }

    #[test]
    fn another_model_needs_another_optimizer() {
        let mut optimizer = AdamW::new();
        for (n, works) in [(2, true), (3, false)] {
            let mut model = Two {
                a: Parameter::new(tensor(&values(n, 0), DType::F64)),
                b: Parameter::frozen(tensor(&[], DType::F64)),
            };
            let mut gradients = Gradients::default();
            gradients.insert(model.a.leaf(), tensor(&values(n, 1), DType::F64)).unwrap();
            assert_eq!(optimizer.step(&mut model, &gradients, 0.1).is_ok(), works);
        }
    }
}
