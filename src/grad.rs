//! Reverse-mode automatic differentiation.
//!
//! A tracked tensor holds its [`Node`]: the operation that made it, the nodes of its inputs, and
//! what the operation's vjp will read. There is no tape beside the tensors: dropping the last
//! tensor that needs a node drops the node. Only first derivatives: a vjp runs untracked.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::compute;
use crate::cpu::{dispatch, parallel};
use crate::device::Device;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::tensor::{History, Tensor};

/// A differentiable function of tensors: its forward and its vector-Jacobian product, side by
/// side. There is no way to write one without the other.
///
/// ```
/// use randlora::{Device, Op, Result, Saves, Tensor, apply};
///
/// /// y = x³, dy/dx = 3x².
/// #[derive(Debug)]
/// struct Cube;
///
/// impl Op for Cube {
///     fn name(&self) -> &'static str {
///         "cube"
///     }
///     fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
///         Ok((x[0].mul(x[0])?.mul(x[0])?, vec![]))
///     }
///     fn vjp(&self, x: &[&Tensor], _y: &Tensor, _aux: &[Tensor], dy: &Tensor, _need: &[bool])
///         -> Result<Vec<Option<Tensor>>>
///     {
///         Ok(vec![Some(x[0].mul(x[0])?.scale(3.0)?.mul(dy)?)])
///     }
///     fn saves(&self, _need: &[bool]) -> Saves {
///         Saves::inputs(&[0])
///     }
/// }
///
/// let x = Tensor::from_vec(vec![2f64], [1], &Device::cpu())?.track();
/// let gradients = apply(Cube, &[&x])?.sum_all()?.backward()?;
/// assert_eq!(gradients.of(&x)?.item()?, 12.0);
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// Check your own with [`gradcheck`](crate::gradcheck). An operation without a vjp does not compile:
///
/// ```compile_fail,E0046
/// use randlora::{Op, Result, Saves, Tensor};
///
/// #[derive(Debug)]
/// struct Half;
///
/// impl Op for Half {
///     fn name(&self) -> &'static str {
///         "half"
///     }
///     fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
///         Ok((x[0].scale(0.5)?, vec![]))
///     }
///     fn saves(&self, _: &[bool]) -> Saves {
///         Saves::NOTHING
///     }
/// }
/// ```
pub trait Op: fmt::Debug + Send + Sync + 'static {
    /// The name that errors call it by.
    fn name(&self) -> &'static str;

    /// y = f(x), and what only the forward knows and the vjp wants (a log-sum-exp, 1/std). Runs
    /// untracked: whatever it calls is not recorded.
    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)>;

    /// Given dL/dy, dL/dx_i for every i with `need[i]` (others are ignored). A gradient may have
    /// the broadcast shape of the output: the engine sums it to the shape of its input.
    fn vjp(
        &self,
        x: &[&Tensor],
        y: &Tensor,
        aux: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;

    /// What `vjp` reads under this mask. All else keeps its shape and loses its data.
    fn saves(&self, need: &[bool]) -> Saves;

    /// Whether `forward` and `vjp` work on inputs of these shapes and types on an OpenCL device, as they do
    /// where they are made of this crate's operations alone. Where they do not, the engine takes the inputs to
    /// the host and the results back, and counts that in [`Device::round_trips`](crate::Device::round_trips).
    fn runs_on_opencl(&self, _x: &[&Tensor]) -> bool {
        false
    }
}

/// Which values are kept from forward to vjp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saves {
    inputs: u32,
    output: bool,
    aux: bool,
}

/// The bit that stands for all inputs from there on.
const LAST: usize = 31;

impl Saves {
    /// Nothing: the vjp reads shapes only.
    pub const NOTHING: Saves = Saves { inputs: 0, output: false, aux: false };
    /// The output.
    pub const OUTPUT: Saves = Saves { inputs: 0, output: true, aux: false };
    /// What forward returned beside the output.
    pub const AUX: Saves = Saves { inputs: 0, output: false, aux: true };

    /// The inputs at these positions. Those from 31 on are kept together.
    pub const fn inputs(positions: &[usize]) -> Saves {
        let (mut saves, mut i) = (Saves::NOTHING, 0);
        while i < positions.len() {
            saves.inputs |= 1 << if positions[i] < LAST { positions[i] } else { LAST };
            i += 1;
        }
        saves
    }

    /// Both.
    pub const fn and(self, other: Saves) -> Saves {
        Saves {
            inputs: self.inputs | other.inputs,
            output: self.output | other.output,
            aux: self.aux | other.aux,
        }
    }

    /// Only if `condition` holds.
    pub const fn when(self, condition: bool) -> Saves {
        if condition { self } else { Saves::NOTHING }
    }

    fn has_input(self, i: usize) -> bool {
        self.inputs >> i.min(LAST) & 1 == 1
    }
}

/// A place in the graph.
enum Node {
    /// Where gradients are collected.
    Leaf,
    Step(Step),
}

struct Step {
    op: Box<dyn Op>,
    /// The nodes of the inputs, None for those that need no gradient.
    parents: Vec<Option<Arc<Node>>>,
    /// Taken by the first backward.
    saved: Mutex<Option<Saved>>,
}

struct Saved {
    x: Vec<Tensor>,
    y: Tensor,
    aux: Vec<Tensor>,
}

impl Drop for Step {
    /// A chain of a million nodes must not recurse a million deep: nodes that nobody else holds
    /// are taken apart here, one after another.
    fn drop(&mut self) {
        let mut rest: Vec<Arc<Node>> = self.parents.drain(..).flatten().collect();
        while let Some(node) = rest.pop() {
            if let Some(Node::Step(mut step)) = Arc::into_inner(node) {
                rest.extend(step.parents.drain(..).flatten());
            }
        }
    }
}

/// Applies an operation: the only way to make a tensor that is tracked and no leaf.
///
/// A node is made only if one of the inputs is tracked.
pub fn apply(op: impl Op, x: &[&Tensor]) -> Result<Tensor> {
    apply_boxed(Box::new(op), x)
}

/// Compiled once, not once for every operation.
fn apply_boxed(op: Box<dyn Op>, x: &[&Tensor]) -> Result<Tensor> {
    let plain: Vec<Tensor> = x.iter().map(|x| x.detach()).collect();
    let (y, aux) = forward(&*op, &plain.iter().collect::<Vec<_>>())?;
    if y.is_tracked() {
        let message = "forward returned a tracked tensor, whose gradient would be lost: pass what it \
                       captured as an input";
        return Err(Error::Vjp { op: op.name(), input: 0, message: message.into() });
    }
    if !x.iter().any(|x| x.is_tracked()) {
        return Ok(y);
    }
    let parents: Vec<_> = x.iter().map(|x| node_of(x)).collect();
    let need: Vec<bool> = parents.iter().map(Option::is_some).collect();
    let saves = op.saves(&need);
    let keep = |kept: bool, t: &Tensor| if kept { t.clone() } else { t.ghost() };
    let saved = Saved {
        x: plain.iter().enumerate().map(|(i, x)| keep(saves.has_input(i), x)).collect(),
        y: keep(saves.output, &y),
        aux: aux.iter().map(|a| keep(saves.aux, a)).collect(),
    };
    y.device().count_node();
    let step = Step { op, parents, saved: Mutex::new(Some(saved)) };
    let node: History = Arc::new(Node::Step(step));
    Ok(y.with_history(Some(node)))
}

/// The op's forward where its inputs are, or on the host where their device has no kernel for it.
fn forward(op: &dyn Op, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
    let Some(device) = opencl_device(op, x)? else { return op.forward(x) };
    let results = compute::through_host(op.name(), &device, x, |x| {
        let (y, aux) = op.forward(&x.iter().collect::<Vec<_>>())?;
        Ok([y].into_iter().chain(aux).map(Some).collect())
    })?;
    let mut results = results.into_iter().flatten();
    let y = results.next().ok_or_else(|| Error::opencl(op.name(), "nothing came back"))?;
    Ok((y, results.collect()))
}

/// The same for the vjp.
fn vjp(op: &dyn Op, saved: &Saved, dy: &Tensor, need: &[bool]) -> Result<Vec<Option<Tensor>>> {
    let Saved { x, y, aux } = saved;
    let x: Vec<&Tensor> = x.iter().collect();
    let Some(device) = opencl_device(op, &x)? else { return op.vjp(&x, y, aux, dy, need) };
    let all: Vec<&Tensor> = x.iter().copied().chain(aux).chain([y, dy]).collect();
    compute::through_host(op.name(), &device, &all, |all| {
        let (inputs, rest) = all.split_at(x.len());
        let (aux, last) = rest.split_at(aux.len());
        op.vjp(&inputs.iter().collect::<Vec<_>>(), &last[0], aux, &last[1], need)
    })
}

/// The OpenCL device that the inputs are on, where it has no kernel for the op.
///
/// # Errors
/// [`Error::Config`] for inputs on different devices.
fn opencl_device(op: &dyn Op, x: &[&Tensor]) -> Result<Option<Device>> {
    let Some(first) = x.first() else { return Ok(None) };
    if let Some(other) = x.iter().find(|x| !x.device().is(first.device())) {
        let places = format!("{} and {}", first.device(), other.device());
        let message = format!("`{}` has inputs on {places}: move one with `to_device`", op.name());
        return Err(Error::config("device", message));
    }
    Ok((first.is_on_opencl() && !op.runs_on_opencl(x)).then(|| first.device().clone()))
}

fn node_of(x: &Tensor) -> Option<Arc<Node>> {
    x.history().and_then(|h| h.clone().downcast::<Node>().ok())
}

/// What a node is known by while something holds it.
fn address(node: &Arc<Node>) -> usize {
    Arc::as_ptr(node).addr()
}

/// A place where gradients are collected: the identity of a parameter, whatever its value is.
#[derive(Clone)]
pub struct Leaf(Arc<Node>);

impl Leaf {
    /// A new place.
    #[allow(clippy::new_without_default)] // Two leaves are never equal: no default one.
    pub fn new() -> Leaf {
        Leaf(Arc::new(Node::Leaf))
    }

    /// The value as a tracked tensor whose gradient is collected here.
    pub fn track(&self, value: &Tensor) -> Tensor {
        value.with_history(Some(self.0.clone()))
    }
}

impl PartialEq for Leaf {
    fn eq(&self, other: &Leaf) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Leaf({:p})", Arc::as_ptr(&self.0))
    }
}

impl Tensor {
    /// The same values as a new leaf of the graph: gradients are collected for it.
    pub fn track(&self) -> Tensor {
        Leaf::new().track(self)
    }

    /// The gradients of this single number with respect to all leaves it depends on.
    ///
    /// Uses the graph up: what was saved for an operation is freed as soon as its vjp has run.
    ///
    /// # Errors
    /// [`Error::NotTracked`] if no tracked tensor leads here, [`Error::GraphUsed`] if an earlier
    /// backward went through part of the graph, [`Error::Shape`] if there is more than one number.
    pub fn backward(&self) -> Result<Gradients> {
        if self.numel() != 1 {
            let message =
                format!("{} is no single number: sum or average it, or use `backward_from`", self.shape());
            return Err(Error::shape("backward", message));
        }
        self.backward_from(&Tensor::ones(self.shape(), self.dtype(), self.device())?)
    }

    /// The gradients of ⟨dy, self⟩: backward from a tensor of any shape, given dL/dself.
    pub fn backward_from(&self, dy: &Tensor) -> Result<Gradients> {
        let root = node_of(self).ok_or(Error::NotTracked { shape: *self.shape() })?;
        if dy.shape() != self.shape() || dy.dtype() != self.dtype() {
            let message = format!("{dy:?} is no gradient of a {} of shape {}", self.dtype(), self.shape());
            return Err(Error::shape("backward", message));
        }
        let mut waiting = uses(&root);
        let mut gradients = Gradients::default();
        let mut ready = vec![(root, dy.detach())];
        let mut pending: HashMap<usize, Tensor> = HashMap::new();
        while let Some((node, dy)) = ready.pop() {
            let Node::Step(step) = &*node else {
                gradients.insert(&Leaf(node), dy)?;
                continue;
            };
            for (parent, dx) in step.run_vjp(&dy)? {
                let key = address(parent);
                let sum = match pending.remove(&key) {
                    Some(sum) => compute::accumulate(sum, &dx)?,
                    None => dx,
                };
                let left = waiting.get_mut(&key).expect("every parent was counted");
                *left -= 1;
                if *left == 0 {
                    ready.push((parent.clone(), sum));
                } else {
                    pending.insert(key, sum);
                }
            }
        }
        Ok(gradients)
    }
}

/// How many times each node below `root` is used as an input.
fn uses(root: &Arc<Node>) -> HashMap<usize, usize> {
    let mut count = HashMap::new();
    let mut rest = vec![root];
    while let Some(node) = rest.pop() {
        let Node::Step(step) = &**node else { continue };
        for parent in step.parents.iter().flatten() {
            let uses = count.entry(address(parent)).or_insert(0);
            *uses += 1;
            if *uses == 1 {
                rest.push(parent);
            }
        }
    }
    count
}

/// The leaves that a backward from x reaches.
pub(crate) fn leaves(x: &Tensor) -> Vec<Leaf> {
    let (mut seen, mut found) = (HashSet::new(), vec![]);
    let mut rest: Vec<Arc<Node>> = node_of(x).into_iter().collect();
    while let Some(node) = rest.pop() {
        if !seen.insert(address(&node)) {
            continue;
        }
        match &*node {
            Node::Leaf => found.push(Leaf(node.clone())),
            Node::Step(step) => rest.extend(step.parents.iter().flatten().cloned()),
        }
    }
    found
}

impl Step {
    /// The gradients of the inputs that need one, each with the node it belongs to.
    fn run_vjp(&self, dy: &Tensor) -> Result<Vec<(&Arc<Node>, Tensor)>> {
        let op = self.op.name();
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let saved = saved.ok_or(Error::GraphUsed { op })?;
        let need: Vec<bool> = self.parents.iter().map(Option::is_some).collect();
        let mut dx = vjp(&*self.op, &saved, dy, &need)?;
        let x = saved.x;
        dx.resize(x.len(), None);
        let mut found = Vec::with_capacity(x.len());
        for (input, ((parent, dx), x)) in self.parents.iter().zip(dx).zip(&x).enumerate() {
            let Some(parent) = parent else { continue };
            let wrong = |message: String| Error::Vjp { op, input, message };
            let dx = dx.ok_or_else(|| wrong("it returned none".into()))?;
            if dx.dtype() != x.dtype() {
                return Err(wrong(format!("it is {} where the input is {}", dx.dtype(), x.dtype())));
            }
            let dx = compute::sum_to(&dx.detach(), x.shape()).map_err(|_| {
                wrong(format!("{} does not sum to the input's shape {}", dx.shape(), x.shape()))
            })?;
            found.push((parent, dx));
        }
        Ok(found)
    }
}

/// What a backward found: a gradient for each leaf that it reached.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// By address; the leaf beside it keeps the address from being used again.
    by_leaf: HashMap<usize, (Leaf, Tensor)>,
}

impl Gradients {
    /// The gradient collected at a leaf; None if the loss does not depend on it.
    pub fn get(&self, leaf: &Leaf) -> Option<&Tensor> {
        self.by_leaf.get(&address(&leaf.0)).map(|(_, gradient)| gradient)
    }

    /// The gradient of a tensor that was made by [`Tensor::track`].
    ///
    /// # Errors
    /// [`Error::NotTracked`] if it is no leaf or the loss does not depend on it.
    pub fn of(&self, x: &Tensor) -> Result<&Tensor> {
        let leaf = node_of(x).map(Leaf);
        leaf.and_then(|leaf| self.get(&leaf)).ok_or(Error::NotTracked { shape: *x.shape() })
    }

    /// Adds to the gradient of a leaf.
    pub fn insert(&mut self, leaf: &Leaf, gradient: Tensor) -> Result<()> {
        let key = address(&leaf.0);
        let sum = match self.by_leaf.remove(&key) {
            Some((_, sum)) => compute::accumulate(sum, &gradient)?,
            None => gradient,
        };
        self.by_leaf.insert(key, (leaf.clone(), sum));
        Ok(())
    }

    /// Adds the gradients of another backward, as when a batch is worked off in parts.
    pub fn accumulate(&mut self, other: Gradients) -> Result<()> {
        other.by_leaf.into_values().try_for_each(|(leaf, gradient)| self.insert(&leaf, gradient))
    }

    /// Multiplies every gradient by a number.
    pub fn scale(&mut self, factor: f64) -> Result<()> {
        self.by_leaf.values_mut().try_for_each(|(_, gradient)| {
            if gradient.is_on_opencl() {
                return compute::cl_scale_own(gradient, factor);
            }
            dispatch!("gradient", gradient.dtype(), T => {
                let factor = T::from_f64(factor);
                parallel::chunks(compute::write::<T>(gradient)?, parallel::GRAIN, &|_, chunk| {
                    chunk.iter_mut().for_each(|g| *g *= factor);
                });
                Ok(())
            })
        })
    }

    /// The number of leaves that have a gradient.
    pub fn len(&self) -> usize {
        self.by_leaf.len()
    }

    /// Whether no leaf has a gradient.
    pub fn is_empty(&self) -> bool {
        self.by_leaf.is_empty()
    }
}
