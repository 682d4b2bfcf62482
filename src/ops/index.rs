//! Elements picked by index: rows of a table, and one element for each place.

use std::sync::Arc;

use crate::compute;
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, dispatch, parallel};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::ops::linear::check_trainable;
use crate::shape::{IntoShape, Shape};
use crate::storage::{Stored, dispatch_stored};
use crate::tensor::Tensor;

/// Indices under a shape: tokens of a batch, labels, positions. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    ids: Arc<[u32]>,
    shape: Shape,
}

impl Ids {
    /// Indices in the order of `shape` with the last dimension varying fastest.
    ///
    /// # Errors
    /// [`Error::Shape`] where the number of indices differs from the shape's.
    pub fn new(ids: impl Into<Arc<[u32]>>, shape: impl IntoShape) -> Result<Ids> {
        let (ids, shape) = (ids.into(), shape.into_shape()?);
        if ids.len() != shape.numel() {
            let message = format!("{} indices do not fill {shape}, which has {}", ids.len(), shape.numel());
            return Err(Error::shape("ids", message));
        }
        Ok(Ids { ids, shape })
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The indices in order.
    pub fn as_slice(&self) -> &[u32] {
        &self.ids
    }

    /// An error if an index is not below `size`.
    fn check(&self, size: usize, op: &'static str) -> Result<()> {
        match self.ids.iter().find(|&&id| id as usize >= size) {
            Some(&id) => Err(Error::Index { op, index: id as usize, size }),
            None => Ok(()),
        }
    }
}

/// y_i = E_id(i): the rows of a table E (V×D) that the indices name.
///
/// ids: …, y: …×D. Row v of E appears in y wherever id(i) = v, so **dE_v = Σ_{i: id(i) = v} dy_i**.
#[derive(Debug)]
struct Embedding {
    ids: Ids,
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let &[rows, width] = x[0].dims() else {
            return Err(Error::shape(
                "embedding",
                format!("the table is {}, not (rows, width)", x[0].shape()),
            ));
        };
        self.ids.check(rows, "embedding")?;
        let shape = Shape::new(&[self.ids.shape.dims(), &[width]].concat())?;
        if x[0].is_on_opencl() {
            let y = opencl::index::look_up(x[0].cl()?, x[0].dtype(), &self.ids.ids)?;
            return Ok((Tensor::from_cl(y, DType::F32, shape, x[0].device()), vec![]));
        }
        let y = match x[0].dtype() {
            DType::F64 => look_up::<f64, f64>(x[0], &self.ids, shape)?,
            narrow => dispatch_stored!(narrow, S => look_up::<S, f32>(x[0], &self.ids, shape)?),
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
        let dy = compute::contiguous(dy)?;
        if dy.is_on_opencl() {
            let shape = x[0].shape();
            let Uses { starts, places } = Uses::of(&self.ids.ids, shape[0]);
            let table = opencl::index::add_rows(dy.cl()?, &starts, &places, (shape[0], shape[1]))?;
            return Ok(vec![Some(Tensor::from_cl(table, dy.dtype(), *shape, dy.device()))]);
        }
        let table = dispatch!("embedding", dy.dtype(), T => add_rows::<T>(&dy, &self.ids, *x[0].shape()))?;
        Ok(vec![Some(table)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        x[0].dtype() != DType::F64
    }
}

/// The rows of a table of any layout, widened to T.
fn look_up<S: Stored, T: Float>(table: &Tensor, ids: &Ids, shape: Shape) -> Result<Tensor> {
    let (width, layout) = (table.dims()[1], table.layout());
    let data = table.host::<S>()?;
    let mut y = table.device().host().buffer::<T>(shape.numel())?;
    parallel::rows(&mut y, width, width, &|first, out| {
        let ids = &ids.ids[first..];
        vectorize(LookUp { data, offset: layout.offset(), strides: layout.strides(), ids, width, out });
    });
    Ok(Tensor::from_buffer(y, shape, table.device()))
}

struct LookUp<'a, S, T> {
    data: &'a [S],
    offset: usize,
    strides: &'a [usize],
    ids: &'a [u32],
    width: usize,
    out: &'a mut [T],
}

impl<S: Stored, T: Float> Kernel for LookUp<'_, S, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (out, &id) in self.out.chunks_exact_mut(self.width).zip(self.ids) {
            let row = &self.data[self.offset + id as usize * self.strides[0]..];
            if self.strides[1] == 1 {
                for (out, x) in out.iter_mut().zip(row) {
                    *out = T::from_f64(x.to_f64());
                }
            } else {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = T::from_f64(row[j * self.strides[1]].to_f64());
                }
            }
        }
    }
}

/// A table of the given shape whose row v is the sum of the rows of `dy` that index v names.
fn add_rows<T: Float>(dy: &Tensor, ids: &Ids, shape: Shape) -> Result<Tensor> {
    let (rows, width) = (shape[0], shape[1]);
    let mut out = dy.device().host().buffer::<T>(shape.numel())?;
    let uses = Uses::of(&ids.ids, rows);
    let dy_data = dy.elements::<T>()?;
    let cost = width * (1 + ids.ids.len() / rows.max(1));
    // One thread sums a row, in the order of the indices: the same bits on any number of threads.
    parallel::rows(&mut out, width, cost, &|first, out| {
        vectorize(AddRows { dy: dy_data, width, uses: &uses, first, out });
    });
    Ok(Tensor::from_buffer(out, shape, dy.device()))
}

/// The places at which each index occurs, in order.
struct Uses {
    /// Index v occurs at `places[starts[v]..starts[v + 1]]`.
    starts: Vec<usize>,
    places: Vec<usize>,
}

impl Uses {
    /// A counting sort, which keeps the order of equal indices.
    fn of(ids: &[u32], size: usize) -> Uses {
        let mut starts = vec![0; size + 1];
        ids.iter().for_each(|&id| starts[id as usize + 1] += 1);
        (0..size).for_each(|v| starts[v + 1] += starts[v]);
        let (mut next, mut places) = (starts.clone(), vec![0; ids.len()]);
        for (place, &id) in ids.iter().enumerate() {
            places[next[id as usize]] = place;
            next[id as usize] += 1;
        }
        Uses { starts, places }
    }
}

struct AddRows<'a, T> {
    dy: &'a [T],
    width: usize,
    uses: &'a Uses,
    first: usize,
    out: &'a mut [T],
}

impl<T: Float> Kernel for AddRows<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (i, out) in self.out.chunks_exact_mut(self.width).enumerate() {
            let v = self.first + i;
            out.fill(T::ZERO);
            for &place in &self.uses.places[self.uses.starts[v]..self.uses.starts[v + 1]] {
                for (out, &dy) in out.iter_mut().zip(&self.dy[place * self.width..]) {
                    *out += dy;
                }
            }
        }
    }
}

/// y_ojk = x_o,id(o,j,k),k, seen as (outer, dim, inner) around the dimension `dim`.
///
/// x: o d k, ids and y: o j k. Each element of x is used once for every index that names it, so
/// **dx_oik = Σ_{j: id(o,j,k) = i} dy_ojk**.
#[derive(Debug)]
struct Gather {
    dim: usize,
    ids: Ids,
}

impl Gather {
    /// The sizes of (d, j, k).
    fn sizes(&self, x: &Shape) -> (usize, usize, usize) {
        (x[self.dim], self.ids.shape[self.dim], x[self.dim + 1..].iter().product())
    }
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (shape, ids) = (x[0].shape(), &self.ids.shape);
        shape.check_dim(self.dim, "gather")?;
        if ids.rank() != shape.rank() || shape.with_dim(self.dim, 0)? != ids.with_dim(self.dim, 0)? {
            let message =
                format!("indices {ids} must have the sizes of {shape}, but for dimension {}", self.dim);
            return Err(Error::shape("gather", message));
        }
        let (d, j, k) = self.sizes(shape);
        self.ids.check(d, "gather")?;
        let x = compute::contiguous(x[0])?;
        if x.is_on_opencl() {
            let y = opencl::index::gather(x.cl()?, &self.ids.ids, (d, j, k))?;
            return Ok((Tensor::from_cl(y, x.dtype(), *ids, x.device()), vec![]));
        }
        let y = dispatch!("gather", x.dtype(), T => {
            let data = x.elements::<T>()?;
            let mut y = x.device().host().buffer::<T>(ids.numel())?;
            parallel::rows(&mut y, k, k, &|first, y| {
                for (row, y) in (first..).zip(y.chunks_exact_mut(k)) {
                    let (from, ids) = (row / j * d, &self.ids.ids[row * k..]);
                    for (col, (y, &id)) in y.iter_mut().zip(ids).enumerate() {
                        *y = data[(from + id as usize) * k + col];
                    }
                }
            });
            Ok(Tensor::from_buffer(y, *ids, x.device()))
        })?;
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
        let (d, j, k) = self.sizes(x[0].shape());
        let dy = compute::contiguous(dy)?;
        if dy.is_on_opencl() {
            let dx = opencl::index::gather_vjp(dy.cl()?, &self.ids.ids, (d, j, k), x[0].numel())?;
            return Ok(vec![Some(Tensor::from_cl(dx, dy.dtype(), *x[0].shape(), dy.device()))]);
        }
        let dx = dispatch!("gather", dy.dtype(), T => {
            let data = dy.elements::<T>()?;
            let mut dx = dy.device().host().buffer::<T>(x[0].numel())?;
            parallel::rows(&mut dx, d * k, (d + j) * k, &|first, dx| {
                for (outer, dx) in (first..).zip(dx.chunks_exact_mut(d * k)) {
                    dx.fill(T::ZERO);
                    for at in 0..j * k {
                        let from = outer * j * k + at;
                        dx[self.ids.ids[from] as usize * k + at % k] += data[from];
                    }
                }
            });
            Ok(Tensor::from_buffer(dx, *x[0].shape(), dy.device()))
        })?;
        Ok(vec![Some(dx)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

impl Tensor {
    /// The rows of this table (V, D) that the indices name: (…, D) for indices (…). A frozen table
    /// may be stored as bf16 or f16; the result is then f32.
    ///
    /// ```
    /// # use randlora::{Device, Ids, Tensor};
    /// let table = Tensor::from_vec(vec![0f32, 1.0, 2.0, 3.0], [2, 2], &Device::cpu())?;
    /// let y = table.embedding(&Ids::new([1, 0, 1], [3])?)?;
    /// assert_eq!(y.to_vec::<f32>()?, [2.0, 3.0, 0.0, 1.0, 2.0, 3.0]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] where this is no table, [`Error::Index`] where an index is not below V,
    /// [`Error::Frozen`] where a bf16 or f16 table is tracked.
    pub fn embedding(&self, ids: &Ids) -> Result<Tensor> {
        check_trainable("embedding", self)?;
        apply(Embedding { ids: ids.clone() }, &[self])
    }

    /// For every index one element: the element of `self` at the same place, but at the index along
    /// dimension `dim`. The indices have the sizes of `self`, along `dim` any size.
    ///
    /// ```
    /// # use randlora::{Device, Ids, Tensor};
    /// let x = Tensor::from_vec(vec![0f32, 1.0, 2.0, 3.0, 4.0, 5.0], [2, 3], &Device::cpu())?;
    /// let y = x.gather(1, &Ids::new([2, 0], [2, 1])?)?;
    /// assert_eq!(y.to_vec::<f32>()?, [2.0, 3.0]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] where the sizes do not fit, [`Error::Index`] where an index is too large.
    pub fn gather(&self, dim: usize, ids: &Ids) -> Result<Tensor> {
        apply(Gather { dim, ids: ids.clone() }, &[self])
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    /// Indices below `size` with repetitions, a function of the place.
    fn pick(place: usize, size: usize) -> usize {
        (place * place + 3 * place + 1) % size
    }
    fn ids(shape: &[usize], size: usize) -> Result<Ids> {
        let n: usize = shape.iter().product();
        Ids::new((0..n).map(|i| pick(i, size) as u32).collect::<Vec<_>>(), shape)
    }
    let gather = |name, dim: usize| {
        let sizes = move |dims: &[usize]| {
            let mut sizes = dims.to_vec();
            sizes[dim] = 4;
            sizes
        };
        let run = move |x: &[&Tensor]| x[0].gather(dim, &ids(&sizes(x[0].dims()), x[0].dims()[dim])?);
        Case::new(name, &["a b c"], run, move |x| {
            let sizes = sizes(&x[0].dims);
            Naive::build(&sizes, |i| {
                let place = i.iter().zip(&sizes).fold(0, |flat, (i, d)| flat * d + i);
                let mut i = i.to_vec();
                i[dim] = pick(place, x[0].dims[dim]);
                x[0].at(&i)
            })
        })
        .at_least(1)
    };
    vec![
        Case::new(
            "embedding",
            &["v d"],
            |x| x[0].embedding(&ids(&[3, 7], x[0].dims()[0])?),
            |x| {
                Naive::build(&[3, 7, x[0].dims[1]], |i| x[0].at(&[pick(i[0] * 7 + i[1], x[0].dims[0]), i[2]]))
            },
        )
        .at_least(1),
        Case::new(
            "embedding of nothing",
            &["v d"],
            |x| x[0].embedding(&Ids::new([], [0, 2])?),
            |x| Naive { dims: vec![0, 2, x[0].dims[1]], data: vec![] },
        ),
        gather("gather, first", 0),
        gather("gather", 1),
        gather("gather, last", 2),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn a_stored_table_gives_f32_and_stays_frozen() -> Result<()> {
        let table = Tensor::from_vec(vec![0.1f64, 1.0, 2.0, -3.0], [2, 2], &Device::cpu())?;
        for dtype in [DType::BF16, DType::F16] {
            let stored = table.to_dtype(dtype)?;
            let y = stored.t()?.embedding(&Ids::new([1, 1], [2])?)?;
            let want = stored.to_dtype(DType::F32)?.t()?.slice(0, 1..2)?.to_vec::<f32>()?;
            assert_eq!(y.to_vec::<f32>()?, [&want[..], &want[..]].concat());
            let error = stored.track().embedding(&Ids::new([0], [1])?).unwrap_err();
            assert!(matches!(error, Error::Frozen { .. }), "{error}");
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_an_error() -> Result<()> {
        let x = Tensor::ones([2, 3], DType::F32, &Device::cpu())?;
        assert!(matches!(Ids::new([1, 2], [3]), Err(Error::Shape { .. })));
        assert!(matches!(x.embedding(&Ids::new([2], [1])?), Err(Error::Index { index: 2, size: 2, .. })));
        assert!(matches!(x.select(0, 0)?.embedding(&Ids::new([0], [1])?), Err(Error::Shape { .. })));
        assert!(matches!(
            x.gather(1, &Ids::new([3, 0], [2, 1])?),
            Err(Error::Index { index: 3, size: 3, .. })
        ));
        assert!(matches!(x.gather(1, &Ids::new([0], [1, 1])?), Err(Error::Shape { .. })));
        assert!(matches!(x.gather(2, &Ids::new([0, 0], [2, 1])?), Err(Error::Shape { .. })));
        assert!(matches!(x.gather(0, &Ids::new([0], [1])?), Err(Error::Shape { .. })));
        Ok(())
    }
}
