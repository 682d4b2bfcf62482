//! Random directions added up: they are made again wherever they are needed and kept nowhere.

use crate::compute;
use crate::cpu::parallel;
use crate::cpu::{Float, dispatch};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::random;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// y = Σⱼ cⱼ·Rⱼ for the k coefficients c, with random Rⱼ of y's shape, uniform in ±bound: element i of
/// Rⱼ follows from word i of stream j under the key.
///
/// y is linear in c, so dcⱼ = Σᵢ dyᵢ·(Rⱼ)ᵢ. The k·n random numbers are made in the forward and once
/// more in the vjp; what is kept is the key.
#[derive(Clone, Copy, Debug)]
struct RandomSum {
    key: u64,
    bound: f64,
    shape: Shape,
}

/// Random numbers that are made at a time.
const PART: usize = 1024;
/// Elements of y that a thread sums at a time.
const CHUNK: usize = 16 * PART;

impl RandomSum {
    /// Calls `f(at, words)` for the words of the elements `from + at..` of Rⱼ, `len` of them in all.
    fn walk(&self, j: usize, from: usize, len: usize, mut f: impl FnMut(usize, &[u32])) {
        let mut words = [0; PART];
        for at in (0..len).step_by(PART) {
            let words = &mut words[..PART.min(len - at)];
            random::words(self.key, j as u64, (from + at) as u64, words);
            f(at, words);
        }
    }

    fn sum<T: Float>(&self, c: &Tensor) -> Result<Tensor> {
        let c = compute::contiguous(c)?;
        let (coefficients, device) = (c.elements::<T>()?, c.device());
        let mut y = device.host().buffer::<T>(self.shape.numel())?;
        parallel::chunks(&mut y, CHUNK, &|i, y| {
            y.fill(T::ZERO);
            for (j, c) in coefficients.iter().enumerate() {
                let c = c.to_f64() * self.bound;
                self.walk(j, i * CHUNK, y.len(), |at, words| {
                    let pairs = y[at..].iter_mut().zip(words);
                    pairs.for_each(|(y, &word)| *y += T::from_f64(c * random::symmetric(word)));
                });
            }
        });
        Ok(Tensor::from_buffer(y, self.shape, device))
    }

    fn products<T: Float>(&self, dy: &Tensor, count: usize) -> Result<Tensor> {
        let dy = compute::contiguous(dy)?;
        let (numbers, device) = (dy.elements::<T>()?, dy.device());
        let sums = parallel::map(count, numbers.len(), &|j| {
            let mut sum = 0.0;
            self.walk(j, 0, numbers.len(), |at, words| {
                let terms = numbers[at..].iter().zip(words);
                sum += terms.map(|(dy, &word)| dy.to_f64() * random::symmetric(word)).sum::<f64>();
            });
            T::from_f64(sum * self.bound)
        });
        Tensor::from_vec(sums, [count], device)
    }
}

impl Op for RandomSum {
    fn name(&self) -> &'static str {
        "random sum"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((dispatch!("random sum", x[0].dtype(), T => self.sum::<T>(x[0]))?, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let count = x[0].numel();
        Ok(vec![Some(dispatch!("random sum", dy.dtype(), T => self.products::<T>(dy, count))?)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }
}

/// Σⱼ cⱼ·Rⱼ (of this shape) for coefficients c (k) and random Rⱼ, uniform in ±bound, that follow from the
/// key.
pub(crate) fn random_sum(c: &Tensor, shape: Shape, key: u64, bound: f64) -> Result<Tensor> {
    if c.rank() != 1 {
        return Err(Error::shape(
            "random sum",
            format!("the coefficients are {}: a list is needed", c.shape()),
        ));
    }
    apply(RandomSum { key, bound, shape }, &[c])
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    let case = |name, dims: &'static [usize]| {
        Case::new(
            name,
            &["k"],
            move |c| random_sum(c[0], Shape::new(dims)?, 11, 0.5),
            move |c| {
                Naive::build(dims, |index| {
                    let i = index.iter().zip(dims).fold(0, |i, (at, size)| i * size + at);
                    let entry = |j: usize| {
                        let mut word = [0];
                        random::words(11, j as u64, i as u64, &mut word);
                        0.5 * random::symmetric(word[0])
                    };
                    c[0].data.iter().enumerate().map(|(j, c)| c * entry(j)).sum()
                })
            },
        )
    };
    vec![
        case("random sum", &[3, 7]),
        case("random sum of nothing", &[0, 4]),
        // Several parts and chunks.
        case("large random sum", &[5, 7001]),
    ]
}
