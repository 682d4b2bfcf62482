//! Kernels on an OpenCL device: buffers in, buffers out, in f32. Nothing here knows of graphs.
//!
//! A file here launches the kernels of one file in `kernels/`, by their names and with their arguments in
//! order. What they compute is said there; how to derive it in `ops`, which choose between these and
//! those of `cpu`.

pub(crate) mod attention;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod gemm;
pub(crate) mod index;
pub(crate) mod loss;
pub(crate) mod norm;
pub(crate) mod optim;
pub(crate) mod randlora;
pub(crate) mod reduce;
pub(crate) mod runtime;
pub(crate) mod softmax;
#[cfg(all(test, feature = "opencl"))]
pub(crate) mod tests;

use std::sync::Arc;

use crate::dtype::Element;
use crate::error::Result;
use crate::shape::Layout;
use crate::storage::bytes_of;
use runtime::{Arg, ClBuffer, Runtime};

/// A buffer and how elements lie in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a ClBuffer,
    pub(crate) layout: &'a Layout,
}

impl<'a> View<'a> {
    fn runtime(&self) -> &'a Arc<Runtime> {
        self.data.runtime()
    }

    fn numel(&self) -> usize {
        self.layout.shape().numel()
    }

    /// The arguments for a kernel that takes any layout and elements in order.
    fn strided(&self) -> [Arg<'a>; 2] {
        [Arg::Buffer(self.data), Arg::Walk(self.layout)]
    }

    /// The arguments for a kernel that asks for strides by dimension.
    fn by_dimension(&self) -> [Arg<'a>; 2] {
        [Arg::Buffer(self.data), Arg::Layout(self.layout)]
    }

    /// The arguments for a kernel that takes elements one after another.
    fn in_order(&self) -> [Arg<'a>; 2] {
        debug_assert!(self.layout.is_contiguous());
        [Arg::Buffer(self.data), Arg::Size(self.layout.offset())]
    }
}

/// A buffer for so many f32.
pub(crate) fn floats(runtime: &Arc<Runtime>, n: usize) -> Result<ClBuffer> {
    runtime.buffer(n.saturating_mul(size_of::<f32>()))
}

/// The elements on the device.
pub(crate) fn upload<T: Element>(runtime: &Arc<Runtime>, elements: &[T]) -> Result<ClBuffer> {
    runtime.upload(bytes_of(elements))
}

/// Words on the device: indices, or what is packed into bits.
pub(crate) fn upload_words(runtime: &Arc<Runtime>, words: impl Iterator<Item = u32>) -> Result<ClBuffer> {
    runtime.upload(&words.flat_map(u32::to_ne_bytes).collect::<Vec<_>>())
}
