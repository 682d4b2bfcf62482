//! Whole models.

mod bert;
mod vit;

pub use bert::{Bert, BertConfig};
pub use vit::{Vit, VitConfig};
