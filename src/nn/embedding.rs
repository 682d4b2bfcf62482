//! Rows of a learned table.

use crate::error::{Error, Result};
use crate::nn::{Context, Init, Parameter};
use crate::ops::index::Ids;
use crate::tensor::Tensor;

/// A vector for each index: of a token, a position, a segment. See [`Tensor::embedding`].
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Parameter,
}
crate::module!(Embedding { weight });

impl Embedding {
    /// A table (count, width).
    ///
    /// # Errors
    /// [`Error::Shape`] where it is no matrix.
    pub fn new(weight: Parameter) -> Result<Embedding> {
        match weight.value().rank() {
            2 => Ok(Embedding { weight }),
            _ => Err(Error::shape(
                "embedding",
                format!("the table is {}, not (count, width)", weight.value().shape()),
            )),
        }
    }

    /// A table of `count` normal rows.
    pub fn init(init: &Init, count: usize, width: usize, std: f64) -> Result<Embedding> {
        Embedding::new(Parameter::new(init.normal("weight", [count, width], std)?))
    }

    /// ids (…) to (…, width).
    pub fn forward(&self, ids: &Ids, ctx: &Context) -> Result<Tensor> {
        self.weight.tensor(ctx).embedding(ids)
    }

    /// The table: a language model's head may read it too.
    pub fn weight(&self) -> &Parameter {
        &self.weight
    }
}
