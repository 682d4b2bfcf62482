//! Whole models.

mod bert;
mod load;
mod vit;

pub use bert::{Bert, BertConfig, BertLoad, Head};
pub use load::Loaded;
pub use vit::{Vit, VitConfig};
