//! Numbers rounded to another type.

use crate::compute;
use crate::dtype::DType;
use crate::error::Result;
use crate::grad::{Op, Saves, apply};
use crate::tensor::Tensor;

/// y is x rounded to another type; dx is dy rounded back.
#[derive(Debug)]
struct Cast(DType);

impl Op for Cast {
    fn name(&self) -> &'static str {
        "to_dtype"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((compute::cast(x[0], self.0)?, vec![]))
    }

    fn vjp(
        &self,
        x: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(compute::cast(dy, x[0].dtype())?)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    /// Widening to f32 has a kernel; for the rest [`compute::cast`] itself goes through the host.
    fn runs_on_opencl(&self, _: &[&Tensor]) -> bool {
        true
    }
}

impl Tensor {
    /// The elements as another type, rounded to nearest even.
    ///
    /// ```
    /// # use randlora::{DType, Device, Tensor};
    /// let x = Tensor::from_vec(vec![1.0f32, 0.3], [2], &Device::cpu())?;
    /// let stored = x.to_dtype(DType::BF16)?;
    /// assert_eq!(stored.to_dtype(DType::F32)?.to_vec::<f32>()?, [1.0, 0.30078125]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() { Ok(self.clone()) } else { apply(Cast(dtype), &[self]) }
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    let identity = |x: &[Naive]| x[0].clone();
    vec![Case::new("to_dtype", &["a b"], |x| x[0].to_dtype(DType::F64)?.to_dtype(x[0].dtype()), identity)]
}
