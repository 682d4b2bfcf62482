//! Planted mistakes: gradients that are wrong in the ways in which gradients go wrong, each beside
//! the right one. The check is only worth something if it catches every one of them.
//!
//! ```
//! for mistake in randlora::gradcheck::mistakes::all() {
//!     let x = mistake.inputs()?;
//!     assert!(mistake.wrong().check(&x).is_err(), "not caught: {}", mistake.name);
//!     mistake.right().check(&x)?;
//! }
//! # Ok::<(), randlora::Error>(())
//! ```

mod planted;

use std::fmt;

use crate::device::Device;
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::gradcheck::{Check, function};
use crate::random;
use crate::tensor::Tensor;

/// A function with a wrong gradient, the same function with the right one, and inputs for both.
pub struct Mistake {
    /// What the mistake is called.
    pub name: &'static str,
    /// What was done wrong, and in what.
    pub description: &'static str,
    inputs: &'static [&'static [usize]],
    frozen: &'static [bool],
    right: Function,
    wrong: Function,
}

type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

impl Mistake {
    /// Inputs in f64 around which to check.
    pub fn inputs(&self) -> Result<Vec<Tensor>> {
        let input = |(i, dims): (usize, &&'static [usize])| {
            let mut words = vec![0; dims.iter().product()];
            random::words(i as u64, 0, 0, &mut words);
            // Positive, for the roots among the functions.
            let values = words.into_iter().map(|w| 1.5 + random::symmetric(w)).collect();
            Tensor::from_vec::<f64>(values, *dims, &Device::cpu())
        };
        self.inputs.iter().enumerate().map(input).collect()
    }

    /// Which inputs need no gradient.
    pub fn frozen(&self) -> &[bool] {
        self.frozen
    }

    /// The function with the wrong gradient or the right one, to be planted into something larger.
    ///
    /// # Errors
    /// Those of the function.
    pub fn plant(&self, x: &[Tensor], wrong: bool) -> Result<Tensor> {
        if wrong { (self.wrong)(x) } else { (self.right)(x) }
    }

    /// The function with the wrong gradient, to be checked.
    pub fn wrong(&self) -> Check<impl Fn(&[Tensor]) -> Result<Tensor> + '_> {
        function(self.name, &self.wrong).frozen(self.frozen)
    }

    /// The function with the right gradient, to be checked.
    pub fn right(&self) -> Check<impl Fn(&[Tensor]) -> Result<Tensor> + '_> {
        function(self.name, &self.right).frozen(self.frozen)
    }
}

impl fmt::Debug for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mistake({}: {})", self.name, self.description)
    }
}

/// What a vjp is given.
struct Given<'a> {
    x: &'a [&'a Tensor],
    y: &'a Tensor,
    aux: &'a [Tensor],
    dy: &'a Tensor,
    need: &'a [bool],
}

type Forward = fn(&[&Tensor]) -> Result<(Tensor, Vec<Tensor>)>;
type Vjp = fn(&Given<'_>) -> Result<Vec<Option<Tensor>>>;

/// An operation put together from a forward and a vjp.
#[derive(Clone, Copy, Debug)]
struct Planted {
    name: &'static str,
    forward: Forward,
    vjp: Vjp,
}

impl Op for Planted {
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        (self.forward)(x)
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        y: &Tensor,
        aux: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        (self.vjp)(&Given { x, y, aux, dy, need })
    }

    fn saves(&self, need: &[bool]) -> Saves {
        let inputs: Vec<usize> = (0..need.len()).collect();
        Saves::inputs(&inputs).and(Saves::OUTPUT).and(Saves::AUX)
    }
}

/// A mistake in the vjp of an operation.
fn in_op(
    [name, description]: [&'static str; 2],
    inputs: &'static [&'static [usize]],
    forward: Forward,
    right: Vjp,
    wrong: Vjp,
) -> Mistake {
    let with = |vjp| -> Function {
        Box::new(move |x| apply(Planted { name, forward, vjp }, &x.iter().collect::<Vec<_>>()))
    };
    Mistake { name, description, inputs, frozen: &[], right: with(right), wrong: with(wrong) }
}

/// A mistake in how a function is put together.
fn in_function(
    [name, description]: [&'static str; 2],
    inputs: &'static [&'static [usize]],
    right: fn(&[Tensor]) -> Result<Tensor>,
    wrong: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) -> Mistake {
    Mistake { name, description, inputs, frozen: &[], right: Box::new(right), wrong: Box::new(wrong) }
}

/// All planted mistakes.
pub fn all() -> Vec<Mistake> {
    [
        planted::arithmetic(),
        planted::matrices(),
        planted::shapes(),
        planted::reductions(),
        planted::bookkeeping(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn every_mistake_is_caught_and_the_right_gradient_accepted() -> Result<()> {
        for mistake in all() {
            let x = mistake.inputs()?;
            mistake.right().check(&x)?;
            match mistake.wrong().check(&x) {
                Err(Error::Gradcheck { .. } | Error::Vjp { .. }) => {}
                other => panic!("{mistake:?}: {other:?}"),
            }
        }
        Ok(())
    }

    /// Caught in any single direction, not only by one of several.
    #[test]
    fn one_direction_is_enough() -> Result<()> {
        for mistake in all() {
            let x = mistake.inputs()?;
            for seed in 10..30 {
                assert!(mistake.wrong().seeds(seed..seed + 1).check(&x).is_err(), "{mistake:?}, seed {seed}");
                mistake.right().seeds(seed..seed + 1).check(&x)?;
            }
        }
        Ok(())
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = all().iter().map(|m| m.name).collect();
        let n = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), n);
    }
}
