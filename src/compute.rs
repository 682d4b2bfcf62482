//! Kernels over tensors: the step from a tensor to the slices that the device's kernels work on.
//! Everything here returns untracked tensors; what is differentiable is said in `ops`.

use crate::cpu::elementwise::{self, View};
use crate::cpu::reduce::{self, Fold};
use crate::cpu::{Float, dispatch};
use crate::device::Device;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::opencl;
use crate::shape::{Layout, MAX_RANK, Shape};
use crate::storage::{Stored, dispatch_stored};
use crate::tensor::Tensor;

/// f of every element.
pub(crate) fn map<T: Stored, U: Stored>(x: &Tensor, f: impl Fn(T) -> U + Sync + Copy) -> Result<Tensor> {
    map_blocks(x, &elementwise::of_one(f))
}

fn map_blocks<T: Stored, U: Stored>(x: &Tensor, f: elementwise::OfOne<'_, T, U>) -> Result<Tensor> {
    let mut out = x.device().host().buffer::<U>(x.numel())?;
    elementwise::map_blocks(x.view::<T>()?, &mut out, f);
    Ok(Tensor::from_buffer(out, *x.shape(), x.device()))
}

/// f of every pair of elements, the smaller tensor broadcast.
pub(crate) fn zip<T: Float>(
    op: &'static str,
    x: &Tensor,
    y: &Tensor,
    f: impl Fn(T, T) -> T + Sync + Copy,
) -> Result<Tensor> {
    zip_blocks(op, x, y, &elementwise::of_two(f))
}

fn zip_blocks<T: Float>(
    op: &'static str,
    x: &Tensor,
    y: &Tensor,
    f: elementwise::OfTwo<'_, T>,
) -> Result<Tensor> {
    let shape = x.shape().broadcast(y.shape(), op)?;
    let (x_layout, y_layout) = (x.layout().broadcast_to(&shape, op)?, y.layout().broadcast_to(&shape, op)?);
    let mut out = x.device().host().buffer::<T>(shape.numel())?;
    let (x_view, y_view) =
        (View { data: x.host::<T>()?, layout: &x_layout }, View { data: y.host::<T>()?, layout: &y_layout });
    elementwise::zip_blocks(x_view, y_view, &mut out, f);
    Ok(Tensor::from_buffer(out, shape, x.device()))
}

/// The kernel `add`, `sub`, `mul`, `div` or `equal` of every pair of elements on an OpenCL device, the smaller
/// tensor broadcast.
pub(crate) fn cl_zip(op: &'static str, kernel: &'static str, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let shape = x.shape().broadcast(y.shape(), op)?;
    let spread = |x: &Tensor| Ok(x.with_layout(x.layout().broadcast_to(&shape, op)?));
    let (x, y) = (spread(x)?, spread(y)?);
    let out = opencl::elementwise::binary(kernel, x.cl()?, y.cl()?)?;
    Ok(Tensor::from_cl(out, x.dtype(), shape, x.device()))
}

/// c·x on an OpenCL device.
pub(crate) fn cl_scale(x: &Tensor, c: f64) -> Result<Tensor> {
    let out = opencl::elementwise::pointwise("scale_forward", x.cl()?, c)?;
    Ok(Tensor::from_cl(out, x.dtype(), *x.shape(), x.device()))
}

/// Whether all are f32: what kernels on OpenCL devices compute in.
pub(crate) fn all_f32(x: &[&Tensor]) -> bool {
    x.iter().all(|x| x.dtype() == DType::F32)
}

/// What `f` makes of the tensors in host memory, back on the device that they are on, for operations that it
/// has no kernel for. Counted under the name `op`.
pub(crate) fn through_host(
    op: &'static str,
    device: &Device,
    x: &[&Tensor],
    f: impl FnOnce(&[Tensor]) -> Result<Vec<Option<Tensor>>>,
) -> Result<Vec<Option<Tensor>>> {
    device.count_round_trip(op)?;
    let host = device.on_host();
    let x = x.iter().map(|x| x.moved(&host)).collect::<Result<Vec<_>>>()?;
    f(&x)?.into_iter().map(|y| y.map(|y| y.moved(device)).transpose()).collect()
}

/// [`through_host`] for one result.
fn one_through_host(
    op: &'static str,
    x: &[&Tensor],
    f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Result<Tensor> {
    let found = through_host(op, x[0].device(), x, |x| Ok(vec![Some(f(x)?)]))?;
    found.into_iter().flatten().next().ok_or_else(|| Error::opencl(op, "nothing came back"))
}

/// The type of both, or an error that names the cast to make.
pub(crate) fn same_dtype(op: &'static str, x: &Tensor, y: &Tensor) -> Result<DType> {
    if x.dtype() != y.dtype() {
        let message = format!("{} and {} do not mix: cast one with `to_dtype`", x.dtype(), y.dtype());
        return Err(Error::dtype(op, message));
    }
    Ok(x.dtype())
}

/// The fold over the dimensions in `dims`, which stay with size 1.
pub(crate) fn fold<T: Float>(x: &Tensor, dims: &[usize], by: impl Fold<T>) -> Result<Tensor> {
    let rank = x.rank();
    let mut order: Vec<usize> = (0..rank).filter(|d| !dims.contains(d)).collect();
    let kept = order.len();
    order.extend((0..rank).filter(|d| dims.contains(d)));
    let mut shape = *x.shape();
    for &dim in dims {
        shape = shape.with_dim(dim, 1)?;
    }
    let layout = x.layout().permute(&order)?;
    let mut out = x.device().host().buffer::<T>(shape.numel())?;
    reduce::fold(View { data: x.host::<T>()?, layout: &layout }, kept, &mut out, by);
    Ok(Tensor::from_buffer(out, shape, x.device()))
}

/// The sum over the dimensions in `dims`, which stay with size 1.
fn sum(op: &'static str, x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    match (x.is_on_opencl(), x.dtype()) {
        (false, dtype) => dispatch!(op, dtype, T => fold::<T>(x, dims, reduce::Sum)),
        (true, DType::F32) => cl_sum(x, dims, 1.0),
        (true, _) => one_through_host(op, &[x], |x| sum(op, &x[0], dims)),
    }
}

/// `factor` times the sum over the dimensions in `dims`, which stay with size 1, on an OpenCL device.
pub(crate) fn cl_sum(x: &Tensor, dims: &[usize], factor: f64) -> Result<Tensor> {
    let shape = dims.iter().try_fold(*x.shape(), |shape, &dim| shape.with_dim(dim, 1))?;
    let out = opencl::reduce::sum(x.cl()?, dims, factor)?;
    Ok(Tensor::from_cl(out, x.dtype(), shape, x.device()))
}

/// `x` summed over the dimensions along which `shape` was broadcast to x's shape. A gradient that
/// is itself still broadcast (smaller than `shape`) is spread out.
pub(crate) fn sum_to(x: &Tensor, shape: &Shape) -> Result<Tensor> {
    if x.shape() == shape {
        return Ok(x.clone());
    }
    if x.shape().broadcasts_to(shape) {
        return Ok(x.with_layout(x.layout().broadcast_to(shape, "gradient")?));
    }
    if !shape.broadcasts_to(x.shape()) {
        return Err(Error::shape("gradient", format!("{} does not sum to {shape}", x.shape())));
    }
    let extra = x.rank() - shape.rank();
    let dims: Vec<usize> =
        (0..x.rank()).filter(|&d| d < extra || (shape[d - extra] == 1 && x.dims()[d] != 1)).collect();
    reshape(&sum("gradient", x, &dims)?, *shape)
}

/// The same elements under another shape: a view where the layout allows it.
pub(crate) fn reshape(x: &Tensor, shape: Shape) -> Result<Tensor> {
    if x.numel() != shape.numel() {
        let message = format!("{} has {} elements, {shape} has {}", x.shape(), x.numel(), shape.numel());
        return Err(Error::shape("reshape", message));
    }
    match x.layout().reshape(&shape) {
        Some(layout) => Ok(x.with_layout(layout)),
        None => reshape(&contiguous(x)?, shape),
    }
}

/// All dimensions but the last made into one: a matrix of rows. A vector is one row.
pub(crate) fn rows(x: &Tensor) -> Result<Tensor> {
    let (&width, outer) = x.dims().split_last().unwrap_or((&1, &[]));
    reshape(x, Shape::new(&[outer.iter().product(), width])?)
}

/// The same tensor with its elements one after another.
pub(crate) fn contiguous(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() {
        return Ok(x.detach());
    }
    if x.is_on_opencl() {
        return cl_copy(x);
    }
    dispatch_stored!(x.dtype(), T => map::<T, T>(x, |v| v))
}

/// A copy with its elements one after another on the same OpenCL device.
fn cl_copy(x: &Tensor) -> Result<Tensor> {
    let out = opencl::elementwise::contiguous(x.cl()?, x.dtype())?;
    Ok(Tensor::from_cl(out, x.dtype(), *x.shape(), x.device()))
}

/// The last two dimensions swapped.
pub(crate) fn transpose(x: &Tensor) -> Result<Tensor> {
    let rank = x.rank();
    if rank < 2 {
        return Err(Error::shape("t", format!("{} has no two dimensions to swap", x.shape())));
    }
    let mut order = [0, 1, 2, 3, 4, 5, 6, 7];
    const { assert!(MAX_RANK == 8) };
    order.swap(rank - 1, rank - 2);
    Ok(x.with_layout(x.layout().permute(&order[..rank])?))
}

/// The elements rounded to another type.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.detach());
    }
    match (x.dtype(), dtype) {
        (DType::BF16 | DType::F16, DType::F32) if x.is_on_opencl() => cl_widen(x),
        _ if x.is_on_opencl() => one_through_host("to_dtype", &[x], |x| cast(&x[0], dtype)),
        // The narrow types' way to f32 vectorises.
        (DType::BF16, DType::F32) => map::<crate::dtype::BF16, f32>(x, |v| v.to_f32()),
        (DType::F16, DType::F32) => map::<crate::dtype::F16, f32>(x, |v| v.to_f32()),
        _ => {
            dispatch_stored!(x.dtype(), T => dispatch_stored!(dtype, U => map::<T, U>(x, |v| U::from_f64(v.to_f64()))))
        }
    }
}

/// The elements of a narrow type as f32 on an OpenCL device.
fn cl_widen(x: &Tensor) -> Result<Tensor> {
    let (view, layout) = (x.cl()?, Layout::contiguous(*x.shape()));
    let out = opencl::floats(view.data.runtime(), x.numel())?;
    opencl::elementwise::widen(view, x.dtype(), &out, &layout)?;
    Ok(Tensor::from_cl(out, DType::F32, *x.shape(), x.device()))
}

/// a + x, in a's own memory where nobody else can see it.
pub(crate) fn accumulate(mut a: Tensor, x: &Tensor) -> Result<Tensor> {
    if a.shape() != x.shape() {
        return Err(Error::shape("gradient", format!("{} and {} are not of one leaf", a.shape(), x.shape())));
    }
    if a.is_on_opencl() {
        return match a.dtype() {
            DType::F32 if a.is_unique() => {
                opencl::elementwise::add_in_place(a.cl()?, x.cl()?)?;
                Ok(a)
            }
            DType::F32 => cl_zip("gradient", "add", &a, x),
            _ => one_through_host("gradient", &[&a, x], |both| accumulate(both[0].clone(), &both[1])),
        };
    }
    dispatch!("gradient", a.dtype(), T => {
        match a.unique_mut::<T>() {
            Some(sum) => {
                elementwise::add_assign(sum, x.view::<T>()?);
                Ok(a)
            }
            None => zip::<T>("gradient", &a, x, |a, x| a + x),
        }
    })
}

/// The elements to write to: in place where nobody else holds them, else in a copy.
pub(crate) fn write<T: Stored>(x: &mut Tensor) -> Result<&mut [T]> {
    if x.unique_mut::<T>().is_none() {
        *x = map::<T, T>(x, |v| v)?;
    }
    Ok(x.unique_mut::<T>().expect("a fresh copy is nobody else's"))
}

/// Makes sure that nobody else holds the buffer on the OpenCL device, by a copy where somebody does: kernels
/// may write to it then.
pub(crate) fn cl_own(x: &mut Tensor) -> Result<&Tensor> {
    if !x.is_unique() {
        *x = cl_copy(x)?;
    }
    Ok(x)
}

/// Multiplies all elements on the OpenCL device by `factor`, in place where nobody else holds them.
pub(crate) fn cl_scale_own(x: &mut Tensor, factor: f64) -> Result<()> {
    if x.dtype() == DType::F32 {
        return opencl::elementwise::scale_in_place(cl_own(x)?.cl()?, factor);
    }
    *x = one_through_host(
        "gradient",
        &[x],
        |x| dispatch!("gradient", x[0].dtype(), T => map::<T, T>(&x[0], |v| v * T::from_f64(factor))),
    )?;
    Ok(())
}
