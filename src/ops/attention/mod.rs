//! Scaled dot-product attention, whose probabilities are never kept.

mod head;

use std::sync::Arc;

use crate::compute;
use crate::cpu::elementwise::View;
use crate::cpu::gemm::Mat;
use crate::cpu::{Float, dispatch, parallel};
use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::ops::dropout::{DropoutKey, check_rate};
use crate::ops::matmul::matrix;
use crate::shape::Shape;
use crate::tensor::Tensor;
use head::{Head, HeadGradients, scratch_len};

/// What [`Tensor::attention`] may attend to, and how.
#[derive(Clone, Debug, Default)]
pub struct AttentionOptions {
    /// The factor of q·kᵀ: 1/√d by default.
    pub scale: Option<f64>,
    /// Query i of T sees the keys up to i + Tk − T only: the last query sees all.
    pub causal: bool,
    /// For each key of each element of the batch, (B, Tk) in order, whether it may be attended to:
    /// false for padding.
    pub keys: Option<Arc<[bool]>>,
    /// The rate at which probabilities are dropped, and the key of the mask over (B, H, T, Tk).
    pub dropout: Option<(f64, DropoutKey)>,
}

/// y = (P∘M)·v with P = softmax(s·q·kᵀ) over the keys that a query may attend to, and a dropout
/// mask M (all ones without dropout).
///
/// q: B H T d, k: B Hkv Tk d, v: B Hkv Tk e, y: B H T e; Hkv divides H, and each head of k and v
/// serves H/Hkv neighbouring heads of q. For one head, with the scores S = s·q·kᵀ and the
/// log-sum-exp lᵢ = ln Σⱼ e^Sᵢⱼ that forward saves, Pᵢⱼ = e^(Sᵢⱼ − lᵢ) can be had again at any time.
///
/// - yᵢ = Σⱼ (P∘M)ᵢⱼ·vⱼ, so **dv = (P∘M)ᵀ·dy** and dP = M∘(dy·vᵀ).
/// - ∂Pᵢⱼ/∂Sᵢₗ = Pᵢⱼ·(1ⱼₗ − Pᵢₗ), so dSᵢⱼ = Pᵢⱼ·(dPᵢⱼ − δᵢ) with δᵢ = Σⱼ Pᵢⱼ·dPᵢⱼ, which is
///   Σⱼ (P∘M)ᵢⱼ·(dyᵢ·vⱼ) = dyᵢ·yᵢ: no second pass over the keys.
/// - **dq = s·dS·k** and **dk = s·dSᵀ·q**, dk and dv summed over the heads that they serve.
///
/// Both directions work off a block of queries at a time: no more than a block of probabilities
/// exists on each thread. A query that may attend to nothing has y = 0, l = −∞ and P = 0.
#[derive(Debug)]
struct Attention(AttentionOptions);

/// The sizes, by their letters in the derivation.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    b: usize,
    h: usize,
    h_kv: usize,
    t: usize,
    tk: usize,
    d: usize,
    e: usize,
}

impl Sizes {
    fn of(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Sizes> {
        let misfit = |what: &str| {
            let message = format!("{what}: q {}, k {}, v {}", q.shape(), k.shape(), v.shape());
            Err(Error::shape("attention", message))
        };
        let (&[b, h, t, d], &[b_k, h_kv, tk, d_k], &[b_v, h_v, tk_v, e]) = (q.dims(), k.dims(), v.dims())
        else {
            return misfit("queries are (B, H, T, d), keys (B, Hkv, Tk, d), values (B, Hkv, Tk, e)");
        };
        if b_k != b || [b_k, h_kv, tk] != [b_v, h_v, tk_v] {
            return misfit("the batch, or the heads or number of keys and values, differ");
        }
        if d != d_k {
            return misfit("queries and keys differ in their last dimension");
        }
        if h != 0 && (h_kv == 0 || h % h_kv != 0) {
            return misfit("the heads of the keys do not divide those of the queries");
        }
        Ok(Sizes { b, h, h_kv, t, tk, d, e })
    }

    /// Heads of q to a head of k.
    fn group(&self) -> usize {
        self.h / self.h_kv.max(1)
    }

    /// The work on a head, in elements of an elementwise loop.
    fn cost(&self) -> usize {
        self.t * self.tk * (4 + (self.d + self.e) / 32)
    }
}

/// The inputs of all heads.
struct Heads<'a, T> {
    options: &'a AttentionOptions,
    sizes: Sizes,
    q: View<'a, T>,
    k: View<'a, T>,
    v: View<'a, T>,
}

impl<'a, T: Float> Heads<'a, T> {
    fn new(options: &'a AttentionOptions, x: &[&'a Tensor]) -> Result<Self> {
        let (q, k, v) = (x[0].view()?, x[1].view()?, x[2].view()?);
        Ok(Heads { options, sizes: Sizes::of(x[0], x[1], x[2])?, q, k, v })
    }

    /// Head `number` of (B, H).
    fn head(&self, number: usize) -> Head<'a, T> {
        let Sizes { h, tk, d, .. } = self.sizes;
        let (b, h_q) = (number / h, number % h);
        let one = |view: View<'a, T>, h: usize| -> Mat<'a, T> {
            let strides = view.layout.strides();
            matrix(view.data, view.layout, view.layout.offset() + b * strides[0] + h * strides[1])
        };
        let h_kv = h_q / self.sizes.group();
        Head {
            q: one(self.q, h_q),
            k: one(self.k, h_kv),
            v: one(self.v, h_kv),
            scale: self.options.scale.unwrap_or(1.0 / (d.max(1) as f64).sqrt()),
            causal: self.options.causal,
            keys: self.options.keys.as_deref().map(|keys| &keys[b * tk..(b + 1) * tk]),
            dropout: self.options.dropout,
            number,
        }
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let sizes = Sizes::of(x[0], x[1], x[2])?;
        let dtype = compute::same_dtype("attention", x[0], x[1])?;
        compute::same_dtype("attention", x[0], x[2])?;
        let Sizes { b, h, t, tk, e, .. } = sizes;
        if let Some(keys) = &self.0.keys
            && keys.len() != b * tk
        {
            let message = format!("a mask of {} keys where batch and keys make {b}·{tk}", keys.len());
            return Err(Error::shape("attention", message));
        }
        let device = x[0].device();
        let shape = Shape::new(&[b, h, t, e])?;
        dispatch!("attention", dtype, T => {
            let heads = Heads::<T>::new(&self.0, x)?;
            let mut y = device.host().buffer::<T>(shape.numel())?;
            let mut lse = device.host().buffer::<T>(b * h * t)?;
            let tasks = parallel::pieces(&mut y, b * h).into_iter().zip(parallel::pieces(&mut lse, b * h));
            parallel::each(tasks.collect(), sizes.cost(), &|i, (y, lse)| {
                let mut scratch = device.host().scratch::<T>(scratch_len(t, tk))?;
                heads.head(i).forward(&mut scratch, y, lse);
                Ok(())
            })?;
            let lse = Tensor::from_buffer(lse, Shape::new(&[b, h, t])?, device);
            Ok((Tensor::from_buffer(y, shape, device), vec![lse]))
        })
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        y: &Tensor,
        aux: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = compute::contiguous(dy)?;
        dispatch!("attention", dy.dtype(), T => self.gradients::<T>(x, y, &aux[0], &dy, need))
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::inputs(&[0, 1, 2]).and(Saves::OUTPUT).and(Saves::AUX)
    }
}

impl Attention {
    fn gradients<T: Float>(
        &self,
        x: &[&Tensor],
        y: &Tensor,
        lse: &Tensor,
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let device = y.device();
        let heads = Heads::<T>::new(&self.0, x)?;
        let Sizes { b, h_kv, t, tk, d, e, .. } = heads.sizes;
        let (y, lse, dy) = (y.elements::<T>()?, lse.elements::<T>()?, dy.elements::<T>()?);
        let buffer = |i: usize| need[i].then(|| device.host().buffer::<T>(x[i].numel())).transpose();
        let (mut dq, mut dk, mut dv) = (buffer(0)?, buffer(1)?, buffer(2)?);
        // The heads that share k and v are one task: their sums into dk and dv have one order.
        let group = heads.sizes.group();
        let tasks = pieces(&mut dq, b * h_kv)
            .into_iter()
            .zip(pieces(&mut dk, b * h_kv))
            .zip(pieces(&mut dv, b * h_kv));
        parallel::each(tasks.collect(), 2 * group * heads.sizes.cost(), &|i, ((mut dq, mut dk), mut dv)| {
            let mut scratch = device.host().scratch::<T>(scratch_len(t, tk))?;
            dk.iter_mut().chain(&mut dv).for_each(|sum| sum.fill(T::ZERO));
            for g in 0..group {
                let number = i * group + g;
                let (y, dy) = (&y[number * t * e..][..t * e], &dy[number * t * e..][..t * e]);
                let to = HeadGradients {
                    dq: dq.as_deref_mut().map(|dq| &mut dq[g * t * d..(g + 1) * t * d]),
                    dk: dk.as_deref_mut(),
                    dv: dv.as_deref_mut(),
                };
                heads.head(number).backward(y, &lse[number * t..][..t], dy, &mut scratch, to);
            }
            Ok(())
        })?;
        let tensor = |(gradient, x): (Option<Buffer<T>>, &&Tensor)| {
            gradient.map(|gradient| Tensor::from_buffer(gradient, *x.shape(), device))
        };
        Ok([dq, dk, dv].into_iter().zip(x).map(tensor).collect())
    }
}

/// A buffer that may be missing, in `n` equal pieces.
fn pieces<T: Float>(buffer: &mut Option<Buffer<T>>, n: usize) -> Vec<Option<&mut [T]>> {
    match buffer {
        Some(buffer) => parallel::pieces(buffer, n).into_iter().map(Some).collect(),
        None => (0..n).map(|_| None).collect(),
    }
}

impl Tensor {
    /// Scaled dot-product attention with these queries (B, H, T, d): for each query the mean of the
    /// values (B, Hkv, Tk, e), weighted by the softmax of its products with the keys
    /// (B, Hkv, Tk, d). Hkv divides H. Gives (B, H, T, e); zeros for a query without any key.
    ///
    /// ```
    /// # use randlora::{AttentionOptions, DType, Device, Tensor};
    /// # let device = Device::cpu();
    /// // Equal keys: each query gets the mean of the values that it sees.
    /// let x = Tensor::ones([1, 1, 2, 4], DType::F32, &device)?;
    /// let values = Tensor::from_vec(vec![1f32, 3.0], [1, 1, 2, 1], &device)?;
    /// let causal = AttentionOptions { causal: true, ..Default::default() };
    /// assert_eq!(x.attention(&x, &values, &causal)?.to_vec::<f32>()?, [1.0, 2.0]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] where the sizes or that of the mask do not fit, [`Error::DType`] where the
    /// types differ or only store, [`Error::Config`] unless the dropout rate is in 0 ≤ p < 1.
    ///
    /// # Source
    /// Vaswani et al., *Attention Is All You Need*, 2017, §3.2; shared heads of keys and values:
    /// Ainslie et al., *GQA*, 2023.
    pub fn attention(&self, keys: &Tensor, values: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
        let mut options = options.clone();
        if let Some((p, _)) = options.dropout {
            check_rate(p)?;
            options.dropout = options.dropout.filter(|_| p > 0.0);
        }
        apply(Attention(options), &[self, keys, values])
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::cases;
