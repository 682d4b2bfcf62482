//! How a forward pass runs.

use crate::error::Result;
use crate::ops::dropout::DropoutKey;
use crate::random;
use crate::tensor::Tensor;

/// How a forward pass runs: for training or for evaluation, with or without a graph, and where in
/// the model it is. There is no hidden switch beside it: what a module does depends on its
/// parameters, its input and its context alone.
///
/// ```
/// use randlora::nn::Context;
///
/// let training = Context::train(42, 0);
/// assert!(training.is_training() && training.tracks());
/// let evaluation = Context::eval();
/// assert!(!evaluation.is_training() && !evaluation.tracks());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    mode: Mode,
    tracks: bool,
    checkpoints: bool,
    site: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Train { seed: u64, step: u64 },
    Eval,
}

impl Context {
    /// For training: a graph, and dropout whose masks are a function of the seed, the step and the
    /// place in the model.
    pub fn train(seed: u64, step: u64) -> Context {
        Context { mode: Mode::Train { seed, step }, tracks: true, checkpoints: false, site: 0 }
    }

    /// For evaluation: no graph, no dropout.
    pub fn eval() -> Context {
        Context { mode: Mode::Eval, tracks: false, checkpoints: false, site: 0 }
    }

    /// The same with a graph: gradients without dropout.
    pub fn tracked(self) -> Context {
        Context { tracks: true, ..self }
    }

    /// The same with each block of a transformer under a [`checkpoint`](crate::nn::checkpoint): less
    /// memory, one more forward of each block, the same bits.
    pub fn checkpointed(self) -> Context {
        Context { checkpoints: true, ..self }
    }

    /// The context for part `index` of a module. A module that hands its context on to several
    /// parts enters each under a number of its own, so that no two dropouts share a mask.
    pub fn enter(self, index: u64) -> Context {
        Context { site: random::mix(self.site, index), ..self }
    }

    /// What the mask of a dropout at this place is made from; None where nothing is dropped.
    pub fn dropout_key(&self) -> Option<DropoutKey> {
        match self.mode {
            Mode::Train { seed, step } => Some(DropoutKey { seed, step, site: self.site }),
            Mode::Eval => None,
        }
    }

    /// x with elements dropped at rate `p` in training, and as it is otherwise.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) unless 0 ≤ p < 1.
    pub fn dropout(&self, x: &Tensor, p: f64) -> Result<Tensor> {
        match self.dropout_key() {
            Some(key) if p != 0.0 => x.dropout(p, key),
            _ => Ok(x.clone()),
        }
    }

    /// Whether trained parameters are leaves of the graph.
    pub fn tracks(&self) -> bool {
        self.tracks
    }

    /// Whether blocks forget what they have computed, to compute it again in backward.
    pub fn checkpoints(&self) -> bool {
        self.checkpoints
    }

    /// Whether this is for training.
    pub fn is_training(&self) -> bool {
        matches!(self.mode, Mode::Train { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_and_step_has_its_own_key() {
        let ctx = Context::train(1, 2);
        assert_eq!(ctx.enter(3).enter(4), Context::train(1, 2).enter(3).enter(4));
        let places = [
            ctx,
            ctx.enter(0),
            ctx.enter(1),
            ctx.enter(0).enter(1),
            ctx.enter(1).enter(0),
            Context::train(1, 3),
        ];
        for (i, a) in places.iter().enumerate() {
            assert!(places[..i].iter().all(|b| a.dropout_key() != b.dropout_key()));
        }
        assert_eq!(Context::eval().enter(1).dropout_key(), None);
        assert_eq!(Context::eval().tracked().dropout_key(), None);
    }
}
