//! Checks of gradients against numbers, for the operations here and for your own.
//!
//! A function y = f(x₁, x₂, …) has the Jacobians Jᵢ; its vjp claims to compute Jᵢᵀ·w for a given w.
//! Take random w and vᵢ. Then Σ⟨vᵢ, Jᵢᵀw⟩ from the vjp must equal ⟨w, Σ Jᵢvᵢ⟩, which the central
//! difference ⟨w, f(x + hv) − f(x − hv)⟩/2h approximates to O(h²): two evaluations whatever the
//! size, and a wrong element anywhere shows in almost every direction. All in f64, where rounding
//! leaves nine digits.
//!
//! ```
//! use randlora::{Device, Tensor, gradcheck};
//!
//! let x = Tensor::from_vec(vec![0.3, -1.2, 2.5], [3], &Device::cpu())?;
//! gradcheck::function("x·eˣ", |x| x[0].mul(&x[0].exp()?)).check(&[x])?;
//! # Ok::<(), randlora::Error>(())
//! ```
//!
//! What a check is worth shows on gradients that are known to be wrong: see [`mistakes`].

pub mod mistakes;

mod model;

use std::ops::Range;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::{Op, apply};
use crate::random;
use crate::tensor::Tensor;

pub use model::model;

/// A function to be checked, and how. See [`function`].
#[derive(Clone, Debug)]
pub struct Check<F> {
    name: String,
    f: F,
    frozen: Vec<bool>,
    seeds: Range<u64>,
    step: f64,
    tolerance: f64,
}

/// Checks a function of tensors.
pub fn function<F: Fn(&[Tensor]) -> Result<Tensor>>(name: &str, f: F) -> Check<F> {
    Check::new(name, f)
}

/// Checks an operation, given anew for each application.
///
/// ```
/// # use randlora::{Device, Op, Result, Saves, Tensor, gradcheck};
/// # #[derive(Debug)]
/// # struct Double;
/// # impl Op for Double {
/// #     fn name(&self) -> &'static str { "double" }
/// #     fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> { Ok((x[0].scale(2.0)?, vec![])) }
/// #     fn vjp(&self, _: &[&Tensor], _: &Tensor, _: &[Tensor], dy: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
/// #         Ok(vec![Some(dy.scale(2.0)?)])
/// #     }
/// #     fn saves(&self, _: &[bool]) -> Saves { Saves::NOTHING }
/// # }
/// let x = Tensor::from_vec(vec![0.3, -1.2, 2.5], [3], &Device::cpu())?;
/// gradcheck::op(|| Double).check(&[x])?;
/// # Ok::<(), randlora::Error>(())
/// ```
pub fn op<O: Op>(op: impl Fn() -> O) -> Check<impl Fn(&[Tensor]) -> Result<Tensor>> {
    let name = op().name();
    function(name, move |x| apply(op(), &x.iter().collect::<Vec<_>>()))
}

/// How one direction came out.
enum Outcome {
    Agrees,
    /// The function has a kink here: its one-sided differences disagree.
    Kink,
}

impl<F: Fn(&[Tensor]) -> Result<Tensor>> Check<F> {
    /// Which inputs need no gradient; none by default.
    pub fn frozen(self, frozen: &[bool]) -> Self {
        Check { frozen: frozen.to_vec(), ..self }
    }

    /// The random directions to try: 0..4 by default.
    pub fn seeds(self, seeds: Range<u64>) -> Self {
        Check { seeds, ..self }
    }

    /// The distance h of the central difference: 1e-5 by default.
    pub fn step(self, step: f64) -> Self {
        Check { step, ..self }
    }

    /// How far the two sides may differ, relative to the size of the terms: 1e-6 by default.
    pub fn tolerance(self, tolerance: f64) -> Self {
        Check { tolerance, ..self }
    }

    /// Checks the function around these inputs, which must be f64.
    ///
    /// # Errors
    /// [`Error::Gradcheck`] where the vjp disagrees with the difference, or where the function has
    /// a kink in every direction tried; and whatever the function itself returns.
    pub fn check(&self, x: &[Tensor]) -> Result<()> {
        if let Some(x) = x.iter().find(|x| x.dtype() != DType::F64) {
            return Err(Error::dtype(
                "gradcheck",
                format!("an input is {}: a check in it proves little, use f64", x.dtype()),
            ));
        }
        if self.seeds.is_empty() {
            return Err(Error::config("seeds", "no direction to try: give at least one seed"));
        }
        self.all_directions(|seed| self.direction(x, seed))
    }

    fn direction(&self, x: &[Tensor], seed: u64) -> Result<Outcome> {
        let is_frozen = |i: usize| self.frozen.get(i).copied().unwrap_or(false);
        let tracked: Vec<Tensor> =
            x.iter().enumerate().map(|(i, x)| if is_frozen(i) { x.detach() } else { x.track() }).collect();
        let y = (self.f)(&tracked)?;
        let w = direction(&y, random::mix(seed, 0))?;
        let gradients = y.backward_from(&w)?;
        let mut v = Vec::new();
        let (mut analytic, mut size) = (0.0, 0.0);
        for (i, x) in tracked.iter().enumerate() {
            v.push(direction(x, random::mix(seed, 1 + i as u64))?);
            if is_frozen(i) {
                continue;
            }
            // A leaf that the loss does not depend on has the gradient 0.
            let Ok(dx) = gradients.of(x) else { continue };
            if dx.shape() != x.shape() {
                let message = format!("a gradient of shape {} for an input of {}", dx.shape(), x.shape());
                return Err(Error::shape("gradcheck", message));
            }
            let (sum, abs) = dot(dx, &v[i])?;
            analytic += sum;
            size += abs;
        }
        let at = |h: f64| -> Result<(f64, f64)> {
            let moved: Result<Vec<Tensor>> = x
                .iter()
                .zip(&v)
                .enumerate()
                .map(|(i, (x, v))| if is_frozen(i) { Ok(x.detach()) } else { x.detach().add(&v.scale(h)?) })
                .collect();
            dot(&(self.f)(&moved?)?, &w)
        };
        self.judge(seed, (analytic, size), at)
    }
}

impl<F> Check<F> {
    fn new(name: &str, f: F) -> Check<F> {
        Check { name: name.into(), f, frozen: vec![], seeds: 0..4, step: 1e-5, tolerance: 1e-6 }
    }

    /// Checks one direction for each seed. A kink in all of them is an error: nothing was checked.
    fn all_directions(&self, mut one: impl FnMut(u64) -> Result<Outcome>) -> Result<()> {
        let mut kinks = 0;
        for seed in self.seeds.clone() {
            if let Outcome::Kink = one(seed)? {
                kinks += 1;
            }
        }
        if kinks > 0 && kinks == self.seeds.clone().count() {
            let what = format!("{}: a kink in every direction tried", self.name);
            return Err(Error::Gradcheck {
                what,
                analytic: f64::NAN,
                numeric: f64::NAN,
                seed: self.seeds.start,
            });
        }
        Ok(())
    }

    /// Compares ⟨v, Jᵀw⟩, given with the size of its terms, with the central difference of
    /// `at`(h) = ⟨w, f(x + hv)⟩, which gives the size of its terms too.
    fn judge(
        &self,
        seed: u64,
        (analytic, size): (f64, f64),
        mut at: impl FnMut(f64) -> Result<(f64, f64)>,
    ) -> Result<Outcome> {
        let h = self.step;
        let ((up, abs), (here, _), (down, _)) = (at(h)?, at(0.0)?, at(-h)?);
        let numeric = (up - down) / (2.0 * h);
        if !(analytic.is_finite() && numeric.is_finite()) {
            return Err(Error::Gradcheck { what: self.name.clone(), analytic, numeric, seed });
        }
        // What rounding alone can do to the difference, and the scale of the numbers compared.
        let noise = 64.0 * f64::EPSILON * abs.max(1.0) / h;
        let scale = size.max(numeric.abs());
        let agrees = (analytic - numeric).abs() <= self.tolerance * scale + noise;
        if agrees {
            return Ok(Outcome::Agrees);
        }
        let (right, left) = ((up - here) / h, (here - down) / h);
        if (right - left).abs() > 1e-3 * scale + noise {
            return Ok(Outcome::Kink);
        }
        Err(Error::Gradcheck { what: self.name.clone(), analytic, numeric, seed })
    }
}

/// A random tensor of the same shape, normal and not small.
fn direction(like: &Tensor, seed: u64) -> Result<Tensor> {
    let mut words = vec![0; like.numel()];
    random::words(seed, 1, 0, &mut words);
    Tensor::from_vec(words.into_iter().map(random::normal).collect(), like.shape(), like.device())
}

/// ⟨a, b⟩ and the sum of its terms' sizes.
fn dot(a: &Tensor, b: &Tensor) -> Result<(f64, f64)> {
    let (a, b) = (a.detach().to_vec::<f64>()?, b.to_vec::<f64>()?);
    Ok(a.iter().zip(&b).fold((0.0, 0.0), |(sum, abs), (a, b)| (sum + a * b, abs + (a * b).abs())))
}
