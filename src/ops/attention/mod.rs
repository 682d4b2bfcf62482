//! Scaled dot-product attention, whose probabilities are never kept.

mod head;

use std::sync::Arc;

use crate::compute;
use crate::cpu::elementwise::View;
use crate::cpu::gemm::Mat;
use crate::cpu::{Float, dispatch, parallel};
use crate::device::{Buffer, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::opencl::runtime::ClBuffer;
use crate::ops::dropout::{DropoutKey, check_rate, cl_mask};
use crate::ops::matmul::matrix;
use crate::shape::{Layout, Shape};
use crate::tensor::Tensor;
use head::{Found, Head, HeadGradients, copy_rows, scratch_len};

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
        let h_kv = h_q / self.sizes.group();
        Head {
            q: head_of(self.q, b, h_q),
            k: head_of(self.k, b, h_kv),
            v: head_of(self.v, b, h_kv),
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
        if x[0].is_on_opencl() {
            let (y, lse) = self.on_opencl(x)?.forward(&lies_places_first([b, t, h, e])?)?;
            let lse = Tensor::from_cl(lse, dtype, Shape::new(&[b, h, t])?, device);
            return Ok((cl_places_first(y, [b, t, h, e], device)?, vec![lse]));
        }
        dispatch!("attention", dtype, T => {
            let heads = Heads::<T>::new(&self.0, x)?;
            let mut y = device.host().buffer::<T>(shape.numel())?;
            let mut lse = device.host().buffer::<T>(b * h * t)?;
            let tasks = by_head(&mut y, [b, t, h, e]).into_iter().zip(parallel::pieces(&mut lse, b * h));
            parallel::each(tasks.collect(), sizes.cost(), &|i, (mut y, lse)| {
                let mut scratch = device.host().scratch::<T>(scratch_len(t, tk, e))?;
                heads.head(i).forward(&mut scratch, &mut y, lse);
                Ok(())
            })?;
            let lse = Tensor::from_buffer(lse, Shape::new(&[b, h, t])?, device);
            Ok((places_first(y, [b, t, h, e], device)?, vec![lse]))
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
        if dy.is_on_opencl() {
            return self.cl_gradients(x, y, &aux[0], dy);
        }
        // Rows are read as slices.
        let dy = if dy.layout().strides()[3] == 1 { dy.detach() } else { compute::contiguous(dy)? };
        dispatch!("attention", dy.dtype(), T => self.gradients::<T>(x, y, &aux[0], &dy, need))
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::inputs(&[0, 1, 2]).and(Saves::OUTPUT).and(Saves::AUX)
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

impl Attention {
    /// The same for kernels on an OpenCL device.
    fn on_opencl<'a>(&'a self, x: &[&'a Tensor]) -> Result<opencl::attention::Attention<'a>> {
        let width = x[0].dims()[3].max(1) as f64;
        Ok(opencl::attention::Attention {
            q: x[0].cl()?,
            k: x[1].cl()?,
            v: x[2].cl()?,
            scale: self.0.scale.unwrap_or(1.0 / width.sqrt()),
            causal: self.0.causal,
            keys: self.0.keys.as_deref(),
            mask: self.0.dropout.map(|(p, key)| cl_mask(key, p)),
        })
    }

    fn cl_gradients(
        &self,
        x: &[&Tensor],
        y: &Tensor,
        lse: &Tensor,
        dy: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let Sizes { b, h, h_kv, t, tk, d, e } = Sizes::of(x[0], x[1], x[2])?;
        let dims = [[b, t, h, d], [b, tk, h_kv, d], [b, tk, h_kv, e]];
        let [q, k, v] =
            [lies_places_first(dims[0])?, lies_places_first(dims[1])?, lies_places_first(dims[2])?];
        let found = opencl::attention::Found { y: y.cl()?, lse: lse.cl()?, dy: dy.cl()? };
        let gradients = self.on_opencl(x)?.vjp(found, [&q, &k, &v])?;
        let tensors =
            gradients.into_iter().zip(dims).map(|(data, dims)| cl_places_first(data, dims, y.device()));
        tensors.map(|tensor| tensor.map(Some)).collect()
    }

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
        let Sizes { b, h, h_kv, t, tk, d, e } = heads.sizes;
        let (y, lse, dy) = (y.view::<T>()?, lse.elements::<T>()?, dy.view::<T>()?);
        let buffer = |i: usize| need[i].then(|| device.host().buffer::<T>(x[i].numel())).transpose();
        let (mut dq, mut dk, mut dv) = (buffer(0)?, buffer(1)?, buffer(2)?);
        // The heads that share k and v are one task: their sums into dk and dv have one order.
        let group = heads.sizes.group();
        let mut of_q = rows_of(&mut dq, [b, t, h, d]);
        let tasks = (of_q.chunks_mut(group.max(1)))
            .zip(rows_of(&mut dk, [b, tk, h_kv, d]))
            .zip(rows_of(&mut dv, [b, tk, h_kv, e]));
        parallel::each(tasks.collect(), 2 * group * heads.sizes.cost(), &|i, ((dq, mut dk), mut dv)| {
            let mut scratch = device.host().scratch::<T>(scratch_len(t, tk, d))?;
            let mut sums = device.host().scratch::<T>(tk * (d + e))?;
            sums.fill(T::ZERO);
            let (sum_k, sum_v) = sums.split_at_mut(tk * d);
            for (g, dq) in dq.iter_mut().enumerate() {
                let number = i * group + g;
                let found = Found {
                    y: head_of(y, number / h, number % h),
                    lse: &lse[number * t..][..t],
                    dy: head_of(dy, number / h, number % h),
                };
                let to = HeadGradients {
                    dq: dq.as_deref_mut(),
                    dk: dk.is_some().then_some(&mut *sum_k),
                    dv: dv.is_some().then_some(&mut *sum_v),
                };
                heads.head(number).backward(&found, &mut scratch, to);
            }
            dk.iter_mut().for_each(|dk| copy_rows(sum_k, d, dk));
            dv.iter_mut().for_each(|dv| copy_rows(sum_v, e, dv));
            Ok(())
        })?;
        let tensor = |gradient: Option<Buffer<T>>, dims| {
            gradient.map(|gradient| places_first(gradient, dims, device)).transpose()
        };
        Ok(vec![tensor(dq, [b, t, h, d])?, tensor(dk, [b, tk, h_kv, d])?, tensor(dv, [b, tk, h_kv, e])?])
    }
}

/// One head of (B, H, T, w).
fn head_of<'a, T: Float>(x: View<'a, T>, b: usize, h: usize) -> Mat<'a, T> {
    let strides = x.layout.strides();
    matrix(x.data, x.layout, x.layout.offset() + b * strides[0] + h * strides[1])
}

/// The rows of each head, for each of (B, H), of a buffer that lies as (B, T, H, w).
fn by_head<T>(x: &mut [T], [b, t, h, width]: [usize; 4]) -> Vec<Vec<&mut [T]>> {
    let mut heads: Vec<Vec<&mut [T]>> = (0..b * h).map(|_| Vec::with_capacity(t)).collect();
    let mut rest = x;
    for place in 0..b * t {
        for head in &mut heads[place / t * h..][..h] {
            let (row, after) = rest.split_at_mut(width);
            head.push(row);
            rest = after;
        }
    }
    heads
}

/// [`by_head`] of a buffer that may be missing.
fn rows_of<T: Float>(x: &mut Option<Buffer<T>>, dims: [usize; 4]) -> Vec<Option<Vec<&mut [T]>>> {
    match x {
        Some(x) => by_head(x, dims).into_iter().map(Some).collect(),
        None => (0..dims[0] * dims[2]).map(|_| None).collect(),
    }
}

/// The buffer (B, T, H, w) as a tensor (B, H, T, w): what comes before and after attention are layers
/// over places, and (B, T, H·w) is then a view.
fn places_first<T: Float>(x: Buffer<T>, dims: [usize; 4], device: &Device) -> Result<Tensor> {
    let x = Tensor::from_buffer(x, Shape::new(&dims)?, device);
    Ok(x.with_layout(x.layout().permute(&[0, 2, 1, 3])?))
}

/// How (B, H, T, w) lies in a buffer (B, T, H, w).
fn lies_places_first(dims: [usize; 4]) -> Result<Layout> {
    Layout::contiguous(Shape::new(&dims)?).permute(&[0, 2, 1, 3])
}

/// [`places_first`] on an OpenCL device.
fn cl_places_first(data: ClBuffer, dims: [usize; 4], device: &Device) -> Result<Tensor> {
    let x = Tensor::from_cl(data, DType::F32, Shape::new(&dims)?, device);
    Ok(x.with_layout(lies_places_first(dims)?))
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
