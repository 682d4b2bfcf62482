//! Models as trees of named parameters.

use std::collections::BTreeMap;

use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::Gradients;
use crate::nn::{Context, Linear, LinearAdapter, Parameter};
use crate::tensor::Tensor;

/// What a visit of a module comes to.
#[derive(Clone, Copy, Debug)]
pub enum Item<'a> {
    /// A parameter.
    Parameter(&'a Parameter),
    /// A linear layer, before its parameters: where adapters are attached.
    Linear(&'a Linear),
}

/// What a visit of a module comes to, to be changed.
#[derive(Debug)]
pub enum ItemMut<'a> {
    /// A parameter.
    Parameter(&'a mut Parameter),
    /// A linear layer, before its parameters.
    Linear(&'a mut Linear),
}

/// Something made of parameters that have names.
///
/// Names are paths with dots, as in `encoder.layer.0.attention.query.weight`. The order of a visit
/// is fixed, and each parameter is visited once. [`module!`](crate::module) writes both visits
/// from a list of fields; how a module computes is its own affair, usually a method `forward`.
pub trait Module {
    /// Calls `f` with the name of every item, in order; names begin with `path`.
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>));

    /// The same visit, to change the items.
    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>));

    /// A visit that changes the items until the first error.
    fn try_visit_mut(&mut self, f: &mut dyn FnMut(&str, ItemMut<'_>) -> Result<()>) -> Result<()> {
        let mut result = Ok(());
        self.visit_mut("", &mut |name, item| {
            if result.is_ok() {
                result = f(name, item);
            }
        });
        result
    }

    /// All parameters with their names, in order.
    fn parameters(&self) -> Vec<(String, &Parameter)> {
        let mut found = Vec::new();
        self.visit("", &mut |name, item| {
            if let Item::Parameter(parameter) = item {
                found.push((name.to_string(), parameter));
            }
        });
        found
    }

    /// All linear layers with their names, in order.
    fn linears(&self) -> Vec<(String, &Linear)> {
        let mut found = Vec::new();
        self.visit("", &mut |name, item| {
            if let Item::Linear(linear) = item {
                found.push((name.to_string(), linear));
            }
        });
        found
    }

    /// How many numbers are learned or frozen.
    fn parameter_count(&self) -> usize {
        self.parameters().iter().map(|(_, p)| p.value().numel()).sum()
    }

    /// How many numbers are learned.
    fn trainable_count(&self) -> usize {
        self.parameters().iter().filter(|(_, p)| p.is_trainable()).map(|(_, p)| p.value().numel()).sum()
    }

    /// Trains every parameter from now on, or none.
    fn set_trainable(&mut self, trainable: bool) {
        self.visit_mut("", &mut |_, item| {
            if let ItemMut::Parameter(parameter) = item {
                parameter.set_trainable(trainable);
            }
        });
    }

    /// Trains no parameter from now on.
    fn freeze(&mut self) {
        self.set_trainable(false);
    }

    /// All values rounded to another type: f64 to check gradients, a narrow one to store a frozen
    /// model.
    ///
    /// # Errors
    /// [`Error::DType`] where a trained parameter would become a type that nothing is computed in.
    fn cast(&mut self, dtype: DType) -> Result<()> {
        self.try_visit_mut(&mut |_, item| match item {
            ItemMut::Parameter(parameter) => parameter.cast(dtype),
            ItemMut::Linear(_) => Ok(()),
        })
    }

    /// Moves all values to another device.
    ///
    /// # Errors
    /// Those of [`Tensor::to_device`].
    fn to_device(&mut self, device: &Device) -> Result<()> {
        self.try_visit_mut(&mut |_, item| match item {
            ItemMut::Parameter(parameter) => parameter.to_device(device),
            ItemMut::Linear(_) => Ok(()),
        })
    }

    /// All values by name. No copy: the model copies a value when it changes it.
    fn state(&self) -> BTreeMap<String, Tensor> {
        self.parameters().into_iter().map(|(name, p)| (name, p.value().clone())).collect()
    }

    /// Takes over all values of a [`state`](Module::state). Changes nothing where it does not fit.
    ///
    /// # Errors
    /// [`Error::NoMatch`] for a name that no parameter has, [`Error::Data`] for a parameter that
    /// the state lacks or that has another shape.
    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let parameters: BTreeMap<_, _> = self.parameters().into_iter().collect();
        if let Some(name) = state.keys().find(|name| !parameters.contains_key(*name)) {
            return Err(Error::NoMatch {
                wanted: format!("`{name}`"),
                available: parameters.into_keys().collect(),
            });
        }
        for (name, parameter) in &parameters {
            let shape = parameter.value().shape();
            let message = match state.get(name) {
                Some(value) if value.shape() == shape => continue,
                Some(value) => format!("it has {} where the model has {shape}", value.shape()),
                None => "the state lacks it".into(),
            };
            return Err(Error::data(format!("`{name}`"), message));
        }
        self.try_visit_mut(&mut |name, item| match (item, state.get(name)) {
            (ItemMut::Parameter(parameter), Some(value)) => parameter.replace(value.clone()),
            _ => Ok(()),
        })
    }

    /// The sum of what the adapters add to the loss; None if they add nothing.
    fn regulariser(&self, ctx: &Context) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (_, linear) in self.linears() {
            let Some(term) = linear.adapter().map(|a| a.regulariser(ctx)).transpose()?.flatten() else {
                continue;
            };
            sum = Some(match sum {
                Some(sum) => sum.add(&term)?,
                None => term,
            });
        }
        Ok(sum)
    }

    /// Tells the adapters that the optimiser has made step `step` with these gradients.
    fn after_step(&mut self, step: usize, gradients: &Gradients) -> Result<()> {
        let mut each = |f: &dyn Fn(&mut dyn LinearAdapter) -> Result<()>| {
            self.try_visit_mut(&mut |_, item| match item {
                ItemMut::Linear(linear) => linear.adapter_mut().map_or(Ok(()), f),
                ItemMut::Parameter(_) => Ok(()),
            })
        };
        each(&|adapter| adapter.after_step(step, gradients))?;
        each(&|adapter| adapter.settle(step))
    }
}

/// The name of a part: `path.name`, or the one that is not empty.
pub fn join(path: &str, name: &str) -> String {
    match (path, name) {
        ("", _) => name.into(),
        (_, "") => path.into(),
        _ => format!("{path}.{name}"),
    }
}

impl Module for Parameter {
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        f(path, Item::Parameter(self));
    }

    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        f(path, ItemMut::Parameter(self));
    }
}

/// What may be there or not has its name either way.
impl<M: Module> Module for Option<M> {
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        self.iter().for_each(|m| m.visit(path, f));
    }

    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        self.iter_mut().for_each(|m| m.visit_mut(path, f));
    }
}

/// The parts of a list are called 0, 1, …
impl<M: Module> Module for Vec<M> {
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        self.iter().enumerate().for_each(|(i, m)| m.visit(&join(path, &i.to_string()), f));
    }

    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        self.iter_mut().enumerate().for_each(|(i, m)| m.visit_mut(&join(path, &i.to_string()), f));
    }
}

impl<M: Module + ?Sized> Module for Box<M> {
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        (**self).visit(path, f);
    }

    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        (**self).visit_mut(path, f);
    }
}

/// Implements [`Module`](crate::nn::Module) for a struct, from a list of those of its fields that
/// are modules. A part has the name of its field, or the one after `=>`; the name `""` adds
/// nothing to the path.
///
/// ```
/// use randlora::nn::{Context, Init, Linear, Module};
/// use randlora::{Device, Result, Tensor};
///
/// struct Classifier {
///     layers: Vec<Linear>,
///     head: Linear,
/// }
/// randlora::module!(Classifier { layers => "hidden", head });
///
/// impl Classifier {
///     fn forward(&self, x: &Tensor, ctx: &Context) -> Result<Tensor> {
///         let mut x = x.clone();
///         for (i, layer) in self.layers.iter().enumerate() {
///             x = layer.forward(&x, &ctx.enter(i as u64))?.relu()?;
///         }
///         self.head.forward(&x, &ctx.enter(self.layers.len() as u64))
///     }
/// }
///
/// let init = Init::seeded(0, &Device::cpu());
/// let layers = (0..2).map(|i| Linear::init(&init.at(&format!("hidden.{i}")), 4, 4, true));
/// let model = Classifier {
///     layers: layers.collect::<Result<_>>()?,
///     head: Linear::init(&init.at("head"), 4, 3, false)?,
/// };
/// let names: Vec<String> = model.parameters().into_iter().map(|(name, _)| name).collect();
/// assert_eq!(names, ["hidden.0.weight", "hidden.0.bias", "hidden.1.weight", "hidden.1.bias", "head.weight"]);
/// # Ok::<(), randlora::Error>(())
/// ```
#[macro_export]
macro_rules! module {
    ($Type:ident { $($field:ident $(=> $name:literal)?),* $(,)? }) => {
        #[allow(unused_variables)] // A module may have no parts.
        impl $crate::nn::Module for $Type {
            fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, $crate::nn::Item<'a>)) {
                $({
                    let path = $crate::nn::join(path, $crate::module!(@name $field $($name)?));
                    $crate::nn::Module::visit(&self.$field, &path, f);
                })*
            }

            fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, $crate::nn::ItemMut<'_>)) {
                $({
                    let path = $crate::nn::join(path, $crate::module!(@name $field $($name)?));
                    $crate::nn::Module::visit_mut(&mut self.$field, &path, f);
                })*
            }
        }
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:literal) => { $name };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::nn::{Embedding, Init};
    use crate::ops::index::Ids;

    struct Inner {
        scale: Parameter,
        linears: Vec<Linear>,
        nothing: Option<Linear>,
        boxed: Box<dyn Module>,
    }
    crate::module!(Inner { scale, linears => "layers", nothing, boxed => "" });

    struct Empty;
    crate::module!(Empty {});

    fn inner() -> Inner {
        let init = Init::seeded(0, &Device::cpu());
        let linear = |bias| Linear::init(&init, 2, 3, bias).unwrap();
        Inner {
            scale: Parameter::new(init.constant([], 1.0).unwrap()),
            linears: vec![linear(true), linear(false)],
            nothing: None,
            boxed: Box::new(linear(false)),
        }
    }

    #[test]
    fn names_in_order() {
        let mut model = inner();
        let names = ["scale", "layers.0.weight", "layers.0.bias", "layers.1.weight", "weight"];
        assert_eq!(model.parameters().iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(
            model.linears().iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(),
            ["layers.0", "layers.1", ""]
        );
        let mut seen = Vec::new();
        model.visit_mut("a.b", &mut |name, item| {
            if let ItemMut::Parameter(_) = item {
                seen.push(name.to_string());
            }
        });
        assert_eq!(
            seen,
            ["a.b.scale", "a.b.layers.0.weight", "a.b.layers.0.bias", "a.b.layers.1.weight", "a.b.weight"]
        );
        assert!(Empty.parameters().is_empty());
    }

    #[test]
    fn counting_and_freezing() {
        let mut model = inner();
        assert_eq!((model.parameter_count(), model.trainable_count()), (1 + 6 + 3 + 6 + 6, 22));
        assert!(matches!(model.cast(DType::F16), Err(Error::DType { .. })));
        model.freeze();
        model.scale.set_trainable(true);
        assert_eq!((model.parameter_count(), model.trainable_count()), (22, 1));
        model.cast(DType::F64).unwrap();
        assert!(model.parameters().iter().all(|(_, p)| p.value().dtype() == DType::F64));
    }

    #[test]
    fn state_goes_from_model_to_model() {
        let (mut from, mut to) = (inner(), inner());
        from.scale.set(Tensor::scalar(3.0, DType::F32, &Device::cpu()).unwrap()).unwrap();
        let mut state = from.state();
        to.load_state(&state).unwrap();
        assert_eq!(to.scale.value().item().unwrap(), 3.0);

        state.insert("typo".into(), from.scale.value().clone());
        let error = to.load_state(&state).unwrap_err().to_string();
        assert!(error.contains("`typo` matches no") && error.contains("layers.0.weight"), "{error}");
        state.remove("typo");
        let scale = state.insert("scale".into(), state["weight"].clone()).unwrap();
        assert_eq!(
            to.load_state(&state).unwrap_err().to_string(),
            "`scale`: it has [3, 2] where the model has []"
        );
        state.insert("scale".into(), scale);
        state.remove("weight");
        assert_eq!(to.load_state(&state).unwrap_err().to_string(), "`weight`: the state lacks it");
    }

    #[test]
    fn a_tied_weight_is_one_parameter() {
        struct Tied {
            tokens: Embedding,
        }
        crate::module!(Tied { tokens });
        let ids = Ids::new(vec![2, 0], [2]).unwrap();
        let tokens = Embedding::init(&Init::seeded(1, &Device::cpu()), 3, 4, 1.0).unwrap();
        let model = Tied { tokens };
        let logits = |embedding: &Tensor, head: &Tensor| {
            embedding.embedding(&ids)?.linear(head, None)?.powf(2.0)?.sum_all()
        };
        let weight = model.tokens.weight();
        let tied =
            logits(&weight.tensor(&Context::train(0, 0)), &weight.tensor(&Context::train(0, 0))).unwrap();
        let gradients = tied.backward().unwrap();
        assert_eq!((model.parameters().len(), gradients.len()), (1, 1));

        let (a, b) = (weight.value().track(), weight.value().track());
        let apart = logits(&a, &b).unwrap().backward().unwrap();
        let sum = apart.of(&a).unwrap().add(apart.of(&b).unwrap()).unwrap().to_vec::<f32>().unwrap();
        for (got, want) in gradients.get(weight.leaf()).unwrap().to_vec::<f32>().unwrap().iter().zip(sum) {
            assert!((got - want).abs() < 1e-5);
        }
    }
}
