//! What a model learns.

use crate::compute;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::grad::Leaf;
use crate::nn::Context;
use crate::storage::Stored;
use crate::tensor::Tensor;

/// A value that a model learns or that it keeps frozen, and the place where its gradient is
/// collected. The place stays the same when the value changes.
///
/// A weight that is used in several places (a *tied* weight) is one parameter, owned by one module
/// and read by the others: its gradients add up by themselves.
#[derive(Debug)]
pub struct Parameter {
    value: Tensor,
    leaf: Leaf,
    trainable: bool,
}

/// A copy is a parameter of its own: it shares the value's memory until one of both is changed, and its
/// gradient is collected apart.
impl Clone for Parameter {
    fn clone(&self) -> Parameter {
        Parameter { value: self.value.clone(), leaf: Leaf::new(), trainable: self.trainable }
    }
}

impl Parameter {
    /// A parameter that is trained.
    pub fn new(value: Tensor) -> Parameter {
        Parameter { value: value.detach(), leaf: Leaf::new(), trainable: true }
    }

    /// A parameter that is not trained.
    pub fn frozen(value: Tensor) -> Parameter {
        Parameter { trainable: false, ..Parameter::new(value) }
    }

    /// The value as a forward pass reads it: a leaf of the graph if the context tracks and the
    /// parameter is trained.
    pub fn tensor(&self, ctx: &Context) -> Tensor {
        if self.trainable && ctx.tracks() { self.leaf.track(&self.value) } else { self.value.clone() }
    }

    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Where the gradient is collected.
    pub fn leaf(&self) -> &Leaf {
        &self.leaf
    }

    /// Whether it is trained.
    pub fn is_trainable(&self) -> bool {
        self.trainable
    }

    /// Trains it from now on, or freezes it.
    pub fn set_trainable(&mut self, trainable: bool) {
        self.trainable = trainable;
    }

    /// Another value of the same shape and type.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::DType`] where it differs in one.
    pub fn set(&mut self, value: Tensor) -> Result<()> {
        if value.dtype() != self.value.dtype() {
            let message = format!(
                "the parameter is {}, the value {}: cast it with `to_dtype`, or use `replace`",
                self.value.dtype(),
                value.dtype()
            );
            return Err(Error::dtype("set", message));
        }
        self.replace(value)
    }

    /// Another value of the same shape and any type: what a checkpoint holds.
    ///
    /// # Errors
    /// [`Error::Shape`] where the shape differs.
    pub fn replace(&mut self, value: Tensor) -> Result<()> {
        if value.shape() != self.value.shape() {
            let message = format!("the parameter is {}, the value {}", self.value.shape(), value.shape());
            return Err(Error::shape("set", message));
        }
        self.value = value.detach();
        Ok(())
    }

    /// Moves the value to another device.
    ///
    /// # Errors
    /// Those of [`Tensor::to_device`].
    pub fn to_device(&mut self, device: &Device) -> Result<()> {
        self.value = self.value.to_device(device)?;
        Ok(())
    }

    /// The value rounded to another type.
    ///
    /// # Errors
    /// [`Error::DType`] where a trained parameter would become a type that nothing is computed in.
    pub fn cast(&mut self, dtype: DType) -> Result<()> {
        if self.trainable && !dtype.is_compute() {
            let message = format!("{dtype} stores frozen weights only: freeze the parameter first");
            return Err(Error::dtype("cast", message));
        }
        self.value = compute::cast(&self.value, dtype)?;
        Ok(())
    }

    /// The value on its OpenCL device, to be written to by kernels: nobody else holds its buffer then.
    pub(crate) fn cl_own(&mut self) -> Result<&Tensor> {
        compute::cl_own(&mut self.value)
    }

    /// The elements to write to: in place where nobody else holds them, else in a copy.
    pub(crate) fn elements_mut<T: Stored>(&mut self) -> Result<&mut [T]> {
        compute::write(&mut self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn three() -> Tensor {
        Tensor::from_vec(vec![1f32, 2.0, 3.0], [3], &Device::cpu()).unwrap()
    }

    #[test]
    fn tracked_only_where_trained_and_wanted() {
        let mut p = Parameter::new(three());
        assert!(p.tensor(&Context::train(0, 0)).is_tracked());
        assert!(p.tensor(&Context::eval().tracked()).is_tracked());
        assert!(!p.tensor(&Context::eval()).is_tracked());
        p.set_trainable(false);
        assert!(!p.tensor(&Context::train(0, 0)).is_tracked());
    }

    #[test]
    fn a_value_must_fit() {
        let mut p = Parameter::new(three());
        let leaf = p.leaf().clone();
        p.set(three().scale(2.0).unwrap()).unwrap();
        assert_eq!((p.value().to_vec::<f32>().unwrap(), p.leaf()), (vec![2.0, 4.0, 6.0], &leaf));
        assert!(matches!(p.set(three().to_dtype(DType::F64).unwrap()), Err(Error::DType { .. })));
        p.replace(three().to_dtype(DType::F64).unwrap()).unwrap();
        assert!(matches!(p.replace(three().unsqueeze(0).unwrap()), Err(Error::Shape { .. })));
        assert!(matches!(p.cast(DType::BF16), Err(Error::DType { .. })));
        p.set_trainable(false);
        p.cast(DType::BF16).unwrap();
    }

    #[test]
    fn written_in_place_only_where_nobody_sees_it() {
        let mut p = Parameter::new(three());
        let place = p.elements_mut::<f32>().unwrap().as_ptr();
        assert_eq!(p.elements_mut::<f32>().unwrap().as_ptr(), place);
        let held = p.value().clone();
        p.elements_mut::<f32>().unwrap()[0] = 9.0;
        assert_eq!(held.to_vec::<f32>().unwrap()[0], 1.0);
        assert_eq!(p.value().to_vec::<f32>().unwrap()[0], 9.0);
        // One number repeated by a stride of 0 gets memory of its own.
        let mut p = Parameter::new(
            Tensor::zeros([1], DType::F32, &Device::cpu()).unwrap().broadcast_to([4]).unwrap(),
        );
        p.elements_mut::<f32>().unwrap()[1] = 1.0;
        assert_eq!(p.value().to_vec::<f32>().unwrap(), [0.0, 1.0, 0.0, 0.0]);
    }
}
