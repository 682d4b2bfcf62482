//! The same numbers in another shape or order: views, none of which copies if it can be helped.

use std::ops::Range;

use crate::compute;
use crate::cpu::dispatch;
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl::elementwise;
use crate::shape::{IntoShape, Shape};
use crate::tensor::Tensor;

/// A view and the way back: dy is looked at the way x was.
///
/// | y | dx |
/// |---|---|
/// | x under another shape | dy under x's shape |
/// | dimension i is x's order[i] | dimension order[i] is dy's i |
/// | x repeated along some dimensions | dy summed over them (by the engine) |
/// | a part of x along one dimension | dy there, 0 elsewhere |
#[derive(Debug)]
enum View {
    Reshape(Shape),
    Permute(Vec<usize>),
    BroadcastTo(Shape),
    Slice(usize, Range<usize>),
}

impl Op for View {
    fn name(&self) -> &'static str {
        match self {
            View::Reshape(_) => "reshape",
            View::Permute(_) => "permute",
            View::BroadcastTo(_) => "broadcast_to",
            View::Slice(..) => "slice",
        }
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let layout = x[0].layout();
        let y = match self {
            View::Reshape(shape) => compute::reshape(x[0], *shape)?,
            View::Permute(order) => x[0].with_layout(layout.permute(order)?),
            View::BroadcastTo(shape) => x[0].with_layout(layout.broadcast_to(shape, "broadcast_to")?),
            View::Slice(dim, range) => x[0].with_layout(layout.slice(*dim, range.clone())?),
        };
        Ok((y, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let dx = match self {
            View::Reshape(_) => compute::reshape(dy, *x[0].shape())?,
            View::Permute(order) => {
                let mut back = vec![0; order.len()];
                order.iter().enumerate().for_each(|(i, &d)| back[d] = i);
                dy.with_layout(dy.layout().permute(&back)?)
            }
            View::BroadcastTo(_) => dy.clone(),
            View::Slice(dim, range) => put(dy, x[0].shape(), *dim, range)?,
        };
        Ok(vec![Some(dx)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    /// Views are there for any type; the zeros around a part are made in f32.
    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        !matches!(self, View::Slice(..)) || compute::all_f32(x)
    }
}

/// Zeros of the given shape with `dy` at `range` of dimension `dim`.
fn put(dy: &Tensor, shape: &Shape, dim: usize, range: &Range<usize>) -> Result<Tensor> {
    // Seen as (outer, dim, inner), the part is a run in each outer row.
    let inner: usize = shape[dim + 1..].iter().product();
    let (row, from, len) = (shape[dim] * inner, range.start * inner, range.len() * inner);
    if dy.is_on_opencl() {
        let out = elementwise::put(dy.cl()?, shape, dim, range.clone())?;
        return Ok(Tensor::from_cl(out, dy.dtype(), *shape, dy.device()));
    }
    let dy = compute::contiguous(dy)?;
    dispatch!("slice", dy.dtype(), T => {
        let mut out = dy.device().host().buffer::<T>(shape.numel())?;
        out.fill(0.0);
        if len > 0 {
            for (out, dy) in out.chunks_mut(row).zip(dy.elements::<T>()?.chunks(len)) {
                out[from..from + len].copy_from_slice(dy);
            }
        }
        Ok(Tensor::from_buffer(out, *shape, dy.device()))
    })
}

/// The elements one after another in memory. dx = dy.
#[derive(Debug)]
struct Contiguous;

impl Op for Contiguous {
    fn name(&self) -> &'static str {
        "contiguous"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((compute::contiguous(x[0])?, vec![]))
    }

    fn vjp(
        &self,
        _: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dy.clone())])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    fn runs_on_opencl(&self, _: &[&Tensor]) -> bool {
        true
    }
}

impl Tensor {
    /// The same elements in the same order under another shape. Copies only where the elements
    /// are so scattered that no strides describe the new shape.
    ///
    /// # Errors
    /// [`Error::Shape`] where the number of elements differs.
    pub fn reshape(&self, shape: impl IntoShape) -> Result<Tensor> {
        apply(View::Reshape(shape.into_shape()?), &[self])
    }

    /// Dimension i of the result is dimension `order[i]`. A view.
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        apply(View::Permute(order.to_vec()), &[self])
    }

    /// Two dimensions swapped. A view.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Tensor> {
        let (a, b) = (self.shape().check_dim(a, "transpose")?, self.shape().check_dim(b, "transpose")?);
        let mut order: Vec<usize> = (0..self.rank()).collect();
        order.swap(a, b);
        self.permute(&order)
    }

    /// The last two dimensions swapped. A view.
    pub fn t(&self) -> Result<Tensor> {
        match self.rank() {
            rank @ 2.. => self.transpose(rank - 2, rank - 1),
            _ => Err(Error::shape("t", format!("{} has no two dimensions to swap", self.shape()))),
        }
    }

    /// The elements repeated to fill a larger shape; see [`Shape::broadcast`]. A view.
    pub fn broadcast_to(&self, shape: impl IntoShape) -> Result<Tensor> {
        apply(View::BroadcastTo(shape.into_shape()?), &[self])
    }

    /// The part `range` of a dimension. A view.
    ///
    /// ```
    /// # use randlora::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::cpu())?;
    /// assert_eq!(x.slice(1, 1..3)?.to_vec::<f32>()?, [2.0, 3.0, 5.0, 6.0]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    pub fn slice(&self, dim: usize, range: Range<usize>) -> Result<Tensor> {
        apply(View::Slice(dim, range), &[self])
    }

    /// Part `index` of a dimension, which is gone from the result. A view.
    pub fn select(&self, dim: usize, index: usize) -> Result<Tensor> {
        let size = self.dims()[self.shape().check_dim(dim, "select")?];
        if index >= size {
            return Err(Error::Index { op: "select", index, size });
        }
        self.slice(dim, index..index + 1)?.squeeze(dim)
    }

    /// Without a dimension of size 1.
    pub fn squeeze(&self, dim: usize) -> Result<Tensor> {
        self.shape().check_dim(dim, "squeeze")?;
        let mut dims = self.dims().to_vec();
        if dims.remove(dim) != 1 {
            return Err(Error::shape("squeeze", format!("dimension {dim} of {} is not 1", self.shape())));
        }
        self.reshape(dims)
    }

    /// With a new dimension of size 1 before dimension `dim`.
    pub fn unsqueeze(&self, dim: usize) -> Result<Tensor> {
        let mut dims = self.dims().to_vec();
        if dim > dims.len() {
            return Err(Error::shape("unsqueeze", format!("{} has no place {dim}", self.shape())));
        }
        dims.insert(dim, 1);
        self.reshape(dims)
    }

    /// The same tensor with its elements one after another in memory.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() { Ok(self.clone()) } else { apply(Contiguous, &[self]) }
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    let permuted = |x: &Naive| {
        let d = &x.dims;
        Naive::build(&[d[2], d[0], d[1]], |i| x.at(&[i[1], i[2], i[0]]))
    };
    vec![
        Case::new(
            "reshape",
            &["a b c"],
            |x| x[0].reshape([x[0].dims()[0] * x[0].dims()[1], x[0].dims()[2]]),
            |x| Naive { dims: vec![x[0].dims[0] * x[0].dims[1], x[0].dims[2]], data: x[0].data.clone() },
        ),
        Case::new(
            "reshape, flat",
            &["a b c"],
            |x| x[0].reshape([x[0].numel()]),
            |x| Naive { dims: vec![x[0].data.len()], data: x[0].data.clone() },
        ),
        Case::new("permute", &["a b c"], |x| x[0].permute(&[2, 0, 1]), move |x| permuted(&x[0])),
        Case::new(
            "t",
            &["a b c"],
            |x| x[0].t(),
            |x| Naive::build(&[x[0].dims[0], x[0].dims[2], x[0].dims[1]], |i| x[0].at(&[i[0], i[2], i[1]])),
        ),
        Case::new(
            "broadcast_to",
            &["b 1"],
            |x| x[0].broadcast_to([3, x[0].dims()[0], 2]),
            |x| Naive::build(&[3, x[0].dims[0], 2], |i| x[0].at(i)),
        ),
        Case::new(
            "slice",
            &["a b c"],
            |x| x[0].slice(1, x[0].dims()[1] / 3..x[0].dims()[1].div_ceil(2)),
            |x| {
                let (from, to) = (x[0].dims[1] / 3, x[0].dims[1].div_ceil(2));
                Naive::build(&[x[0].dims[0], to - from, x[0].dims[2]], |i| {
                    x[0].at(&[i[0], i[1] + from, i[2]])
                })
            },
        ),
        Case::new(
            "select",
            &["a b c"],
            |x| x[0].select(2, x[0].dims()[2] / 2),
            |x| Naive::build(&[x[0].dims[0], x[0].dims[1]], |i| x[0].at(&[i[0], i[1], x[0].dims[2] / 2])),
        )
        .at_least(1),
        Case::new(
            "contiguous",
            &["a b"],
            |x| x[0].t()?.contiguous(),
            |x| Naive::build(&[x[0].dims[1], x[0].dims[0]], |i| x[0].at(&[i[1], i[0]])),
        ),
        Case::new(
            "unsqueeze",
            &["a b"],
            |x| x[0].unsqueeze(1)?.unsqueeze(3),
            |x| Naive { dims: vec![x[0].dims[0], 1, x[0].dims[1], 1], data: x[0].data.clone() },
        ),
    ]
}

#[cfg(test)]
mod tests {
    use crate::{DType, Device, Tensor};

    #[test]
    fn a_place_that_is_not_there_is_an_error_however_large() {
        let x = Tensor::zeros([2, 3], DType::F64, &Device::cpu()).unwrap();
        for (dim, index) in [(0, 2), (1, usize::MAX), (2, 0), (usize::MAX, usize::MAX)] {
            assert!(x.select(dim, index).is_err());
        }
        assert!(x.unsqueeze(usize::MAX).is_err() && x.squeeze(usize::MAX).is_err());
    }
}
