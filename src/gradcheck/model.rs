//! The check of a whole model.

use std::collections::BTreeMap;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gradcheck::{Check, Outcome, direction, dot};
use crate::nn::{Context, ItemMut, Module};
use crate::random;
use crate::tensor::Tensor;

/// Checks the gradients of all trained parameters of a model, which must be f64; its parameters are
/// afterwards what they were before. `f` gives a loss or any other output of the model, without
/// dropout (or with that of a context of its own).
///
/// ```
/// use randlora::nn::{Init, Linear, Module};
/// use randlora::{DType, Device, gradcheck};
///
/// let init = Init::seeded(0, &Device::cpu());
/// let mut model = Linear::init(&init, 3, 2, true)?;
/// model.cast(DType::F64)?;
/// let x = init.normal("x", [5, 3], 1.0)?.to_dtype(DType::F64)?;
/// gradcheck::model(&mut model, |model, ctx| model.forward(&x, ctx)?.gelu())?;
/// # Ok::<(), randlora::Error>(())
/// ```
///
/// # Errors
/// [`Error::Gradcheck`] with the name of the parameter whose gradient is wrong; and whatever `f`
/// returns.
pub fn model<M: Module>(model: &mut M, f: impl Fn(&M, &Context) -> Result<Tensor>) -> Result<()> {
    if let Some((name, p)) = model.parameters().iter().find(|(_, p)| p.value().dtype() != DType::F64) {
        let message =
            format!("`{name}` is {}: a check in it proves little, use `cast(DType::F64)`", p.value().dtype());
        return Err(Error::dtype("gradcheck", message));
    }
    let state = model.state();
    let check = Check::new("the model", ());
    let whole = check.all_directions(|seed| along(&check, model, &f, &state, seed, None));
    let result = match whole {
        Err(Error::Gradcheck { .. }) => culprit(model, &f, &state).and(whole),
        other => other,
    };
    model.load_state(&state)?;
    result
}

/// An error for the first parameter that fails alone.
fn culprit<M: Module>(
    model: &mut M,
    f: &impl Fn(&M, &Context) -> Result<Tensor>,
    state: &BTreeMap<String, Tensor>,
) -> Result<()> {
    model.load_state(state)?;
    let names: Vec<String> =
        model.parameters().into_iter().filter(|(_, p)| p.is_trainable()).map(|(name, _)| name).collect();
    names.iter().try_for_each(|name| {
        let check = Check::new(&format!("`{name}`"), ());
        check.all_directions(|seed| along(&check, model, f, state, seed, Some(name)))
    })
}

/// Moves the trained parameters, or only one of them, along a random direction and compares.
fn along<M: Module>(
    check: &Check<()>,
    model: &mut M,
    f: &impl Fn(&M, &Context) -> Result<Tensor>,
    state: &BTreeMap<String, Tensor>,
    seed: u64,
    only: Option<&str>,
) -> Result<Outcome> {
    model.load_state(state)?;
    let y = f(model, &Context::eval().tracked())?;
    let w = direction(&y, random::mix(seed, 0))?;
    let gradients = y.backward_from(&w)?;
    let mut v = BTreeMap::new();
    let (mut analytic, mut size) = (0.0, 0.0);
    for (i, (name, parameter)) in model.parameters().into_iter().enumerate() {
        if !parameter.is_trainable() || only.is_some_and(|only| only != name) {
            continue;
        }
        let towards = direction(parameter.value(), random::mix(seed, 1 + i as u64))?;
        // What the output does not depend on has the gradient 0.
        if let Some(gradient) = gradients.get(parameter.leaf()) {
            let (sum, abs) = dot(gradient, &towards)?;
            (analytic, size) = (analytic + sum, size + abs);
        }
        v.insert(name, towards);
    }
    let at = |h: f64| {
        model.try_visit_mut(&mut |name, item| match (item, v.get(name)) {
            (ItemMut::Parameter(parameter), Some(v)) => parameter.set(state[name].add(&v.scale(h)?)?),
            _ => Ok(()),
        })?;
        dot(&f(model, &Context::eval())?, &w)
    };
    check.judge(seed, (analytic, size), at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::nn::{Init, Linear};

    struct Pair {
        right: Linear,
        wrong: Linear,
    }
    crate::module!(Pair { right, wrong });

    fn pair() -> (Pair, Tensor) {
        let init = Init::seeded(2, &Device::cpu());
        let linear = |name| Linear::init(&init.at(name), 3, 3, true).unwrap();
        let mut pair = Pair { right: linear("right"), wrong: linear("wrong") };
        pair.cast(DType::F64).unwrap();
        (pair, init.normal("x", [4, 3], 1.0).unwrap().to_dtype(DType::F64).unwrap())
    }

    #[test]
    fn the_parameter_with_a_cut_gradient_is_named() {
        let (mut model, x) = pair();
        let before = model.state();
        model.right.freeze();
        let f = |m: &Pair, ctx: &Context| m.wrong.forward(&m.right.forward(&x, ctx)?.exp()?, ctx);
        super::model(&mut model, f).unwrap();
        super::model(&mut model.right, |m, ctx| m.forward(&x, &ctx.tracked())).unwrap_err();
        model.set_trainable(true);
        super::model(&mut model, f).unwrap();
        // The bias reaches the output by a second way, on which its gradient is cut.
        let cut = |m: &Pair, ctx: &Context| {
            let bias = m.wrong.bias().map(|b| b.tensor(ctx).detach()).expect("it was made with one");
            f(m, ctx)?.add(&bias)
        };
        let error = super::model(&mut model, cut).unwrap_err();
        assert!(matches!(&error, Error::Gradcheck { what, .. } if what == "`wrong.bias`"), "{error}");
        for (name, value) in model.state() {
            assert_eq!(value.to_vec::<f64>().unwrap(), before[&name].to_vec::<f64>().unwrap());
        }
    }

    #[test]
    fn f32_is_refused() {
        let (mut model, _) = pair();
        model.cast(DType::F32).unwrap();
        assert!(matches!(super::model(&mut model, |_, _| unreachable!()), Err(Error::DType { .. })));
    }
}
