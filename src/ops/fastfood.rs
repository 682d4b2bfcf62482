//! The Fastfood transform: a random matrix with as many rows as one likes at the cost of a Fourier
//! transform.

use std::sync::Arc;

use crate::compute;
use crate::cpu::{Float, dispatch};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::random;
use crate::tensor::Tensor;

/// A random P (n×d) whose columns have length about 1 (Le, Sarlós and Smola, ICML 2013; in this form Li
/// et al., ICLR 2018):
///
/// > P = (H·G·Π·H·B)\[..n, ..d\]/√(n·Σ gᵢ²)
///
/// of size L, n rounded up to a power of two: B diagonal with ±1, H the Hadamard matrix (entries ±1, applied in
/// L·log L additions), Π a permutation, G diagonal and normal. Held are G, Π and the d signs that are read.
#[derive(Debug)]
pub(crate) struct Fastfood {
    signs: Vec<bool>,
    order: Vec<u32>,
    gauss: Vec<f32>,
    factor: f64,
    rows: usize,
}

/// The streams of B, Π and G.
const STREAMS: [u64; 3] = [0, 1, 2];

impl Fastfood {
    /// P (rows, columns) from a key.
    ///
    /// # Errors
    /// [`Error::Config`] for more columns than rows, or more rows than a permutation is made of.
    pub(crate) fn new(rows: usize, columns: usize, key: u64) -> Result<Fastfood> {
        if columns > rows {
            let message = format!("{columns} numbers for a weight of {rows}: ask for fewer");
            return Err(Error::config("coefficients", message));
        }
        let length = rows.max(1).checked_next_power_of_two().filter(|&length| u32::try_from(length).is_ok());
        let Some(length) = length else {
            return Err(Error::config(
                "fastfood",
                format!("{rows} numbers are more than can be mixed at once"),
            ));
        };
        let words = |stream, len| {
            let mut words = vec![0u32; len];
            random::words(key, stream, 0, &mut words);
            words
        };
        let [signs, order, gauss] = STREAMS;
        let gauss: Vec<f32> =
            words(gauss, length).into_iter().map(|word| random::normal(word) as f32).collect();
        let squares: f64 = gauss.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        Ok(Fastfood {
            signs: words(signs, columns).into_iter().map(|word| word >> 31 == 1).collect(),
            order: shuffled(&words(order, length)),
            gauss,
            factor: 1.0 / (rows.max(1) as f64 * squares).sqrt(),
            rows,
        })
    }

    fn sign<T: Float>(&self, i: usize) -> T {
        if self.signs[i] { -T::ONE } else { T::ONE }
    }

    fn mixed<T: Float>(&self, theta: &Tensor) -> Result<Tensor> {
        let theta = compute::contiguous(theta)?;
        let device = theta.device();
        let mut first = device.host().scratch::<T>(self.gauss.len())?;
        first.fill(T::ZERO);
        for (i, (out, &value)) in first.iter_mut().zip(theta.elements::<T>()?).enumerate() {
            *out = value * self.sign(i);
        }
        hadamard(&mut first);
        let mut second = device.host().scratch::<T>(self.gauss.len())?;
        for ((out, &from), &g) in second.iter_mut().zip(&self.order).zip(&self.gauss) {
            *out = first[from as usize] * T::from_f64(g.into());
        }
        hadamard(&mut second);
        let mut y = device.host().buffer::<T>(self.rows)?;
        let factor = T::from_f64(self.factor);
        y.iter_mut().zip(second.iter()).for_each(|(y, &x)| *y = x * factor);
        Ok(Tensor::from_buffer(y, crate::shape::Shape::new(&[self.rows])?, device))
    }

    fn unmixed<T: Float>(&self, dy: &Tensor) -> Result<Tensor> {
        let dy = compute::contiguous(dy)?;
        let device = dy.device();
        let mut second = device.host().scratch::<T>(self.gauss.len())?;
        second.fill(T::ZERO);
        second[..self.rows].copy_from_slice(dy.elements::<T>()?);
        hadamard(&mut second);
        let mut first = device.host().scratch::<T>(self.gauss.len())?;
        for ((&x, &to), &g) in second.iter().zip(&self.order).zip(&self.gauss) {
            first[to as usize] = x * T::from_f64(g.into());
        }
        hadamard(&mut first);
        let factor = T::from_f64(self.factor);
        let d = (0..self.signs.len()).map(|i| first[i] * self.sign(i) * factor).collect();
        Tensor::from_vec::<T>(d, [self.signs.len()], device)
    }
}

/// The numbers from 0 on in an order that follows from as many words (Fisher and Yates).
fn shuffled(words: &[u32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..words.len() as u32).collect();
    for i in (1..order.len()).rev() {
        // The high half of the product lies below i + 1; its bias is below 2⁻³²·i.
        let j = (u64::from(words[i]) * (i as u64 + 1)) >> 32;
        order.swap(i, j as usize);
    }
    order
}

/// x becomes H·x, for a length that is a power of two: sums and differences at distances 1, 2, 4, …
fn hadamard<T: Float>(x: &mut [T]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        half *= 2;
    }
}

/// y = P·θ. H and G are symmetric and Π's transpose is its inverse, so
/// **dθ = Pᵀ·dy = B·H·Πᵀ·G·H·(dy, 0)/√(n·Σ gᵢ²)**, the same steps backwards.
#[derive(Debug)]
struct Mix(Arc<Fastfood>);

impl Op for Mix {
    fn name(&self) -> &'static str {
        "fastfood"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((dispatch!("fastfood", x[0].dtype(), T => self.0.mixed::<T>(x[0]))?, vec![]))
    }

    fn vjp(
        &self,
        _: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dispatch!("fastfood", dy.dtype(), T => self.0.unmixed::<T>(dy))?)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }
}

/// P·θ (n) for θ (d).
pub(crate) fn fastfood(theta: &Tensor, p: &Arc<Fastfood>) -> Result<Tensor> {
    if theta.dims() != [p.signs.len()] {
        let message = format!("θ is {}: the transform takes {} numbers", theta.shape(), p.signs.len());
        return Err(Error::shape("fastfood", message));
    }
    apply(Mix(p.clone()), &[theta])
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    // The entry of H in row i and column j: −1 where the numbers share an odd number of bits.
    let h = |i: usize, j: usize| if (i & j).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
    let case = |name, rows: usize, columns: &'static [&'static str]| {
        let of = move |d: usize| Fastfood::new(rows, d, 7);
        Case::new(
            name,
            columns,
            move |x| fastfood(x[0], &Arc::new(of(x[0].numel())?)),
            move |x| {
                let p = of(x[0].data.len()).unwrap_or_else(|error| panic!("{error}"));
                Naive::build(&[rows], |at| {
                    let column = |q: usize| {
                        let sign = if p.signs[q] { -1.0 } else { 1.0 };
                        let terms = p.order.iter().zip(&p.gauss).enumerate();
                        terms
                            .map(|(l, (&from, &g))| h(at[0], l) * f64::from(g) * h(from as usize, q) * sign)
                            .sum::<f64>()
                    };
                    let squares: f64 = p.gauss.iter().map(|&g| f64::from(g).powi(2)).sum();
                    let sum: f64 = x[0].data.iter().enumerate().map(|(q, x)| column(q) * x).sum();
                    sum / (rows as f64 * squares).sqrt()
                })
            },
        )
    };
    vec![
        case("fastfood", 21, &["3"]),
        case("fastfood of one", 1, &["1"]),
        case("square fastfood", 40, &["40"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device};

    #[test]
    fn columns_have_length_one_and_are_nearly_orthogonal() -> Result<()> {
        let p = Arc::new(Fastfood::new(5000, 16, 3)?);
        let column = |i: usize| {
            let one = (0..16).map(|j| f64::from(u8::from(i == j))).collect();
            fastfood(&Tensor::from_vec(one, [16], &Device::cpu())?, &p)?.to_vec::<f64>()
        };
        let columns: Vec<Vec<f64>> = (0..16).map(column).collect::<Result<_>>()?;
        for (i, a) in columns.iter().enumerate() {
            for (j, b) in columns.iter().enumerate() {
                let product: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                assert!((product - f64::from(u8::from(i == j))).abs() < 0.1, "{i} {j} {product}");
            }
        }
        Ok(())
    }

    #[test]
    fn an_order_has_every_number_once() {
        for len in [1, 2, 64, 1 << 12] {
            let mut words = vec![0; len];
            random::words(1, 1, 0, &mut words);
            let mut order = shuffled(&words);
            assert!(len < 64 || !order.is_sorted());
            order.sort();
            assert!(order.into_iter().eq(0..len as u32));
        }
    }

    #[test]
    fn sizes_that_do_not_fit() -> Result<()> {
        assert!(matches!(Fastfood::new(3, 4, 0), Err(Error::Config { .. })));
        let p = Arc::new(Fastfood::new(0, 0, 0)?);
        let theta = Tensor::zeros([0], DType::F64, &Device::cpu())?;
        assert_eq!(fastfood(&theta, &p)?.dims(), [0]);
        assert!(matches!(
            fastfood(&Tensor::zeros([2], DType::F64, &Device::cpu())?, &p),
            Err(Error::Shape { .. })
        ));
        Ok(())
    }
}
