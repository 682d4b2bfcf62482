//! The memory behind a tensor.

use crate::device::{Buffer, Pooled};
use crate::dtype::{BF16, F16};

/// A buffer of elements. Shared by all views of it.
#[derive(Debug)]
pub(crate) enum Storage {
    F32(Buffer<f32>),
    F64(Buffer<f64>),
    BF16(Buffer<BF16>),
    F16(Buffer<F16>),
    /// A value that was not kept after forward: it has a shape and no data.
    Ghost,
}

/// An element that storage knows how to hold.
pub(crate) trait Stored: Pooled {
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
                if let Storage::$variant(b) = storage { Some(b) } else { None }
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
