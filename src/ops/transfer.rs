//! Tensors from one device to another.

use crate::device::Device;
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::tensor::Tensor;

/// y is x on another device; dx is dy on the way back.
#[derive(Debug)]
struct Transfer(Device);

impl Op for Transfer {
    fn name(&self) -> &'static str {
        "to_device"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((x[0].moved(&self.0)?, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dy.moved(x[0].device())?)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    fn runs_on_opencl(&self, _: &[&Tensor]) -> bool {
        true
    }
}

impl Tensor {
    /// The same elements on another device; the tensor itself where it is there already. From an OpenCL device
    /// to the CPU it waits for what is queued there.
    ///
    /// ```
    /// # use randlora::{Device, Result, Tensor};
    /// # let x = Tensor::from_vec(vec![1f32, 2.0], [2], &Device::cpu())?;
    /// if let Ok(gpu) = Device::opencl(0) {
    ///     let y = x.to_device(&gpu)?.scale(2.0)?;
    ///     assert_eq!(y.to_device(&Device::cpu())?.to_vec::<f32>()?, [2.0, 4.0]);
    /// }
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), and [`Error::OpenCl`](crate::Error::OpenCl) where the
    /// device refuses.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if self.device().is(device) { Ok(self.clone()) } else { apply(Transfer(device.clone()), &[self]) }
    }
}
