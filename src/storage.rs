//! The memory behind a tensor.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::device::{Buffer, Pooled};
use crate::dtype::{BF16, DType, Element, F16};
use crate::opencl::runtime::ClBuffer;

/// A buffer of elements. Shared by all views of it.
#[derive(Debug)]
pub(crate) enum Storage {
    F32(Buffer<f32>),
    F64(Buffer<f64>),
    BF16(Buffer<BF16>),
    F16(Buffer<F16>),
    Mapped(Mapped),
    OpenCl(ClBuffer),
    /// A value that was not kept after forward: it has a shape and no data.
    Ghost,
}

/// Bytes that somebody else keeps in memory: a mapped file.
pub(crate) type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Elements within such bytes. They are read where they lie and never written.
pub(crate) struct Mapped {
    bytes: Bytes,
    range: Range<usize>,
    dtype: DType,
}

impl Mapped {
    /// None where the elements cannot be read in place: bytes in the wrong order or place.
    pub(crate) fn new(bytes: Bytes, range: Range<usize>, dtype: DType) -> Option<Mapped> {
        let slice = (*bytes).as_ref().get(range.clone())?;
        let fits = slice.len() % dtype.size() == 0 && slice.as_ptr().addr() % dtype.size() == 0;
        (fits && cfg!(target_endian = "little")).then_some(Mapped { bytes, range, dtype })
    }

    /// The number of elements.
    pub(crate) fn len(&self) -> usize {
        self.range.len() / self.dtype.size()
    }

    fn elements<T: Element>(&self) -> Option<&[T]> {
        if T::DTYPE != self.dtype {
            return None;
        }
        let bytes = &(*self.bytes).as_ref()[self.range.clone()];
        // SAFETY: every pattern of bits is an f32, f64, u16 or a `repr(transparent)` wrapper of one,
        // the only types that implement the sealed trait `Element`.
        let (before, elements, after) = unsafe { bytes.align_to::<T>() };
        (before.is_empty() && after.is_empty()).then_some(elements)
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({} × {})", self.len(), self.dtype)
    }
}

/// The bytes that the elements are made of, in the machine's order.
pub(crate) fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: elements (see `Mapped::elements`) have no padding, and any byte is a u8.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// [`bytes_of`] to be written to.
pub(crate) fn bytes_of_mut<T: Element>(elements: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every pattern of bits is an element.
    unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), size_of_val(elements)) }
}

/// An element that storage knows how to hold.
pub(crate) trait Stored: Element + Pooled {
    fn wrap(buffer: Buffer<Self>) -> Storage;
    fn slice(storage: &Storage) -> Option<&[Self]>;
    fn slice_mut(storage: &mut Storage) -> Option<&mut [Self]>;
}

macro_rules! stored {
    ($($T:ty => $variant:ident),*) => {$(
        impl Stored for $T {
            fn wrap(buffer: Buffer<$T>) -> Storage {
                Storage::$variant(buffer)
            }
            fn slice(storage: &Storage) -> Option<&[$T]> {
                match storage {
                    Storage::$variant(b) => Some(b),
                    Storage::Mapped(m) => m.elements(),
                    _ => None,
                }
            }
            fn slice_mut(storage: &mut Storage) -> Option<&mut [$T]> {
                if let Storage::$variant(b) = storage { Some(b) } else { None }
            }
        }
    )*};
}
stored!(f32 => F32, f64 => F64, BF16 => BF16, F16 => F16);

/// Runs `$body` with `$T` standing for the stored type `$dtype`, whichever it is.
macro_rules! dispatch_stored {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::dtype::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::dtype::DType::BF16 => {
                type $T = $crate::dtype::BF16;
                $body
            }
            $crate::dtype::DType::F16 => {
                type $T = $crate::dtype::F16;
                $body
            }
        }
    };
}
pub(crate) use dispatch_stored;
