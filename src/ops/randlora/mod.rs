//! A linear layer with a RandLoRA adapter, as one operation.
//!
//! y = x·(W0 + ΔW)ᵀ + b with **ΔW = s·Σᵢ Bᵢ Λᵢ A Γᵢ** (Albert et al., "RandLoRA: Full-rank
//! parameter-efficient fine-tuning of large models", ICLR 2025, eq. 4): n = ⌈m/r⌉ random bases of
//! rank r, frozen and shared by all layers, and diagonal matrices Λᵢ (r×r) and Γᵢ (m×m) that alone
//! are trained. m is the smaller side of the weight; for in > out ΔW is transposed, so that Γ is
//! always on the smaller side.
//!
//! The gradients are those of λ, γ, x and b. Neither ΔW nor its gradient ever exists whole: each is
//! worked off in panels or blocks of 4 or 5 MiB, in one of two ways that [`Plan`] chooses by
//! their cost. The algebra is in `layer`, the ways are in `panel` and `factored`; what is multiplied with the
//! Bᵢ is in `whole`, for dense and for ternary bases, and in `block`, for block bases ([`Structure::Block`]).
//!
//! Ternary bases with few entries that are not 0 are stored by the places of these, and what is multiplied
//! with them is added up ([`Form::Ternary`]).

mod bases;
mod block;
mod cl;
mod factored;
mod layer;
mod panel;
mod plan;
mod whole;

use std::sync::Arc;

pub use bases::{Bases, Form, Pairing, Structure};
pub use plan::{Plan, Sizes, Wants, Way};

use crate::compute;
use crate::cpu::gemm::{Mat, MatMut, Onto};
use crate::cpu::{Float, dispatch, reduce};
use crate::device::CpuDevice;
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::ops::dropout::{DropoutKey, check_rate, mask_in_place};
use crate::ops::linear::{frozen_backward, frozen_forward, has_cl_kernel, onto_bias};
use crate::shape::Shape;
use crate::tensor::Tensor;
use bases::B;
use factored::Large;
use layer::{Diagonals, Layer, Tokens};

/// What a RandLoRA layer is computed with beside its tensors.
#[derive(Clone, Debug)]
pub struct RandLoraOptions {
    /// The shared random matrices.
    pub bases: Arc<Bases>,
    /// s in ΔW = s·Σᵢ Bᵢ Λᵢ A Γᵢ.
    pub scale: f64,
    /// Dropout of the adapter's input: its probability and key. The frozen layer gets all of x.
    pub dropout: Option<(f64, DropoutKey)>,
    /// These ways instead of the cheapest ones.
    pub ways: Option<(Way, Way)>,
}

/// y = x·(W0 + ΔW)ᵀ + b.
///
/// x: (…, in), W0: (out, in), λ: (r, n), γ: (n, m), b: (out). W0 may be stored as bf16 or f16.
/// λ and γ lie as in PEFT.
///
/// # Errors
/// [`Error::Frozen`] where W0 is tracked; [`Error::Shape`] and [`Error::DType`] where things do not
/// fit.
pub fn randlora_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    lambda: &Tensor,
    gamma: &Tensor,
    options: &RandLoraOptions,
) -> Result<Tensor> {
    if weight.is_tracked() {
        let message = "the weight W0 is tracked, but RandLoRA keeps it frozen: a gradient for it would be the dense \
                       matrix that the method exists to avoid; freeze the weight, or fine-tune it without an adapter";
        return Err(Error::Frozen { op: "randlora", message: message.into() });
    }
    let sizes = check(x, weight, bias, lambda, gamma, options)?;
    options.dropout.map_or(Ok(()), |(p, _)| check_rate(p))?;
    let dropout = options.dropout.filter(|&(p, _)| p > 0.0);
    let wants = Wants {
        diagonals: lambda.is_tracked() || gamma.is_tracked(),
        input: x.is_tracked(),
        dropout: dropout.is_some(),
    };
    let form = options.bases.form_on(x.device());
    let plan = match options.ways {
        None => Plan::new(sizes, wants, form),
        Some((forward, backward)) => Plan::forced(sizes, wants, form, forward, backward),
    };
    let op = RandLora { sizes, plan, dropout, bases: options.bases.clone(), scale: options.scale };
    match bias {
        Some(bias) => apply(op, &[x, weight, lambda, gamma, bias]),
        None => apply(op, &[x, weight, lambda, gamma]),
    }
}

fn check(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    lambda: &Tensor,
    gamma: &Tensor,
    options: &RandLoraOptions,
) -> Result<Sizes> {
    let wrong = |message: String| Err(Error::shape("randlora", message));
    let &[outputs, inputs] = weight.dims() else {
        return wrong(format!("the weight is {}, not (out, in)", weight.shape()));
    };
    if inputs == 0 || outputs == 0 {
        return wrong(format!("a weight of {} has nothing to adapt", weight.shape()));
    }
    if x.dims().last() != Some(&inputs) {
        return wrong(format!(
            "{} does not end in the {inputs} inputs of the weight {}",
            x.shape(),
            weight.shape()
        ));
    }
    let width = x.dims().len() - 1;
    let sizes =
        Sizes { tokens: x.dims()[..width].iter().product(), inputs, outputs, rank: options.bases.rank() };
    let (bases, small) = (sizes.bases(), sizes.small());
    if lambda.dims() != [sizes.rank, bases] || gamma.dims() != [bases, small] {
        return wrong(format!(
            "λ is {} and γ {} where the weight {} with rank {} wants [{}, {bases}] and [{bases}, {small}]",
            lambda.shape(),
            gamma.shape(),
            weight.shape(),
            sizes.rank,
            sizes.rank
        ));
    }
    if bias.is_some_and(|b| b.dims() != [outputs]) {
        return wrong(format!("the bias must be [{outputs}]"));
    }
    for other in [Some(lambda), Some(gamma), Some(options.bases.a()), bias].into_iter().flatten() {
        compute::same_dtype("randlora", x, other)?;
    }
    if weight.dtype().is_compute() {
        compute::same_dtype("randlora", x, weight)?;
    }
    Ok(sizes)
}

/// What the engine is told when it asks for dW0, which `randlora_linear` lets nobody do.
fn frozen() -> Error {
    let message = "a gradient was wanted for the frozen weight W0; see `randlora_linear`";
    Error::Frozen { op: "randlora", message: message.into() }
}

/// Inputs: x, W0, λ, γ and, if there is one, the bias.
#[derive(Debug)]
struct RandLora {
    sizes: Sizes,
    plan: Plan,
    dropout: Option<(f64, DropoutKey)>,
    bases: Arc<Bases>,
    scale: f64,
}

impl Op for RandLora {
    fn name(&self) -> &'static str {
        "randlora"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        if x[0].is_on_opencl() {
            return self.cl_forward(x);
        }
        dispatch!("randlora", x[0].dtype(), T => self.forward_in::<T>(x))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        aux: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        if dy.is_on_opencl() {
            return self.cl_vjp(x, aux, dy, need);
        }
        dispatch!("randlora", dy.dtype(), T => self.vjp_in::<T>(x, aux, dy, need))
    }

    /// W0 only for dx; of x and h one, and only for the diagonals.
    fn saves(&self, need: &[bool]) -> Saves {
        let diagonals = need[2] || need[3];
        let h_or_x = if self.plan.keep_h { Saves::AUX } else { Saves::inputs(&[0]) };
        Saves::inputs(&[2, 3]).and(Saves::inputs(&[1]).when(need[0])).and(h_or_x.when(diagonals))
    }

    /// The weight may be narrow: it is widened a panel at a time.
    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        has_cl_kernel(x)
    }
}

impl RandLora {
    fn with_layer<T: Float, R>(
        &self,
        weight: &Tensor,
        lambda: &Tensor,
        gamma: &Tensor,
        f: impl FnOnce(&Layer<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let (a, b) = self.bases.layer::<T>(self.sizes)?;
        let (lambda, gamma) = (compute::contiguous(lambda)?, compute::contiguous(gamma)?);
        f(&Layer {
            sizes: self.sizes,
            pairing: self.bases.pairing(),
            scale: T::from_f64(self.scale * self.bases.factor(self.sizes.bases())),
            a,
            b,
            lambda: lambda.elements()?,
            gamma: gamma.elements()?,
            weight,
        })
    }

    fn tokens<'a, T: Float>(&self, rows: &'a [T], width: usize, dropout: bool) -> Tokens<'a, T> {
        Tokens { rows, count: self.sizes.tokens, width, dropout: self.dropout.filter(|_| dropout) }
    }

    fn forward_in<T: Float>(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let Sizes { tokens, inputs, outputs, .. } = self.sizes;
        let (host, plan) = (x[0].device().host(), &self.plan);
        let rows = compute::contiguous(x[0])?;
        let x_tokens = self.tokens(rows.elements::<T>()?, inputs, true);
        let mut y = host.buffer::<T>(tokens * outputs)?;
        let mut h = host.buffer::<T>(if plan.keep_h { tokens * self.sizes.columns() } else { 0 })?;
        let bias = x.get(4).map(|bias| compute::contiguous(bias)).transpose()?;
        let mut onto = onto_bias(bias.as_ref())?;
        // One product for both where the panel holds W0 + ΔW and both see the same x.
        let fused = plan.forward == Way::Panel && self.dropout.is_none();
        if !fused {
            let rows = Mat::new(x_tokens.rows, tokens, inputs);
            frozen_forward(rows, x[1], MatMut::new(&mut y, tokens, outputs), onto)?;
            onto = Onto::Itself(T::ONE);
        }
        self.with_layer::<T, _>(x[1], x[2], x[3], |layer| match (plan.forward, layer.is_wide()) {
            (Way::Panel, false) => panel::up(layer, plan, host, fused, x_tokens, onto, &mut y),
            (Way::Panel, true) => panel::down(layer, plan, host, fused, x_tokens, onto, &mut y),
            (Way::Factored, false) => factored::up(layer, plan, host, x_tokens, &mut y),
            (Way::Factored, true) => {
                factored::down(layer, plan, host, x_tokens, &mut y, plan.keep_h.then_some(&mut h[..]))
            }
        })?;
        let shape = x[0].shape().with_dim(x[0].rank() - 1, outputs)?;
        let y = Tensor::from_buffer(y, shape, x[0].device());
        if !plan.keep_h {
            return Ok((y, vec![]));
        }
        let h_shape = Shape::new(&[tokens, self.sizes.columns()])?;
        Ok((y, vec![Tensor::from_buffer(h, h_shape, x[0].device())]))
    }

    fn vjp_in<T: Float>(
        &self,
        x: &[&Tensor],
        aux: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        if need[1] {
            return Err(frozen());
        }
        let host = dy.device().host();
        let dy_rows = compute::contiguous(dy)?;
        let dy_tokens = self.tokens(dy_rows.elements::<T>()?, self.sizes.outputs, false);
        let mut dx = host.buffer::<T>(if need[0] { x[0].numel() } else { 0 })?;
        let mut to = None;
        if need[2] || need[3] {
            to = Some(Diagonals::zeros(self.sizes, host)?);
        }
        self.with_layer::<T, _>(x[1], x[2], x[3], |layer| {
            let into = need[0].then_some(&mut dx[..]);
            match self.plan.backward {
                Way::Panel => self.panel_backward(layer, host, x[0], dy_tokens, into, to.as_mut()),
                Way::Factored => {
                    self.factored_backward(layer, host, (x[0], aux), dy_tokens, into, to.as_mut())
                }
            }
        })?;
        let mut gradients = vec![need[0].then(|| Tensor::from_buffer(dx, *x[0].shape(), dy.device())), None];
        match to {
            Some(to) => gradients.extend(self.diagonals(to, dy)?.map(Some)),
            None => gradients.extend([None, None]),
        }
        if need.get(4) == Some(&true) {
            let summed = compute::fold::<T>(&compute::rows(dy)?, &[0], reduce::Sum)?;
            gradients.push(Some(compute::reshape(&summed, *x[4].shape())?));
        }
        Ok(gradients)
    }

    /// dx ← dy·W0 + beta·dx.
    fn frozen<T: Float>(&self, weight: &Tensor, dy: Tokens<'_, T>, beta: T, dx: &mut [T]) -> Result<()> {
        let Sizes { tokens, inputs, outputs, .. } = self.sizes;
        frozen_backward(Mat::new(dy.rows, tokens, outputs), weight, MatMut::new(dx, tokens, inputs), beta)
    }

    /// Puts what came to dx through the adapter under the mask of its dropout.
    fn mask<T: Float>(&self, dx: &mut [T]) {
        if let Some((p, key)) = self.dropout {
            mask_in_place(key, p, dx);
        }
    }

    fn panel_backward<T: Float>(
        &self,
        layer: &Layer<'_, T>,
        host: &Arc<CpuDevice>,
        x: &Tensor,
        dy: Tokens<'_, T>,
        dx: Option<&mut [T]>,
        to: Option<&mut Diagonals<T>>,
    ) -> Result<()> {
        if let Some(dx) = dx {
            let fused = self.dropout.is_none();
            match layer.is_wide() {
                false => panel::down(layer, &self.plan, host, fused, dy, Onto::NOTHING, dx)?,
                true => panel::up(layer, &self.plan, host, fused, dy, Onto::NOTHING, dx)?,
            }
            if !fused {
                self.mask(dx);
                self.frozen(layer.weight, dy, T::ONE, dx)?;
            }
        }
        let Some(to) = to else { return Ok(()) };
        let rows = compute::contiguous(x)?;
        let x = self.tokens(rows.elements::<T>()?, self.sizes.inputs, true);
        let (u, v) = if layer.is_wide() { (dy, x) } else { (x, dy) };
        match layer.b {
            B::Whole(b) => panel::pull(layer, b, &self.plan, host, u, v, to),
            // Block bases need no panel of the dense gradient, which would cost more.
            B::Block(_) => factored::backward(layer, &self.plan, host, u, Large::Tokens(v), None, to),
        }
    }

    fn factored_backward<T: Float>(
        &self,
        layer: &Layer<'_, T>,
        host: &Arc<CpuDevice>,
        (x, aux): (&Tensor, &[Tensor]),
        dy: Tokens<'_, T>,
        mut dx: Option<&mut [T]>,
        to: Option<&mut Diagonals<T>>,
    ) -> Result<()> {
        let plan = &self.plan;
        // With dropout W0's part comes last: the mask is not for it.
        match &mut dx {
            Some(dx) if self.dropout.is_some() => dx.fill(T::ZERO),
            Some(dx) => self.frozen(layer.weight, dy, T::ZERO, dx)?,
            None => {}
        }
        match (to, dx.as_deref_mut()) {
            (Some(to), dx) if plan.keep_h => {
                let h = Mat::new(aux[0].elements::<T>()?, self.sizes.tokens, self.sizes.columns());
                factored::backward(layer, plan, host, dy, Large::Kept(h), dx, to)?;
            }
            (Some(to), dx) => {
                let rows = compute::contiguous(x)?;
                let x = self.tokens(rows.elements::<T>()?, self.sizes.inputs, true);
                let (u, v) = if layer.is_wide() { (dy, x) } else { (x, dy) };
                factored::backward(layer, plan, host, u, Large::Tokens(v), dx, to)?;
            }
            (None, Some(dx)) if layer.is_wide() => factored::up(layer, plan, host, dy, dx)?,
            (None, Some(dx)) => factored::down(layer, plan, host, dy, dx, None)?,
            (None, None) => {}
        }
        match dx {
            Some(dx) if self.dropout.is_some() => {
                self.mask(dx);
                self.frozen(layer.weight, dy, T::ONE, dx)
            }
            _ => Ok(()),
        }
    }

    /// dλ (r×n) and dγ (n×m) as tensors.
    fn diagonals<T: Float>(&self, to: Diagonals<T>, like: &Tensor) -> Result<[Tensor; 2]> {
        let (bases, rank) = (self.sizes.bases(), self.sizes.rank);
        let d_lambda = Tensor::from_buffer(to.lambda, Shape::new(&[bases, rank])?, like.device());
        let shape = Shape::new(&[bases, self.sizes.small()])?;
        let d_gamma = Tensor::from_buffer(to.gamma, shape, like.device());
        Ok([compute::contiguous(&compute::transpose(&d_lambda)?)?, d_gamma])
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::cases;
