//! Fine-tuning methods: which numbers of a model are trained, and the adapters that hold them.
//!
//! A [`Method`] is attached to a model's linear layers by name; the rest of the model is frozen.
//! Each method is one file with its equations: [`RandLora`], [`Lora`], [`Full`].

mod attach;
mod bases;
mod full;
mod lora;
mod merge;
mod origin;
mod randlora;
mod torch;

pub use attach::{Attached, LayerInfo, Method, Settings, Targets, attach, by_name, train_only};
pub use bases::{BasesSpec, Distribution};
pub use full::Full;
pub use lora::{Lora, LoraAdapter};
pub use merge::{merge, unmerge};
pub use origin::BasesOrigin;
pub use randlora::{RandLora, RandLoraAdapter};
pub use torch::{TorchBases, TorchDraw};
