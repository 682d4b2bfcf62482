//! Whole models.

mod vit;

pub use vit::{Vit, VitConfig};
