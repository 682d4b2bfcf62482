//! Several adapters on one layer at once: y = x·W0ᵀ + b + Σₖ wₖ·uₖ(x), with uₖ the update of the k-th and wₖ its
//! weight.
//!
//! Each update is of the frozen layer, whatever the others do. Where all are changes of the weight, the sum is
//! one too, ΔW = Σₖ wₖ·ΔWₖ: that is what is merged.

use crate::error::{Error, Result};
use crate::grad::Gradients;
use crate::nn::{Context, Item, ItemMut, LinearAdapter, Parameter, join};
use crate::tensor::Tensor;

/// One of the adapters.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// What it is called in the model.
    pub(super) name: String,
    /// wₖ.
    pub(super) weight: f64,
    pub(super) adapter: Box<dyn LinearAdapter>,
}

impl Part {
    fn scaled(&self, x: Tensor) -> Result<Tensor> {
        if self.weight == 1.0 { Ok(x) } else { x.scale(self.weight) }
    }

    /// Whether anything of it is trained now.
    fn is_trained(&self) -> bool {
        self.adapter.parameters().iter().any(|(_, parameter)| parameter.is_trainable())
    }
}

/// The sum of adapters' updates, at least one's.
#[derive(Clone, Debug)]
pub(super) struct Weighted {
    pub(super) parts: Vec<Part>,
}

impl Weighted {
    fn trained_mut(&mut self) -> impl Iterator<Item = &mut Part> {
        self.parts.iter_mut().filter(|part| part.is_trained())
    }

    /// Σₖ wₖ·xₖ.
    fn sum(&self, of: impl Fn(&Part, u64) -> Result<Tensor>) -> Result<Tensor> {
        let terms = self.parts.iter().zip(0..).map(|(part, place)| part.scaled(of(part, place)?));
        let none = || Err(Error::config("adapter", "a sum of none: detach it"));
        terms.reduce(|a, b| a?.add(&b?)).unwrap_or_else(none)
    }
}

impl LinearAdapter for Weighted {
    fn method(&self) -> &'static str {
        "weighted"
    }

    fn update(&self, x: &Tensor, weight: &Tensor, ctx: &Context) -> Result<Tensor> {
        // Each under a number of its own, so that no two drop the same inputs.
        self.sum(|part, place| part.adapter.update(x, weight, &ctx.enter(place)))
    }

    fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        self.parts.iter().flat_map(|part| part.adapter.parameters()).collect()
    }

    fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Parameter)> {
        self.parts.iter_mut().flat_map(|part| part.adapter.parameters_mut()).collect()
    }

    /// Two may be of one method: the adapters' names tell their parameters apart.
    fn visit<'a>(&'a self, layer: &str, f: &mut dyn FnMut(&str, Item<'a>)) {
        self.parts.iter().for_each(|part| part.adapter.visit(&join(layer, &part.name), f));
    }

    fn visit_mut(&mut self, layer: &str, f: &mut dyn FnMut(&str, ItemMut<'_>)) {
        self.parts.iter_mut().for_each(|part| part.adapter.visit_mut(&join(layer, &part.name), f));
    }

    fn delta(&self, weight: &Tensor) -> Result<Tensor> {
        self.sum(|part, _| part.adapter.delta(weight))
    }

    /// A training's own affair, of those that are trained: it is not weighted.
    fn regulariser(&self, ctx: &Context) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for part in self.parts.iter().filter(|part| part.is_trained()) {
            let Some(term) = part.adapter.regulariser(ctx)? else { continue };
            sum = Some(match sum {
                Some(sum) => sum.add(&term)?,
                None => term,
            });
        }
        Ok(sum)
    }

    fn after_step(&mut self, step: usize, gradients: &Gradients) -> Result<()> {
        self.trained_mut().try_for_each(|part| part.adapter.after_step(step, gradients))
    }

    fn settle(&mut self, step: usize) -> Result<()> {
        self.trained_mut().try_for_each(|part| part.adapter.settle(step))
    }
}
