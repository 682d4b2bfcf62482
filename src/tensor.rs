//! Tensors: making them, reading them, viewing them. No arithmetic, no graph.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::cpu::elementwise::{self, View};
use crate::device::{Buffer, Device};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::opencl::runtime::ClBuffer;
use crate::opencl::{self, View as ClView};
use crate::shape::{IntoShape, Layout, Shape};
use crate::storage::{Mapped, Storage, Stored, bytes_of_mut, dispatch_stored};

/// An n-dimensional array of numbers. Cheap to clone, immutable once made, `Send` and `Sync`.
///
/// A tensor may be *tracked*: then it knows which operation made it from which others, and
/// [`backward`](Tensor::backward) can follow that way to the leaves.
///
/// ```
/// use randlora::{Device, Tensor};
///
/// let device = Device::cpu();
/// let x = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0], [2, 2], &device)?;
/// let y = x.matmul(&x)?.add(&x.t()?)?;
/// assert_eq!(y.to_vec::<f32>()?, [8.0, 13.0, 17.0, 26.0]);
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    storage: Arc<Storage>,
    layout: Layout,
    dtype: DType,
    device: Device,
    history: Option<History>,
}

/// What the graph (see `grad`) attaches to a tensor. Opaque here: tensors come before graphs.
pub(crate) type History = Arc<dyn Any + Send + Sync>;

impl Tensor {
    /// The elements of `data`, in the order of `shape` with the last dimension varying fastest.
    ///
    /// # Errors
    /// [`Error::Shape`] where the number of elements differs from the shape's.
    pub fn from_vec<T: Element>(data: Vec<T>, shape: impl IntoShape, device: &Device) -> Result<Tensor> {
        let shape = shape.into_shape()?;
        if shape.numel() != data.len() {
            let message = format!("{} elements do not fill {shape}, which has {}", data.len(), shape.numel());
            return Err(Error::shape("from_vec", message));
        }
        if let Some(runtime) = device.runtime() {
            return Ok(Tensor::from_cl(opencl::upload(runtime, &data)?, T::DTYPE, shape, device));
        }
        let mut data: Box<dyn Any> = Box::new(data);
        let storage = dispatch_stored!(T::DTYPE, S => {
            let data = data.downcast_mut::<Vec<S>>().map(std::mem::take).unwrap_or_default();
            S::wrap(device.host().adopt(data, false))
        });
        Ok(Tensor::build(storage, Layout::contiguous(shape), T::DTYPE, device))
    }

    /// The elements of a slice. See [`Tensor::from_vec`].
    pub fn from_slice<T: Element>(data: &[T], shape: impl IntoShape, device: &Device) -> Result<Tensor> {
        Tensor::from_vec(data.to_vec(), shape, device)
    }

    /// A tensor without dimensions, holding one number.
    pub fn scalar(value: f64, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::full(value, Shape::scalar(), dtype, device)
    }

    /// A tensor whose elements are all `value`.
    pub fn full(value: f64, shape: impl IntoShape, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = shape.into_shape()?;
        if let Some(runtime) = device.runtime() {
            return match dtype {
                DType::F32 => {
                    let data = opencl::elementwise::full(runtime, value as f32, shape.numel())?;
                    Ok(Tensor::from_cl(data, dtype, shape, device))
                }
                _ => Tensor::full(value, shape, dtype, &device.on_host())?.moved(device),
            };
        }
        dispatch_stored!(dtype, T => {
            let mut buffer = device.host().buffer::<T>(shape.numel())?;
            buffer.fill(T::from_f64(value));
            Ok(Tensor::from_buffer(buffer, shape, device))
        })
    }

    /// A tensor of zeros.
    pub fn zeros(shape: impl IntoShape, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::full(0.0, shape, dtype, device)
    }

    /// A tensor of ones.
    pub fn ones(shape: impl IntoShape, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::full(1.0, shape, dtype, device)
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        self.0.layout.shape()
    }

    /// The sizes of the dimensions, outermost first.
    pub fn dims(&self) -> &[usize] {
        self.shape().dims()
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape().rank()
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.shape().numel()
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Where the tensor lives.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// How the elements lie in memory.
    pub fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// Whether the elements lie one after another in memory.
    pub fn is_contiguous(&self) -> bool {
        self.0.layout.is_contiguous()
    }

    /// Whether gradients flow through this tensor.
    pub fn is_tracked(&self) -> bool {
        self.0.history.is_some()
    }

    /// The same values, cut off from the graph: the one way to stop a gradient.
    pub fn detach(&self) -> Tensor {
        if self.is_tracked() { self.with_history(None) } else { self.clone() }
    }

    /// A copy of the elements, in order.
    ///
    /// # Errors
    /// [`Error::DType`] where the tensor is of another type: cast it first.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype() {
            let message =
                format!("the tensor is {}, not {}: cast it with `to_dtype`", self.dtype(), T::DTYPE);
            return Err(Error::dtype("to_vec", message));
        }
        if self.is_on_opencl() {
            return self.on_host()?.to_vec();
        }
        let copy: Box<dyn Any> = dispatch_stored!(self.dtype(), S => {
            let x = self.view::<S>()?;
            let mut out = crate::device::fresh::<S>(self.numel())?;
            elementwise::map(x, &mut out, |v| v);
            Box::new(out)
        });
        Ok(*copy.downcast::<Vec<T>>().expect("T is the type that was dispatched on"))
    }

    /// The one element of a tensor that has just one.
    pub fn item(&self) -> Result<f64> {
        if self.numel() != 1 {
            return Err(Error::shape(
                "item",
                format!("{} holds {} elements, not one", self.shape(), self.numel()),
            ));
        }
        if self.is_on_opencl() {
            return self.on_host()?.item();
        }
        dispatch_stored!(self.dtype(), T => Ok(self.host::<T>()?[self.0.layout.offset()].to_f64()))
    }

    /// A tensor over a filled buffer.
    pub(crate) fn from_buffer<T: Stored>(buffer: Buffer<T>, shape: Shape, device: &Device) -> Tensor {
        debug_assert_eq!(buffer.len(), shape.numel());
        debug_assert!(device.runtime().is_none(), "what lies in host memory is on a host's device");
        Tensor::build(T::wrap(buffer), Layout::contiguous(shape), T::DTYPE, device)
    }

    /// A tensor whose elements stay where they lie. The shape must have as many.
    pub(crate) fn from_mapped(mapped: Mapped, dtype: DType, shape: Shape, device: &Device) -> Tensor {
        debug_assert_eq!(mapped.len(), shape.numel());
        Tensor::build(Storage::Mapped(mapped), Layout::contiguous(shape), dtype, device)
    }

    /// A tensor over a filled buffer on an OpenCL device.
    pub(crate) fn from_cl(buffer: ClBuffer, dtype: DType, shape: Shape, device: &Device) -> Tensor {
        debug_assert!(buffer.size() >= shape.numel() * dtype.size());
        Tensor::build(Storage::OpenCl(buffer), Layout::contiguous(shape), dtype, device)
    }

    /// Whether the tensor lies on an OpenCL device.
    pub(crate) fn is_on_opencl(&self) -> bool {
        self.0.device.runtime().is_some()
    }

    /// The buffer on the OpenCL device, and how the elements lie in it.
    ///
    /// # Errors
    /// [`Error::NotSaved`] for a value that was dropped after forward, [`Error::Config`] for a tensor in host
    /// memory.
    pub(crate) fn cl(&self) -> Result<ClView<'_>> {
        match &*self.0.storage {
            Storage::OpenCl(data) => Ok(ClView { data, layout: &self.0.layout }),
            Storage::Ghost => Err(Error::NotSaved { shape: *self.shape() }),
            _ => Err(Error::config("device", format!("{self:?} is on the CPU: move it with `to_device`"))),
        }
    }

    /// The same elements on another device, untracked. The tensor itself where it is there already.
    pub(crate) fn moved(&self, device: &Device) -> Result<Tensor> {
        if self.0.device.is(device) {
            return Ok(self.detach());
        }
        if matches!(*self.0.storage, Storage::Ghost) {
            return Ok(Tensor::build(Storage::Ghost, self.0.layout, self.dtype(), device));
        }
        match device.runtime() {
            None => self.on_host(),
            Some(_) if self.is_on_opencl() => self.on_host()?.moved(device),
            Some(runtime) => {
                let data = dispatch_stored!(self.dtype(), T => match self.elements::<T>() {
                    Ok(elements) => opencl::upload(runtime, elements),
                    Err(_) => opencl::upload(runtime, &self.to_vec::<T>()?),
                })?;
                Ok(Tensor::from_cl(data, self.dtype(), *self.shape(), device))
            }
        }
    }

    /// The same elements in host memory, untracked. Waits for the OpenCL device that they are on.
    pub(crate) fn on_host(&self) -> Result<Tensor> {
        let Some(runtime) = self.0.device.runtime() else { return Ok(self.detach()) };
        let view = self.cl()?;
        let (host, ordered) = (self.0.device.on_host(), self.0.layout.contiguous_range());
        dispatch_stored!(self.dtype(), T => {
            let mut data = host.host().buffer::<T>(self.numel())?;
            let bytes = bytes_of_mut(&mut data);
            match ordered {
                Some(range) => runtime.download(view.data, range.start * size_of::<T>(), bytes)?,
                None => runtime.download(&opencl::elementwise::contiguous(view, self.dtype())?, 0, bytes)?,
            }
            Ok(Tensor::from_buffer(data, *self.shape(), &host))
        })
    }

    fn build(storage: Storage, layout: Layout, dtype: DType, device: &Device) -> Tensor {
        let storage = Arc::new(storage);
        Tensor(Arc::new(Inner { storage, layout, dtype, device: device.clone(), history: None }))
    }

    /// The whole buffer behind the tensor.
    ///
    /// # Errors
    /// [`Error::NotSaved`] for a value that was dropped after forward, [`Error::DType`] for another
    /// type than `T`.
    pub(crate) fn host<T: Stored>(&self) -> Result<&[T]> {
        match T::slice(&self.0.storage) {
            Some(data) => Ok(data),
            None if matches!(*self.0.storage, Storage::Ghost) => {
                Err(Error::NotSaved { shape: *self.shape() })
            }
            None if self.is_on_opencl() => {
                let message = format!("this reads host memory, and the tensor is on {}", self.device());
                Err(Error::config("device", format!("{message}: move it with `to_device`")))
            }
            None => Err(Error::dtype("read", format!("the tensor is {}, not {}", self.dtype(), T::DTYPE))),
        }
    }

    /// The elements, by their layout.
    pub(crate) fn view<T: Stored>(&self) -> Result<View<'_, T>> {
        Ok(View { data: self.host()?, layout: &self.0.layout })
    }

    /// The elements as one slice, where they are contiguous; see `compute::contiguous`.
    pub(crate) fn elements<T: Stored>(&self) -> Result<&[T]> {
        let range = self.0.layout.contiguous_range().ok_or_else(|| {
            Error::shape("elements", format!("the elements of {} are not contiguous", self.shape()))
        })?;
        let data = self.host()?;
        Ok(if range.is_empty() { &[] } else { &data[range] })
    }

    /// The same buffer under another layout, untracked.
    pub(crate) fn with_layout(&self, layout: Layout) -> Tensor {
        debug_assert!(match &*self.0.storage {
            Storage::Ghost => true,
            Storage::OpenCl(b) => layout.end() * self.dtype().size() <= b.size(),
            Storage::F32(b) => layout.end() <= b.len(),
            Storage::F64(b) => layout.end() <= b.len(),
            Storage::BF16(b) => layout.end() <= b.len(),
            Storage::F16(b) => layout.end() <= b.len(),
            Storage::Mapped(m) => layout.end() <= m.len(),
        });
        let Inner { storage, dtype, device, .. } = &*self.0;
        Tensor(Arc::new(Inner {
            storage: storage.clone(),
            layout,
            dtype: *dtype,
            device: device.clone(),
            history: None,
        }))
    }

    /// The shape and type of this tensor without its data.
    pub(crate) fn ghost(&self) -> Tensor {
        Tensor::build(Storage::Ghost, Layout::contiguous(*self.shape()), self.dtype(), self.device())
    }

    pub(crate) fn with_history(&self, history: Option<History>) -> Tensor {
        let Inner { storage, layout, dtype, device, .. } = &*self.0;
        Tensor(Arc::new(Inner {
            storage: storage.clone(),
            layout: *layout,
            dtype: *dtype,
            device: device.clone(),
            history,
        }))
    }

    pub(crate) fn history(&self) -> Option<&History> {
        self.0.history.as_ref()
    }

    /// The buffer to write to, where nobody else can see it and it is contiguous.
    pub(crate) fn unique_mut<T: Stored>(&mut self) -> Option<&mut [T]> {
        let inner = Arc::get_mut(&mut self.0)?;
        let range = inner.layout.contiguous_range()?;
        T::slice_mut(Arc::get_mut(&mut inner.storage)?)?.get_mut(range)
    }

    /// Whether nobody else can see the buffer and the elements lie one after another: it may be written to.
    pub(crate) fn is_unique(&mut self) -> bool {
        self.is_contiguous()
            && Arc::get_mut(&mut self.0).is_some_and(|x| Arc::get_mut(&mut x.storage).is_some())
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Tensor({} {}{}",
            self.dtype(),
            self.shape(),
            if self.is_tracked() { ", tracked" } else { "" }
        )?;
        if self.numel() <= 16 {
            let values = dispatch_stored!(self.dtype(), T => {
                self.to_vec::<T>().map(|v| v.iter().map(|x| x.to_f64()).collect::<Vec<_>>())
            });
            if let Ok(values) = values {
                write!(f, ", {values:?}")?;
            }
        }
        f.write_str(")")
    }
}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Tensor>();
};
