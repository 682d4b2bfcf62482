//! Attaching a method to a model: what is frozen, what is trained, which layers get an adapter.

use std::fmt;

use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Init, ItemMut, Linear, LinearAdapter, Module};
use crate::tensor::Tensor;

/// A fine-tuning method.
pub trait Method: fmt::Debug {
    /// The name that it goes by, as in `randlora`.
    fn name(&self) -> &'static str;

    /// The adapters for these layers, one each in the same order; they may share what they are
    /// made of. None where the method trains parameters of the model itself.
    fn adapters(&self, layers: &[LayerInfo]) -> Result<Option<Vec<Box<dyn LinearAdapter>>>>;

    /// Whether the model's own parameter of this name is trained.
    fn trains(&self, _parameter: &str) -> bool {
        false
    }
}

/// A linear layer as a method sees it.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// Its name in the model.
    pub name: String,
    /// The size of an input row.
    pub inputs: usize,
    /// The size of an output row.
    pub outputs: usize,
    /// What the adapter computes in: f64 for an f64 layer, else f32 (also for a stored bf16 or f16).
    pub dtype: DType,
    /// Where the layer lives.
    pub device: Device,
    /// Its weight (out, in) as it is stored, for methods that start from it.
    pub weight: Tensor,
}

impl LayerInfo {
    fn of(name: String, layer: &Linear) -> LayerInfo {
        let weight = layer.weight().value();
        let dtype = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        LayerInfo {
            name,
            inputs: layer.inputs(),
            outputs: layer.outputs(),
            dtype,
            device: weight.device().clone(),
            weight: weight.detach(),
        }
    }

    /// The first values of the layer's adapter.
    pub(super) fn init(&self, seed: u64) -> Init {
        Init::seeded(seed, &self.device).at(&self.name)
    }

    /// An error unless a matrix of this rank has a singular value of the weight for each direction.
    pub(super) fn check_rank(&self, rank: usize) -> Result<()> {
        if rank <= self.small() {
            return Ok(());
        }
        let message = format!(
            "{rank} is more than the {} singular values of `{}`: ask for fewer",
            self.small(),
            self.name
        );
        Err(Error::config("rank", message))
    }

    /// The smaller side.
    pub fn small(&self) -> usize {
        self.inputs.min(self.outputs)
    }

    /// The larger side.
    pub fn large(&self) -> usize {
        self.inputs.max(self.outputs)
    }
}

/// Which linear layers get an adapter.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// All of them, but those that are trained whole.
    AllLinear,
    /// Those whose name is one of these or ends in one of them after a dot: `query`,
    /// `attention.query`, `encoder.layer.0.attention.query`.
    Names(Vec<String>),
}

impl Targets {
    /// The layers with these names or last parts of names.
    pub fn names(names: &[&str]) -> Targets {
        Targets::Names(names.iter().map(|name| name.to_string()).collect())
    }

    /// Whether a layer of this name is meant.
    pub fn matches(&self, layer: &str) -> bool {
        match self {
            Targets::AllLinear => true,
            Targets::Names(names) => names.iter().any(|name| is_or_ends_in(layer, name)),
        }
    }
}

/// Whether `name` is `part` or ends in it after a dot.
fn is_or_ends_in(name: &str, part: &str) -> bool {
    name.strip_suffix(part).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')) && !part.is_empty()
}

/// What [`attach`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The layers that got an adapter.
    pub layers: Vec<String>,
    /// How many numbers are trained.
    pub trained: usize,
    /// How many numbers the model has, its adapters' included.
    pub total: usize,
}

impl Attached {
    /// What there is in a model.
    pub fn of<M: Module + ?Sized>(model: &M) -> Attached {
        let layers = model.linears().into_iter().filter(|(_, layer)| layer.adapter().is_some());
        Attached {
            layers: layers.map(|(name, _)| name).collect(),
            trained: model.trainable_count(),
            total: model.parameter_count(),
        }
    }
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = 100.0 * self.trained as f64 / self.total.max(1) as f64;
        write!(
            f,
            "{} adapted layers, {} of {} numbers trained ({percent:.2} %)",
            self.layers.len(),
            self.trained,
            self.total
        )
    }
}

/// Freezes the model and attaches a method to the layers that `targets` names; a method without
/// adapters ([`Full`](crate::adapters::Full), [`BitFit`](crate::adapters::BitFit)) trains parameters of
/// the model wherever they are instead. Parts of the model in `also_train` (a new
/// classifier, say; names as in [`Targets::Names`], of modules or parameters) stay trained whole and
/// get no adapter.
///
/// Changes nothing where it fails.
///
/// # Errors
/// [`Error::NoMatch`] where a name matches nothing (and lists what is there), [`Error::Config`]
/// where a layer has an adapter already or the method's settings are out of range.
pub fn attach<M: Module + ?Sized>(
    model: &mut M,
    method: &dyn Method,
    targets: &Targets,
    also_train: &[&str],
) -> Result<Attached> {
    check_parts(model, also_train)?;
    let whole = |name: &str| also_train.iter().any(|part| belongs_to(name, part));
    let layers: Vec<LayerInfo> = model
        .linears()
        .into_iter()
        .filter(|(name, _)| targets.matches(name) && !whole(name))
        .map(|(name, layer)| LayerInfo::of(name, layer))
        .collect();
    if let Some((name, _)) = model.linears().iter().find(|(_, layer)| layer.adapter().is_some()) {
        return Err(Error::config("adapter", format!("`{name}` has one: merge or detach it first")));
    }
    check_targets(model, targets, &layers)?;
    let trained = |name: &str| whole(name) || method.trains(name);
    let Some(adapters) = method.adapters(&layers)? else {
        train(model, trained)?;
        return Ok(Attached::of(model));
    };
    if adapters.len() != layers.len() {
        let message =
            format!("{} made {} adapters for {} layers", method.name(), adapters.len(), layers.len());
        return Err(Error::config("adapters", message));
    }
    train(model, trained)?;
    let mut adapters = layers.iter().zip(adapters).peekable();
    model.try_visit_mut(&mut |name, item| match item {
        ItemMut::Linear(layer) => match adapters.next_if(|(info, _)| info.name == name) {
            Some((_, adapter)) => layer.attach(adapter),
            None => Ok(()),
        },
        ItemMut::Parameter(_) => Ok(()),
    })?;
    Ok(Attached::of(model))
}

/// Trains these parts of the model and nothing else of it: a classifier on a frozen model, say. Names are
/// of modules or parameters, as in [`Targets::Names`].
///
/// # Errors
/// [`Error::NoMatch`] where a name matches nothing.
pub fn train_only<M: Module + ?Sized>(model: &mut M, parts: &[&str]) -> Result<Attached> {
    check_parts(model, parts)?;
    train(model, |name| parts.iter().any(|part| belongs_to(name, part)))?;
    Ok(Attached::of(model))
}

fn check_parts<M: Module + ?Sized>(model: &M, parts: &[&str]) -> Result<()> {
    let parameters: Vec<String> = model.parameters().into_iter().map(|(name, _)| name).collect();
    match parts.iter().find(|part| !parameters.iter().any(|name| belongs_to(name, part))) {
        Some(part) => Err(Error::NoMatch { wanted: format!("`{part}`"), available: parameters }),
        None => Ok(()),
    }
}

/// Trains these parameters and no others. Those that are stored in a narrow type are widened to f32,
/// which they can be trained in.
fn train<M: Module + ?Sized>(model: &mut M, trained: impl Fn(&str) -> bool) -> Result<()> {
    model.try_visit_mut(&mut |name, item| match item {
        ItemMut::Parameter(parameter) => {
            parameter.set_trainable(trained(name));
            match parameter.is_trainable() && !parameter.value().dtype().is_compute() {
                true => parameter.cast(DType::F32),
                false => Ok(()),
            }
        }
        ItemMut::Linear(_) => Ok(()),
    })
}

/// Whether a parameter or layer is `part` or lies within a module of that name.
fn belongs_to(name: &str, part: &str) -> bool {
    let mut ends = name.match_indices('.').map(|(i, _)| i).chain([name.len()]);
    ends.any(|end| is_or_ends_in(&name[..end], part))
}

/// Every name must match something: a typing error must not leave a layer out silently.
fn check_targets<M: Module + ?Sized>(model: &M, targets: &Targets, layers: &[LayerInfo]) -> Result<()> {
    let available = || model.linears().into_iter().map(|(name, _)| name).collect();
    match targets {
        Targets::AllLinear if layers.is_empty() => {
            Err(Error::NoMatch { wanted: "`all-linear`".into(), available: available() })
        }
        Targets::Names(names) => {
            let unmatched = |name: &&String| !layers.iter().any(|layer| is_or_ends_in(&layer.name, name));
            match names.iter().find(unmatched) {
                Some(name) => Err(Error::NoMatch { wanted: format!("`{name}`"), available: available() }),
                None if names.is_empty() => {
                    Err(Error::NoMatch { wanted: "an empty list of targets".into(), available: available() })
                }
                None => Ok(()),
            }
        }
        Targets::AllLinear => Ok(()),
    }
}

/// One adapter for each layer.
pub(super) fn each<A: LinearAdapter>(
    layers: &[LayerInfo],
    adapter: impl Fn(&LayerInfo) -> Result<A>,
) -> Result<Option<Vec<Box<dyn LinearAdapter>>>> {
    let boxed = |layer| Ok(Box::new(adapter(layer)?) as Box<dyn LinearAdapter>);
    layers.iter().map(boxed).collect::<Result<_>>().map(Some)
}

/// An error for a rank of 0.
pub(super) fn at_least_rank_1(rank: usize) -> Result<()> {
    match rank {
        0 => Err(Error::config("rank", "0 leaves nothing to train: it is at least 1")),
        _ => Ok(()),
    }
}

/// An error for a scale that is NaN or infinite.
pub(super) fn finite_scale(scale: f64) -> Result<()> {
    match scale.is_finite() {
        true => Ok(()),
        false => Err(Error::config("scale", format!("{scale} is not finite"))),
    }
}

/// A tensor that layers share, in f64 for those that compute in it and in f32 for all others.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    narrow: Tensor,
    wide: Option<Tensor>,
}

impl Shared {
    /// In the types that these layers need.
    pub(super) fn new(narrow: Tensor, layers: &[LayerInfo]) -> Result<Shared> {
        let wide = layers.iter().any(|layer| layer.dtype == DType::F64);
        let wide = wide.then(|| narrow.to_dtype(DType::F64)).transpose()?;
        Ok(Shared { narrow, wide })
    }

    /// In this type.
    pub(super) fn of(&self, dtype: DType) -> &Tensor {
        self.wide.as_ref().filter(|_| dtype == DType::F64).unwrap_or(&self.narrow)
    }
}
