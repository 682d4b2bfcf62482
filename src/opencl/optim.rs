//! Optimiser steps in place, and the size of gradients.

use super::runtime::{Arg, ClBuffer, Grid, Source};
use super::{View, floats};
use crate::error::Result;

static SOURCE: Source = Source { name: "optim.cl", text: include_str!("../../kernels/optim.cl") };

/// What is the same for all elements of a step of AdamW; see `optim::adamw`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamW {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) keep: f64,
    pub(crate) rate: f64,
    pub(crate) root: f64,
    pub(crate) eps: f64,
}

/// A step of AdamW on parameters `p` with the moments `m` and `v` and the gradient `g`. The elements of each
/// lie one after another.
pub(crate) fn adamw([p, m, v, g]: [View<'_>; 4], c: AdamW) -> Result<()> {
    let numbers = [c.beta1, 1.0 - c.beta1, c.beta2, 1.0 - c.beta2, c.keep, c.rate, c.root, c.eps];
    let numbers = numbers.map(|x| Arg::F32(x as f32));
    let n = [Arg::Size(p.numel())];
    let args = [&p.in_order()[..], &m.in_order(), &v.in_order(), &g.in_order(), &numbers, &n];
    p.runtime().launch(&SOURCE, "adamw", &args.concat(), Grid::items(p.numel()))
}

/// A step of SGD on parameters `p` with the velocity `v` and the gradient `g`.
pub(crate) fn sgd([p, v, g]: [View<'_>; 3], momentum: f64, decay: f64, rate: f64) -> Result<()> {
    let numbers = [momentum, decay, rate].map(|x| Arg::F32(x as f32));
    let args = [&p.in_order()[..], &v.in_order(), &g.in_order(), &numbers, &[Arg::Size(p.numel())]];
    p.runtime().launch(&SOURCE, "sgd", &args.concat(), Grid::items(p.numel()))
}

/// For each of these tensors, one at least, whose elements lie one after another, the largest magnitude and the sum of
/// the squares of all elements over it.
pub(crate) fn squares(tensors: &[View<'_>]) -> Result<ClBuffer> {
    let out = floats(tensors[0].runtime(), 2 * tensors.len())?;
    for (slot, x) in tensors.iter().enumerate() {
        let args = [&x.in_order()[..], &[Arg::Buffer(&out), Arg::Size(slot), Arg::Size(x.numel())]];
        x.runtime().launch(&SOURCE, "squares", &args.concat(), Grid::groups(1))?;
    }
    Ok(out)
}
