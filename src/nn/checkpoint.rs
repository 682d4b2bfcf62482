//! Activation checkpointing (Chen et al., 2016, arXiv:1604.06174): less memory for more time.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::grad::{Leaf, Op, Saves, apply, leaves};
use crate::nn::{Context, Module};
use crate::tensor::Tensor;

/// `f` of a module and its inputs as one operation, which saves nothing but the inputs: what happens
/// inside is forgotten after the forward and computed again in the backward.
///
/// A chain of n modules then holds n inputs and the inside of one module, instead of the insides of all
/// n, for one more forward of each. [`Context::checkpointed`] does it for the blocks of a transformer.
///
/// **Derivation.** y = f(x, θ) is itself a chain of operations, and dx = J₁ᵀ·…·J_kᵀ·dy and dθ alike. Each
/// factor Jᵢ is a function of what went into operation i, and that is a function of x and θ alone. So the
/// vjp makes x and θ leaves, runs f once more, this time with its graph, and goes back through it from dy.
/// Masks of dropouts follow from the key in the context, and every operation sees what it saw the first
/// time: value and gradients have the bits that they have without a checkpoint. (Only where a parameter is
/// used several times in each of several checkpoints is their sum taken in another order.)
///
/// The inputs of the operation are x and those trained parameters of the module that y depends on. Without
/// the parameters nothing would lead to y where x needs no gradient, as in the first block of a
/// frozen model, and their gradients would be lost.
///
/// ```
/// use randlora::nn::{Context, Init, Linear, checkpoint};
/// use randlora::Device;
///
/// let init = Init::seeded(0, &Device::cpu());
/// let layers = (0..3).map(|i| Linear::init(&init.at(&i.to_string()), 8, 8, true));
/// let layers: Vec<Linear> = layers.collect::<Result<_, _>>()?;
/// let (x, ctx) = (init.normal("x", [5, 8], 1.0)?, Context::train(0, 0));
/// let y = checkpoint(&layers, [&x], &ctx, |layers: &Vec<Linear>, [x], ctx| {
///     layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x, ctx)?.gelu())
/// })?;
/// let gradients = y.sum_all()?.backward()?;
/// assert!(layers.iter().all(|layer| gradients.get(layer.weight().leaf()).is_some()));
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// `f` gets a copy of the module (which shares its memory), the inputs, and the context. It has to be a
/// function of these: the same ones give the same output.
///
/// # Errors
/// What `f` returns, and [`Error::Vjp`] where its output depends on a tracked tensor or a trained
/// parameter that is neither in `x` nor in the module.
pub fn checkpoint<M, F, const N: usize>(module: &M, x: [&Tensor; N], ctx: &Context, f: F) -> Result<Tensor>
where
    M: Module + Clone + Send + Sync + 'static,
    F: Fn(&M, &[Tensor; N], &Context) -> Result<Tensor> + Send + Sync + 'static,
{
    let copy = module.clone();
    let x_leaves = x.map(|x| x.is_tracked().then(Leaf::new));
    let run = Run { module: copy, x_leaves, ctx: *ctx, f };
    let y = run.again(&x)?;
    let mut below = leaves(&y);
    let mut reached =
        |leaf: &Leaf| below.iter().position(|l| l == leaf).map(|i| below.swap_remove(i)).is_some();

    let mut op_leaves = vec![];
    let mut inputs = vec![];
    for (x, leaf) in x.into_iter().zip(&run.x_leaves) {
        let leaf = leaf.clone().filter(&mut reached);
        inputs.push(if leaf.is_some() { x.clone() } else { x.detach() });
        op_leaves.push(leaf);
    }
    for ((_, own), (_, copied)) in module.parameters().into_iter().zip(run.module.parameters()) {
        if reached(copied.leaf()) {
            inputs.push(own.tensor(ctx));
            op_leaves.push(Some(copied.leaf().clone()));
        }
    }
    if !below.is_empty() {
        let message = "its output depends on a tracked tensor or trained parameter that it was not given, whose \
                       gradient would be lost: pass it in `x`, or within the module";
        return Err(Error::Vjp { op: NAME, input: inputs.len(), message: message.into() });
    }
    let output = Mutex::new(Some(y.detach()));
    apply(Checkpoint { run, leaves: op_leaves, output }, &inputs.iter().collect::<Vec<_>>())
}

const NAME: &str = "checkpoint";

/// All that the output follows from, but for the values of x.
struct Run<M, F, const N: usize> {
    /// Its parameters' leaves are its own, apart from those of the original.
    module: M,
    /// Where the gradients of x are collected; None where none is needed.
    x_leaves: [Option<Leaf>; N],
    ctx: Context,
    f: F,
}

impl<M, F, const N: usize> Run<M, F, N>
where
    F: Fn(&M, &[Tensor; N], &Context) -> Result<Tensor>,
{
    /// The output with a graph down to the leaves here.
    fn again(&self, x: &[&Tensor; N]) -> Result<Tensor> {
        let track = |i: usize| match &self.x_leaves[i] {
            Some(leaf) => leaf.track(x[i]),
            None => x[i].detach(),
        };
        (self.f)(&self.module, &std::array::from_fn(track), &self.ctx)
    }
}

/// Inputs: x, then the trained parameters that the output depends on.
struct Checkpoint<M, F, const N: usize> {
    run: Run<M, F, N>,
    /// The leaf within for each input that needs a gradient.
    leaves: Vec<Option<Leaf>>,
    /// What the first run has found: which parameters are inputs is only known after it.
    output: Mutex<Option<Tensor>>,
}

impl<M, F, const N: usize> fmt::Debug for Checkpoint<M, F, N> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Checkpoint of {}", std::any::type_name::<M>())
    }
}

impl<M, F, const N: usize> Op for Checkpoint<M, F, N>
where
    M: Send + Sync + 'static,
    F: Fn(&M, &[Tensor; N], &Context) -> Result<Tensor> + Send + Sync + 'static,
{
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, _: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok((output.ok_or(Error::GraphUsed { op: NAME })?, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let gradients = self.run.again(&std::array::from_fn(|i| x[i]))?.backward_from(dy)?;
        Ok(self.leaves.iter().map(|leaf| gradients.get(leaf.as_ref()?).cloned()).collect())
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::inputs(&std::array::from_fn::<_, N, _>(|i| i))
    }

    /// What the module is made of decides for itself.
    fn runs_on_opencl(&self, _: &[&Tensor]) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
