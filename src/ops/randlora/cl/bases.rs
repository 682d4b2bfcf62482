//! The shared bases on an OpenCL device.

use std::sync::Arc;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::opencl;
use crate::opencl::gemm::{Stored, pack};
use crate::opencl::runtime::ClBuffer;
use crate::ops::randlora::bases::{Bases, Structure};
use crate::shape::{Layout, Shape};
use crate::tensor::Tensor;

/// Bases on a device, B of −v, 0 and v in two bits an entry.
#[derive(Clone, Debug)]
pub(in crate::ops::randlora) struct ClBases {
    pub(in crate::ops::randlora) a: Tensor,
    /// B as a matrix, D×N·r or D×r, with `layout` counting its entries.
    pub(super) b: Arc<ClBuffer>,
    pub(super) layout: Layout,
    pub(super) stored: Stored,
    /// What the entries are multiplied by.
    pub(super) value: f64,
}

impl ClBases {
    pub(in crate::ops::randlora) fn of(bases: &Bases, device: &Device) -> Result<ClBases> {
        let (a, b) = (bases.a().moved(device)?, bases.b()?);
        let runtime = device.runtime().ok_or_else(|| Error::opencl("bases", "this is no OpenCL device"))?;
        let (rows, width) = (b.dims()[0], b.dims()[1..].iter().product());
        let elements = b.elements::<f32>()?;
        let (data, stored, row, value) = match signs(elements) {
            Some((value, signs)) if bases.structure() == Structure::Dense => {
                let packed = opencl::upload_words(runtime, pack(signs, width).into_iter())?;
                (packed, Stored::Ternary, width.next_multiple_of(16), value)
            }
            _ => (opencl::upload(runtime, elements)?, Stored::F32, width, 1.0),
        };
        let layout = Layout::contiguous(Shape::new(&[rows, row])?).slice(1, 0..width)?;
        Ok(ClBases { a, b: Arc::new(data), layout, stored, value })
    }
}

/// The one value v of a matrix of −v, 0 and v, and the signs; None for others.
fn signs(elements: &[f32]) -> Option<(f64, impl ExactSizeIterator<Item = i8>)> {
    let value = elements.iter().find(|&&x| x != 0.0)?.abs();
    let is = |&x: &f32| x == 0.0 || x.abs() == value;
    let signs = elements.iter().map(|&x| if x == 0.0 { 0 } else { x.signum() as i8 });
    elements.iter().all(is).then_some((value.into(), signs))
}
