//! Tensors put one after another along a dimension.

use crate::compute;
use crate::cpu::dispatch;
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::tensor::Tensor;

/// y is x₀, x₁, … along dimension `dim`; dxᵢ is the part of dy where xᵢ is.
#[derive(Debug)]
struct Concat {
    dim: usize,
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let dim = x[0].shape().check_dim(self.dim, "concat")?;
        let mut total = 0;
        for part in x {
            compute::same_dtype("concat", x[0], part)?;
            let fits = part.rank() == x[0].rank()
                && x[0].shape().with_dim(dim, 0)? == part.shape().with_dim(dim, 0)?;
            if !fits {
                let message =
                    format!("{} and {} differ in more than dimension {dim}", x[0].shape(), part.shape());
                return Err(Error::shape("concat", message));
            }
            total += part.dims()[dim];
        }
        let shape = x[0].shape().with_dim(dim, total)?;
        if x[0].is_on_opencl() {
            let parts = x.iter().map(|x| x.cl()).collect::<Result<Vec<_>>>()?;
            let y = opencl::elementwise::concat(&parts, x[0].dtype(), dim, &shape)?;
            return Ok((Tensor::from_cl(y, x[0].dtype(), shape, x[0].device()), vec![]));
        }
        // Seen as (outer, dim, inner), each part is a run in every outer row.
        let inner: usize = shape[dim + 1..].iter().product();
        let row = total * inner;
        dispatch!("concat", x[0].dtype(), T => {
            let mut out = x[0].device().host().buffer::<T>(shape.numel())?;
            let mut from = 0;
            for part in x {
                let len = part.dims()[dim] * inner;
                let part = compute::contiguous(part)?;
                if len > 0 {
                    for (out, part) in out.chunks_mut(row).zip(part.elements::<T>()?.chunks(len)) {
                        out[from..from + len].copy_from_slice(part);
                    }
                }
                from += len;
            }
            Ok((Tensor::from_buffer(out, shape, x[0].device()), vec![]))
        })
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        need: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut from = 0;
        let mut part = |(x, &need): (&&Tensor, &bool)| {
            let to = from + x.dims()[self.dim];
            let range = std::mem::replace(&mut from, to)..to;
            need.then(|| dy.slice(self.dim, range)).transpose()
        };
        x.iter().zip(need).map(&mut part).collect()
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    fn runs_on_opencl(&self, _: &[&Tensor]) -> bool {
        true
    }
}

impl Tensor {
    /// The tensors one after another along dimension `dim`; their other dimensions must agree.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![1f32, 2.0], [1, 2], &Device::cpu())?;
    /// assert_eq!(Tensor::concat(&[&x, &x], 0)?.dims(), [2, 2]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    pub fn concat(tensors: &[&Tensor], dim: usize) -> Result<Tensor> {
        if tensors.is_empty() {
            return Err(Error::shape("concat", "there is nothing to put together"));
        }
        apply(Concat { dim }, tensors)
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    vec![
        Case::new(
            "concat",
            &["a b d", "a c d"],
            |x| Tensor::concat(x, 1),
            |x| {
                let (b, c) = (x[0].dims[1], x[1].dims[1]);
                Naive::build(&[x[0].dims[0], b + c, x[0].dims[2]], |i| match i[1].checked_sub(b) {
                    None => x[0].at(i),
                    Some(j) => x[1].at(&[i[0], j, i[2]]),
                })
            },
        ),
        Case::new(
            "concat with itself",
            &["a b"],
            |x| Tensor::concat(&[x[0], x[0]], 0),
            |x| {
                let a = x[0].dims[0];
                Naive::build(&[2 * a, x[0].dims[1]], |i| x[0].at(&[i[0] % a, i[1]]))
            },
        ),
    ]
}
