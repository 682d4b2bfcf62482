//! `randlora`: a tensor engine written from scratch, in which RandLoRA, full-rank parameter-efficient
//! fine-tuning, is one operation.

#![warn(missing_docs)]

pub mod adapters;
pub mod analysis;
mod compute;
mod cpu;
pub mod data;
mod device;
mod dtype;
mod error;
mod grad;
pub mod gradcheck;
pub mod models;
pub mod nn;
mod ops;
pub mod optim;
mod random;
mod shape;
mod storage;
mod tensor;
pub mod train;

pub use device::{CpuDevice, Device, Memory};
pub use dtype::{BF16, DType, Element, F16};
pub use error::{Error, Result};
pub use grad::{Gradients, Leaf, Op, Saves, apply};
pub use ops::attention::AttentionOptions;
pub use ops::dropout::DropoutKey;
pub use ops::index::Ids;
pub use ops::randlora::{Bases, Pairing, Plan, RandLoraOptions, Sizes, Wants, Way, randlora_linear};
pub use shape::{IntoShape, Layout, MAX_RANK, Shape};
pub use tensor::Tensor;
