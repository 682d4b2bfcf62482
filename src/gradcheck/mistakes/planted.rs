//! The mistakes themselves.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Forward, Function, Given, Mistake, Planted, Vjp, in_function, in_op};
use crate::compute;
use crate::cpu::reduce::{Fold, Max, Sum};
use crate::dtype::DType;
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::ops::dropout::DropoutKey;
use crate::ops::index::Ids;
use crate::tensor::Tensor;

const KEY: DropoutKey = DropoutKey { seed: 1, step: 0, site: 0 };

/// A square whose input is kept in the operation, where the next forward overwrites it.
#[derive(Clone, Debug, Default)]
struct ForgetfulSquare {
    last: Arc<Mutex<Option<Tensor>>>,
}

impl Op for ForgetfulSquare {
    fn name(&self) -> &'static str {
        "stale save"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(x[0].clone());
        Ok((x[0].mul(x[0])?, vec![]))
    }

    fn vjp(
        &self,
        _: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(vec![last.map(|x| x.scale(2.0)?.mul(dy)).transpose()?])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }
}

/// x folded over its dimension `dim`, which stays with size 1.
fn fold(x: &Tensor, dim: usize, by: impl Fold<f64>) -> Result<Tensor> {
    compute::fold(x, &[dim], by)
}

/// The mean over the last dimension, which stays with size 1.
fn mean(x: &Tensor) -> Result<Tensor> {
    let last = x.rank() - 1;
    fold(x, last, Sum)?.scale(1.0 / x.dims()[last] as f64)
}

/// One gradient.
fn one(dx: Result<Tensor>) -> Result<Vec<Option<Tensor>>> {
    Ok(vec![Some(dx?)])
}

/// Two gradients.
fn two(da: Result<Tensor>, db: Result<Tensor>) -> Result<Vec<Option<Tensor>>> {
    Ok(vec![Some(da?), Some(db?)])
}

/// y = max of each column; the aux is 1 where x reaches it.
fn column_max(x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
    let y = fold(x[0], 0, Max)?;
    let reached = compute::zip("max", x[0], &y, |x: f64, y| if x == y { 1.0 } else { 0.0 })?;
    Ok((y, vec![reached]))
}

/// A maximum over ties that stay tied wherever x moves, so that it is smooth in x.
fn tied(name: [&'static str; 2], wrong: Vjp) -> Mistake {
    let with = |vjp: Vjp| -> Function {
        let op = Planted { name: name[0], forward: column_max, vjp };
        Box::new(move |x| apply(op, &[&Tensor::concat(&[&x[0], &x[0]], 0)?]))
    };
    let right: Vjp = |g| one(g.aux[0].mul(g.dy)?.div(&fold(&g.aux[0], 0, Sum)?));
    let [name, description] = name;
    Mistake { name, description, inputs: &[&[1, 4]], frozen: &[], right: with(right), wrong: with(wrong) }
}

/// y = a·b of two matrices.
fn matmul(x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
    Ok((x[0].matmul(x[1])?, vec![]))
}

/// The gradients of [`matmul`].
fn matmul_vjp(g: &Given<'_>) -> Result<Vec<Option<Tensor>>> {
    two(g.dy.matmul(&g.x[1].t()?), g.x[0].t()?.matmul(g.dy))
}

/// Zeros of the shape of `x`'s first row, as a row.
fn zero_row(x: &Tensor) -> Result<Tensor> {
    x.slice(0, 0..1)?.scale(0.0)
}

/// Mistakes in elementwise formulas.
pub(super) fn arithmetic() -> Vec<Mistake> {
    vec![
        in_op(
            ["wrong sign", "a − b gives b the gradient dy instead of −dy"],
            &[&[3, 2], &[3, 2]],
            |x| Ok((x[0].sub(x[1])?, vec![])),
            |g| two(Ok(g.dy.clone()), g.dy.neg()),
            |g| two(Ok(g.dy.clone()), Ok(g.dy.clone())),
        ),
        in_op(
            ["wrong variable", "√x divides dy by 2x, where the derivative is 1/(2y)"],
            &[&[5]],
            |x| Ok((x[0].sqrt()?, vec![])),
            |g| one(g.dy.div(&g.y.scale(2.0)?)),
            |g| one(g.dy.div(&g.x[0].scale(2.0)?)),
        ),
        in_op(
            ["forgotten use", "x·x counts only one of the two places where x stands"],
            &[&[5]],
            |x| Ok((x[0].mul(x[0])?, vec![])),
            |g| one(g.dy.mul(&g.x[0].scale(2.0)?)),
            |g| one(g.dy.mul(g.x[0])),
        ),
        in_op(
            ["other mask", "dropout is differentiated with the mask of the next step"],
            &[&[8, 4]],
            |x| Ok((x[0].dropout(0.5, KEY)?, vec![])),
            |g| one(g.dy.dropout(0.5, KEY)),
            |g| one(g.dy.dropout(0.5, DropoutKey { step: 1, ..KEY })),
        ),
    ]
}

/// Mistakes in products of matrices.
pub(super) fn matrices() -> Vec<Mistake> {
    const SQUARE: &[&[usize]] = &[&[3, 3], &[3, 3]];
    vec![
        in_op(
            ["swapped operands", "a·b uses a for da and b for db; on square matrices the shapes fit"],
            SQUARE,
            matmul,
            matmul_vjp,
            |g| two(g.dy.matmul(&g.x[0].t()?), g.x[1].t()?.matmul(g.dy)),
        ),
        in_op(
            [
                "missing transpose",
                "a·b gives a the gradient dy·b instead of dy·bᵀ; on square matrices the shapes fit",
            ],
            SQUARE,
            matmul,
            matmul_vjp,
            |g| two(g.dy.matmul(g.x[1]), g.x[0].t()?.matmul(g.dy)),
        ),
        in_op(
            ["swapped gradients", "a·b returns db for a and da for b; on square matrices the shapes fit"],
            SQUARE,
            matmul,
            matmul_vjp,
            |g| two(g.x[0].t()?.matmul(g.dy), g.dy.matmul(&g.x[1].t()?)),
        ),
    ]
}

/// Mistakes in where a gradient goes.
pub(super) fn shapes() -> Vec<Mistake> {
    vec![
        in_op(
            [
                "missing broadcast sum",
                "a row added to every row of a matrix gets the first row of dy, not the sum",
            ],
            &[&[4, 3], &[1, 3]],
            |x| Ok((x[0].add(x[1])?, vec![])),
            |g| two(Ok(g.dy.clone()), fold(g.dy, 0, Sum)),
            |g| two(Ok(g.dy.clone()), g.dy.slice(0, 0..1)),
        ),
        in_op(
            ["off by one", "the gradient of rows 1.. of x is put at rows 0.."],
            &[&[4, 2]],
            |x| Ok((x[0].slice(0, 1..x[0].dims()[0])?, vec![])),
            |g| one(Tensor::concat(&[&zero_row(g.dy)?, g.dy], 0)),
            |g| one(Tensor::concat(&[g.dy, &zero_row(g.dy)?], 0)),
        ),
        in_op(
            ["permuted again", "the gradient of a permutation is permuted the same way, not back"],
            &[&[2, 2, 2]],
            |x| Ok((x[0].permute(&[1, 2, 0])?, vec![])),
            |g| one(g.dy.permute(&[2, 0, 1])),
            |g| one(g.dy.permute(&[1, 2, 0])),
        ),
        in_op(
            ["overwritten row", "a row looked up twice keeps one of its two gradients instead of the sum"],
            &[&[2, 3]],
            |x| Ok((x[0].embedding(&Ids::new([0, 1, 0], [3])?)?, vec![])),
            |g| {
                let first = g.dy.slice(0, 0..1)?.add(&g.dy.slice(0, 2..3)?)?;
                one(Tensor::concat(&[&first, &g.dy.slice(0, 1..2)?], 0))
            },
            |g| one(Tensor::concat(&[&g.dy.slice(0, 2..3)?, &g.dy.slice(0, 1..2)?], 0)),
        ),
    ]
}

/// Mistakes in sums, maxima and what is normalised by them.
pub(super) fn reductions() -> Vec<Mistake> {
    vec![
        in_op(
            ["missing factor", "the mean of n numbers gives each dy instead of dy/n"],
            &[&[3, 4]],
            |x| Ok((mean(x[0])?, vec![])),
            |g| one(g.dy.scale(0.25)?.broadcast_to(g.x[0].shape())),
            |g| one(g.dy.broadcast_to(g.x[0].shape())),
        ),
        tied(["half of a tie", "two equal maxima share dy, but get a quarter each"], |g| {
            let n = fold(&g.aux[0], 0, Sum)?;
            one(g.aux[0].mul(g.dy)?.div(&n.mul(&n)?))
        }),
        tied(["every tie in full", "two equal maxima get dy each"], |g| one(g.aux[0].mul(g.dy))),
        in_op(
            ["softmax, element by element", "the gradient y∘(dy − Σ dy·y) of a softmax lacks the sum"],
            &[&[3, 4]],
            |x| {
                let e = x[0].exp()?;
                Ok((e.div(&fold(&e, 1, Sum)?)?, vec![]))
            },
            |g| one(g.y.mul(&g.dy.sub(&fold(&g.dy.mul(g.y)?, 1, Sum)?)?)),
            |g| one(g.y.mul(g.dy)),
        ),
        in_op(
            ["layer norm without the mean", "the gradient takes the mean of x for a constant"],
            &[&[3, 4]],
            layer_norm,
            layer_norm_vjp,
            |g| one(g.dy.sub(&g.y.mul(&mean(&g.dy.mul(g.y)?)?)?)?.mul(&g.aux[0])),
        ),
        in_op(
            ["layer norm without the variance", "the gradient takes the variance of x for a constant"],
            &[&[3, 4]],
            layer_norm,
            layer_norm_vjp,
            |g| one(g.dy.sub(&mean(g.dy)?)?.mul(&g.aux[0])),
        ),
    ]
}

/// y = (x − μ)/σ along the last dimension; the aux is 1/σ.
fn layer_norm(x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
    let centred = x[0].sub(&mean(x[0])?)?;
    let rstd = mean(&centred.mul(&centred)?)?.powf(-0.5)?;
    Ok((centred.mul(&rstd)?, vec![rstd]))
}

/// The gradient of [`layer_norm`]: dx = (dy − mean dy − y·mean(dy·y))/σ.
fn layer_norm_vjp(g: &Given<'_>) -> Result<Vec<Option<Tensor>>> {
    let centred = g.dy.sub(&mean(g.dy)?)?;
    one(centred.sub(&g.y.mul(&mean(&g.dy.mul(g.y)?)?)?)?.mul(&g.aux[0]))
}

/// Mistakes in what is kept, cut and returned.
pub(super) fn bookkeeping() -> Vec<Mistake> {
    let square = ForgetfulSquare::default();
    let mul: Forward = |x| Ok((x[0].mul(x[1])?, vec![]));
    let mul_vjp: Vjp = |g| two(g.dy.mul(g.x[1]), g.dy.mul(g.x[0]));
    vec![
        in_function(
            ["stale save", "an op used twice keeps its input in itself: the first use reads the second's"],
            &[&[4]],
            |x| x[0].mul(&x[0])?.add(&x[0].scale(3.0)?.powf(2.0)?),
            move |x| {
                let first = apply(square.clone(), &[&x[0]])?;
                first.add(&apply(square.clone(), &[&x[0].scale(3.0)?])?)
            },
        ),
        in_function(
            ["cut gradient", "x·eˣ with the exponential detached"],
            &[&[4]],
            |x| x[0].mul(&x[0].exp()?),
            |x| x[0].mul(&x[0].exp()?.detach()),
        ),
        in_function(
            ["cut by copying", "the values pass through a vector, which no gradient follows"],
            &[&[4]],
            |x| x[0].mul(&x[0].exp()?),
            |x| {
                let e = Tensor::from_vec(x[0].exp()?.to_vec::<f64>()?, x[0].shape(), x[0].device())?;
                x[0].mul(&e)
            },
        ),
        in_op(
            ["no gradient", "the vjp returns none for an input that needs one"],
            &[&[4], &[4]],
            mul,
            mul_vjp,
            |g| Ok(vec![Some(g.dy.mul(g.x[1])?), None]),
        ),
        Mistake {
            frozen: &[true, false],
            ..in_op(
                [
                    "shifted gradients",
                    "with a frozen first input, the vjp returns the second's gradient in its place",
                ],
                &[&[4], &[4]],
                mul,
                mul_vjp,
                |g| {
                    let all = [g.dy.mul(g.x[1])?, g.dy.mul(g.x[0])?];
                    Ok(all
                        .into_iter()
                        .zip(g.need)
                        .filter(|(_, need)| **need)
                        .map(|(dx, _)| Some(dx))
                        .collect())
                },
            )
        },
        in_op(
            [
                "wrong shape",
                "the vjp returns the gradient transposed, which does not sum to the input's shape",
            ],
            &[&[2, 3]],
            |x| Ok((x[0].scale(2.0)?, vec![])),
            |g| one(g.dy.scale(2.0)),
            |g| one(g.dy.scale(2.0)?.t()),
        ),
        in_op(
            ["wrong type", "the vjp computes in f32 whatever the input is"],
            &[&[4]],
            |x| Ok((x[0].scale(2.0)?, vec![])),
            |g| one(g.dy.scale(2.0)),
            |g| one(g.dy.to_dtype(DType::F32)?.scale(2.0)),
        ),
    ]
}
