//! How adapters get on the model and off it: parts on layers are attached and detached, parameters held whole
//! change places with the base's.

use std::any::Any;
use std::collections::BTreeMap;
use std::mem::{swap, take};

use super::{Active, Adapted, Kept, Whole, train};
use crate::adapters::weighted::{Part, Weighted};
use crate::error::Result;
use crate::nn::{ItemMut, LinearAdapter, Module, Parameter};
use crate::tensor::Tensor;

impl<M: Module> Adapted<M> {
    /// Gives the model the values that it had, and returns what was put on it since. Its own parameters are frozen
    /// from now on where that is to be `kept`.
    pub(super) fn back_to(&mut self, before: &BTreeMap<String, (Tensor, bool)>, kept: bool) -> Result<Kept> {
        let mut found = Kept::default();
        self.model.try_visit_mut(&mut |name, item| match item {
            ItemMut::Linear(layer) => {
                found.layers.extend(layer.detach().map(|adapter| (name.to_string(), Some(adapter))));
                Ok(())
            }
            ItemMut::Parameter(parameter) => {
                if parameter.is_trainable() {
                    found.whole.insert(name.into(), Parameter::new(parameter.value().clone()));
                }
                let Some((value, trainable)) = before.get(name) else { return Ok(()) };
                parameter.set_trainable(*trainable && !kept);
                parameter.replace(value.clone())
            }
        })?;
        Ok(found)
    }

    /// Puts adapters on the base, or none.
    pub(super) fn put_on(&mut self, parts: Vec<(String, f64)>, whole: Whole) -> Result<()> {
        self.check_layers()?;
        let owners = self.owners(&parts, &whole)?;
        let sums = self.sums(&parts, &owners)?;
        self.active = Active { parts, whole, owners, sums };
        self.swap_whole();
        let (active, adapters) = (&self.active, &mut self.adapters);
        self.model.try_visit_mut(&mut |layer, item| {
            let ItemMut::Linear(linear) = item else { return Ok(()) };
            let take = |(name, weight): &(String, f64)| {
                let adapter = adapters.get_mut(name)?.layers.get_mut(layer)?.take()?;
                Some(Part { name: name.clone(), weight: *weight, adapter })
            };
            let found: Vec<Part> = active.parts.iter().filter_map(take).collect();
            let adapter: Option<Box<dyn LinearAdapter>> = match active.is_one() {
                true => found.into_iter().next().map(|part| part.adapter),
                false if found.is_empty() => None,
                false => Some(Box::new(Weighted { parts: found })),
            };
            adapter.map_or(Ok(()), |adapter| linear.attach(adapter))
        })
    }

    /// Takes the active adapters off, and says which they were.
    pub(super) fn take_off(&mut self) -> Result<Active> {
        self.check_layers()?;
        self.swap_whole();
        let active = take(&mut self.active);
        let adapters = &mut self.adapters;
        for (parameter, owner) in &active.owners {
            let kept = owner.as_ref().and_then(|owner| adapters.get_mut(owner));
            let parameter = kept.and_then(|kept| kept.whole.get_mut(parameter));
            parameter.into_iter().for_each(|parameter| parameter.set_trainable(true));
        }
        let mut keep = |name: &str, layer: &str, mut adapter: Box<dyn LinearAdapter>| {
            train(&mut *adapter, true);
            let place = adapters.get_mut(name).and_then(|kept| kept.layers.get_mut(layer));
            if let Some(place) = place {
                *place = Some(adapter);
            }
        };
        self.model.visit_mut("", &mut |layer, item| {
            let ItemMut::Linear(linear) = item else { return };
            let Some(mut adapter) = linear.detach() else { return };
            let any: &mut dyn Any = &mut *adapter;
            if let Some(weighted) = any.downcast_mut::<Weighted>() {
                let parts = take(&mut weighted.parts);
                parts.into_iter().for_each(|part| keep(&part.name, layer, part.adapter));
            } else if let Some((only, _)) = active.parts.first() {
                keep(only, layer, adapter);
            }
        });
        Ok(active)
    }

    /// The sums that stand in place of the base's parameters.
    fn sums(
        &self,
        parts: &[(String, f64)],
        owners: &BTreeMap<String, Option<String>>,
    ) -> Result<BTreeMap<String, Parameter>> {
        let mut sums = BTreeMap::new();
        for (name, base) in self.model.parameters() {
            if owners.get(&name) != Some(&None) {
                continue;
            }
            let of = |(adapter, weight): &(String, f64)| {
                Some((self.adapters[adapter].whole.get(&name)?.value(), *weight))
            };
            let held: Vec<(&Tensor, f64)> = parts.iter().filter_map(of).collect();
            sums.insert(name, Parameter::frozen(sum(base.value(), &held)?));
        }
        Ok(sums)
    }

    /// Lets the base's parameters and those that adapters hold in their place change places.
    fn swap_whole(&mut self) {
        let Active { owners, sums, .. } = &mut self.active;
        let adapters = &mut self.adapters;
        self.model.visit_mut("", &mut |name, item| {
            let (ItemMut::Parameter(parameter), Some(owner)) = (item, owners.get(name)) else { return };
            let place = match owner {
                Some(owner) => adapters.get_mut(owner).and_then(|kept| kept.whole.get_mut(name)),
                None => sums.get_mut(name),
            };
            place.into_iter().for_each(|place| swap(place, parameter));
        });
    }
}

/// (1 − Σₖ wₖ)·P0 + Σₖ wₖ·Pₖ, in the type of the Pₖ.
fn sum(base: &Tensor, held: &[(&Tensor, f64)]) -> Result<Tensor> {
    let rest = 1.0 - held.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut terms: Vec<Tensor> = held.iter().map(|(x, weight)| x.scale(*weight)).collect::<Result<_>>()?;
    // 0.1 + 0.2 + 0.7 is 1 up to rounding.
    if let Some((first, _)) = held.first().filter(|_| rest.abs() > 1e-12) {
        terms.push(base.to_dtype(first.dtype())?.scale(rest)?);
    }
    let sum = terms.into_iter().map(Ok).reduce(|a, b| a?.add(&b?));
    sum.unwrap_or_else(|| Ok(base.clone()))
}
