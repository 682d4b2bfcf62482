//! Several adapters on one model: added by name, and active one at a time, several with weights, or none.
//!
//! The model is there once. What an adapter is made of, its parts on the layers and what it holds whole (a
//! classifier of its own, say), is put on the model where the adapter is active, and kept aside where it is not:
//! moved, never copied or computed again. So the model with one active adapter is the model that has only that
//! one, and with none it is the base, bit for bit.

mod places;

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};

use crate::adapters::attach::Attached;
use crate::adapters::merge::{merge, unmerge};
use crate::adapters::share::share_bases;
use crate::adapters::weighted::{Part, Weighted};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Item, ItemMut, LinearAdapter, Merged, Module, Parameter};
use crate::tensor::Tensor;

/// What an active parameter is that several of the active adapters hold whole. (One that a single adapter holds is
/// that adapter's as it is, whatever the adapter's weight.)
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Whole {
    /// There is to be none, as in PEFT: it is an error.
    #[default]
    Apart,
    /// The one of the adapter of this name.
    Of(String),
    /// P0 + Σₖ wₖ·(Pₖ − P0), the sum that the layers' weights have, with P0 the base's; without the base's part where
    /// the weights sum to 1. It is a value that is not trained.
    Sum,
}

/// A model with adapters that have names.
///
/// With several active, a layer gives y = x·W0ᵀ + b + Σₖ wₖ·uₖ(x), where uₖ is what the k-th adapter alone would add
/// to the frozen layer: x·ΔWₖᵀ, or for [`HydraLora`](crate::adapters::HydraLora) what its router makes of x. That holds
/// for every method, since all changes are of the base: for [`Dora`](crate::adapters::Dora), whose ΔW depends on W0, and
/// for [`Pissa`](crate::adapters::Pissa), which starts from a part of it. It is the exact sum of the ΔWₖ, which PEFT's
/// `add_weighted_adapter` calls `cat`; PEFT's `linear` sums A and B apart, whose product has mixed terms.
///
/// The model's own parameters stay frozen. Those of an adapter that is active are trained, those of others get no
/// gradient and keep their values. They have their usual names, `<layer>.<method>.<parameter>`, where one is
/// active; of several, `<layer>.<adapter>.<method>.<parameter>`. An optimiser remembers by name: each
/// adapter that is trained has one of its own.
///
/// ```
/// use randlora::adapters::{Adapted, Lora, RandLora, Targets, Whole, attach};
/// use randlora::nn::{Context, Init, Linear, Module};
/// use randlora::Device;
///
/// let init = Init::seeded(0, &Device::cpu());
/// let x = init.normal("x", [5, 20], 1.0)?;
/// let base = Linear::init(&init, 20, 30, true)?;
/// let plain = base.forward(&x, &Context::eval())?.to_vec::<f32>()?;
///
/// let mut model = Adapted::new(base)?;
/// model.add("news", |layer| attach(layer, &Lora::default(), &Targets::AllLinear, &[]))?;
/// model.add("mail", |layer| attach(layer, &RandLora::default(), &Targets::AllLinear, &[]))?;
/// assert_eq!(model.names().collect::<Vec<_>>(), ["mail", "news"]);
/// assert_eq!(model.model().forward(&x, &Context::eval())?.to_vec::<f32>()?, plain);   // none is active yet
///
/// model.activate("news")?;
/// let y = model.model().forward(&x, &Context::train(0, 0))?;      // trains `news` alone
/// model.combine(&[("news", 0.7), ("mail", 0.3)], Whole::Apart)?;
/// assert_eq!(model.parameters()[2].0, "news.lora.a");
///
/// let lost = model.merge(None)?[0].1.lost();                      // into the weights, and back
/// model.unmerge()?;
/// model.deactivate()?;
/// assert_eq!(model.model().forward(&x, &Context::eval())?.to_vec::<f32>()?, plain);
/// # assert_eq!(lost, 0.0);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Debug)]
pub struct Adapted<M> {
    model: M,
    adapters: BTreeMap<String, Kept>,
    active: Active,
    merged: Option<Vec<(String, Merged)>>,
}

/// An adapter, or the places of its parts that are on the model.
#[derive(Debug, Default)]
struct Kept {
    /// What it has on layers, by their names; None while it is there.
    layers: BTreeMap<String, Option<Box<dyn LinearAdapter>>>,
    /// The parameters that it holds whole; the base's while its own are in the model.
    whole: BTreeMap<String, Parameter>,
}

/// Which adapters are on the model.
#[derive(Debug, Default)]
struct Active {
    parts: Vec<(String, f64)>,
    whole: Whole,
    /// Whose parameters stand in place of the base's; None for the sums.
    owners: BTreeMap<String, Option<String>>,
    /// The base's parameters that sums stand in place of.
    sums: BTreeMap<String, Parameter>,
}

impl Active {
    /// Whether it is one adapter as it is.
    fn is_one(&self) -> bool {
        matches!(&self.parts[..], [(_, weight)] if *weight == 1.0)
    }
}

impl<M: Module> Adapted<M> {
    /// The model without an adapter.
    ///
    /// # Errors
    /// [`Error::Config`] for a model that has one attached.
    pub fn new(model: M) -> Result<Adapted<M>> {
        let adapted = Adapted { model, adapters: BTreeMap::new(), active: Active::default(), merged: None };
        adapted.check_layers()?;
        Ok(adapted)
    }

    /// Adds the adapter that `attach` puts on the base: [`attach`](crate::adapters::attach) with a new one, or
    /// [`Adapter::attach`](crate::io::Adapter::attach) with one from a folder. What else `attach` leaves to be trained,
    /// the adapter holds whole. Which adapters are active stays as it was.
    ///
    /// Changes nothing where it fails.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is taken or empty, or while adapters are merged; and what `attach` returns.
    pub fn add(&mut self, name: &str, attach: impl FnOnce(&mut M) -> Result<Attached>) -> Result<Attached> {
        self.check_not_merged()?;
        let wrong = |message: String| Err(Error::config("adapter", message));
        if name.is_empty() {
            return wrong("its name is empty: give it one".into());
        }
        if self.adapters.contains_key(name) {
            return wrong(format!("there is a `{name}`: remove it first, or choose another name"));
        }
        let Active { parts, whole, .. } = self.take_off()?;
        let before: BTreeMap<String, (Tensor, bool)> = self
            .model
            .parameters()
            .into_iter()
            .map(|(name, p)| (name, (p.value().clone(), p.is_trainable())))
            .collect();
        let attached = attach(&mut self.model);
        let mut kept = self.back_to(&before, attached.is_ok())?;
        let attached = attached.and_then(|attached| {
            let others = self.adapters.values().flat_map(|kept| kept.layers.values().flatten());
            let others: Vec<&dyn LinearAdapter> = others.map(|adapter| &**adapter).collect();
            share_bases(kept.layers.values_mut().flatten(), &others)?;
            self.adapters.insert(name.into(), kept);
            Ok(attached)
        });
        self.put_on(parts, whole)?;
        attached
    }

    /// Makes this adapter the active one, with all that it holds whole.
    ///
    /// # Errors
    /// [`Error::Config`] that lists the names there are, or while adapters are merged. Nothing is changed then.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        self.combine(&[(name, 1.0)], Whole::Apart)
    }

    /// Makes these adapters active together, each with a weight. One with the weight 1 is as if alone.
    ///
    /// # Errors
    /// [`Error::Config`], and nothing is changed: for a name that no adapter has, that comes twice, or no name at all;
    /// for a weight that is not finite; where several hold the same parameter whole and `whole` does not settle
    /// it; where one holds a weight whole that another one's change is of; and while adapters are merged.
    pub fn combine(&mut self, parts: &[(&str, f64)], whole: Whole) -> Result<()> {
        self.check_not_merged()?;
        let parts: Vec<(String, f64)> =
            parts.iter().map(|&(name, weight)| (name.to_string(), weight)).collect();
        self.check(&parts)?;
        self.owners(&parts, &whole)?;
        self.take_off()?;
        self.put_on(parts, whole)
    }

    /// Leaves the base alone.
    ///
    /// # Errors
    /// [`Error::Config`] while adapters are merged.
    pub fn deactivate(&mut self) -> Result<()> {
        self.check_not_merged()?;
        self.take_off().map(drop)
    }

    /// Drops an adapter. Where it was active none is active afterwards.
    ///
    /// # Errors
    /// [`Error::Config`] that lists the names there are, or while adapters are merged.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.check_not_merged()?;
        self.check(&[(name.to_string(), 1.0)])?;
        if self.active.parts.iter().any(|(active, _)| active == name) {
            self.take_off()?;
        }
        self.adapters.remove(name);
        Ok(())
    }

    /// Trains only these of the active adapters, until others are made active.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is not active, or while adapters are merged.
    pub fn train_only(&mut self, names: &[&str]) -> Result<()> {
        self.check_not_merged()?;
        let active: Vec<&str> = self.active.parts.iter().map(|(name, _)| name.as_str()).collect();
        if let Some(name) = names.iter().find(|name| !active.contains(name)) {
            return Err(unknown(name, "active ", active));
        }
        let Active { parts, owners, .. } = &self.active;
        self.model.visit_mut("", &mut |name, item| match item {
            ItemMut::Linear(layer) => {
                let Some(adapter) = layer.adapter_mut() else { return };
                let any: &mut dyn Any = &mut *adapter;
                match any.downcast_mut::<Weighted>() {
                    Some(weighted) => weighted.parts.iter_mut().for_each(|Part { name, adapter, .. }| {
                        train(&mut **adapter, names.contains(&name.as_str()));
                    }),
                    None => train(adapter, parts.iter().all(|(only, _)| names.contains(&only.as_str()))),
                }
            }
            ItemMut::Parameter(parameter) => {
                if let Some(Some(owner)) = owners.get(name) {
                    parameter.set_trainable(names.contains(&owner.as_str()));
                }
            }
        });
        Ok(())
    }

    /// Merges the active adapters into the weights, which keep their types or take this one; see
    /// [`merge`](crate::adapters::merge). Returns what each layer's change was and what rounding lost of it.
    ///
    /// # Errors
    /// [`Error::Config`] where none is active or they are merged; [`Error::Data`] that names the layer whose
    /// change is not finite or, with [`HydraLora`](crate::adapters::HydraLora), depends on the input. Nothing is
    /// changed then.
    pub fn merge(&mut self, dtype: Option<DType>) -> Result<&[(String, Merged)]> {
        self.check_not_merged()?;
        self.check_layers()?;
        if self.active.parts.is_empty() {
            return Err(Error::config("adapter", "none is active: activate what is to be merged"));
        }
        let merged = merge(&mut self.model, dtype)?;
        Ok(self.merged.insert(merged))
    }

    /// Undoes [`merge`](Adapted::merge): the weights are what they were, bit for bit, and the adapters active.
    ///
    /// # Errors
    /// [`Error::Config`] where nothing is merged.
    pub fn unmerge(&mut self) -> Result<()> {
        if let Some((name, _)) = self.model.linears().iter().find(|(_, layer)| layer.adapter().is_some()) {
            return Err(Error::config(
                "adapter",
                format!("`{name}` has one, so that none is merged: detach it"),
            ));
        }
        let Some(merged) = self.merged.take() else {
            return Err(Error::config("adapter", "none is merged: there is nothing to undo"));
        };
        unmerge(&mut self.model, merged)
    }

    /// The names of all adapters, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// The active adapters with their weights, in the order in which they were given.
    pub fn active(&self) -> &[(String, f64)] {
        &self.active.parts
    }

    /// The model's own parameters in whose place stand those that the active adapters hold whole.
    pub fn whole(&self) -> impl Iterator<Item = &str> {
        self.active.owners.keys().map(String::as_str)
    }

    /// Whether the active adapters are merged into the weights.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The model with the active adapters: to run it, or to save them with
    /// [`save_adapter`](crate::io::save_adapter) where it is one.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, to be trained. Adapters are attached and detached here, not there.
    pub fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    /// The model alone with the active adapters on it, or merged.
    pub fn into_model(self) -> M {
        self.model
    }

    fn check_not_merged(&self) -> Result<()> {
        match self.is_merged() {
            true => {
                Err(Error::config("adapter", "the active ones are merged into the weights: `unmerge` first"))
            }
            false => Ok(()),
        }
    }

    /// An error where the model's layers have other adapters than the active ones.
    fn check_layers(&self) -> Result<()> {
        let active = |layer: &str| {
            self.active.parts.iter().any(|(name, _)| self.adapters[name].layers.contains_key(layer))
        };
        let wrong =
            self.model.linears().into_iter().find(|(name, layer)| layer.adapter().is_some() != active(name));
        match wrong {
            Some((name, layer)) => {
                let (what, instead) = match layer.adapter() {
                    Some(_) => ("has one that was not added", "detach it, and `add` it"),
                    None => ("has lost its own", "leave attaching, detaching and merging to `Adapted`"),
                };
                Err(Error::config("adapter", format!("`{name}` {what}: {instead}")))
            }
            None => Ok(()),
        }
    }

    /// An error unless these can be active.
    fn check(&self, parts: &[(String, f64)]) -> Result<()> {
        let mut seen = BTreeSet::new();
        for (name, weight) in parts {
            if !self.adapters.contains_key(name) {
                return Err(unknown(name, "", self.names().collect()));
            }
            if !seen.insert(name) {
                return Err(Error::config("adapter", format!("`{name}` comes twice: give it one weight")));
            }
            if !weight.is_finite() {
                return Err(Error::config("weight", format!("`{name}` has {weight}: it is a finite number")));
            }
        }
        match parts.is_empty() {
            true => {
                Err(Error::config("adapter", "name at least one, or leave the base alone with `deactivate`"))
            }
            false => Ok(()),
        }
    }

    /// Whose parameters stand in place of the base's while these are active; None for a sum.
    fn owners(&self, parts: &[(String, f64)], whole: &Whole) -> Result<BTreeMap<String, Option<String>>> {
        if let Whole::Of(name) = whole
            && !parts.iter().any(|(part, _)| part == name)
        {
            return Err(unknown(name, "active ", parts.iter().map(|(name, _)| name.as_str()).collect()));
        }
        let mut holders: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, _) in parts {
            self.adapters[name].whole.keys().for_each(|p| holders.entry(p).or_default().push(name));
        }
        let owner = |(parameter, holders): (&str, Vec<&str>)| {
            let owner = match (&holders[..], whole) {
                (&[one], _) => Some(one),
                (_, Whole::Sum) => None,
                (_, Whole::Of(name)) if holders.contains(&name.as_str()) => Some(name.as_str()),
                _ => return Err(held_by_several(parameter, &holders)),
            };
            let (layer, last) = parameter.rsplit_once('.').unwrap_or(("", parameter));
            let changes = |name: &String| last == "weight" && self.adapters[name].layers.contains_key(layer);
            match parts.iter().find(|(name, _)| changes(name)) {
                Some((other, _)) => {
                    let message = format!(
                        "`{}` holds `{parameter}` whole, and `{other}` changes the base's: make one of them active \
                         at a time",
                        holders[0]
                    );
                    Err(Error::config("adapter", message))
                }
                None => Ok((parameter.to_string(), owner.map(String::from))),
            }
        };
        holders.into_iter().map(owner).collect()
    }
}

/// Trains all of an adapter's parameters, or none.
fn train(adapter: &mut dyn LinearAdapter, trained: bool) {
    adapter.parameters_mut().into_iter().for_each(|(_, parameter)| parameter.set_trainable(trained));
}

fn unknown(name: &str, kind: &str, there: Vec<&str>) -> Error {
    let there = if there.is_empty() { "none".into() } else { there.join(", ") };
    Error::config("adapter", format!("there is no {kind}`{name}`; there are: {there}"))
}

fn held_by_several(parameter: &str, holders: &[&str]) -> Error {
    let message = format!(
        "`{parameter}` is held whole by `{}`: say whose is used with `Whole::Of`, or sum them with `Whole::Sum`",
        holders.join("` and `")
    );
    Error::config("adapter", message)
}

impl<M: Module> Module for Adapted<M> {
    fn visit<'a>(&'a self, path: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        self.model.visit(path, f);
    }

    fn visit_mut(&mut self, path: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        self.model.visit_mut(path, f);
    }
}
