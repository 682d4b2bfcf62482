//! Files: safetensors, model folders as Hugging Face writes them, adapter folders as PEFT
//! does and in a compact form.
//!
//! What is read may come from anywhere: every number in it is checked before it is used. What is
//! written is there whole or not at all.

mod adapter;
mod checkpoint;
mod files;
pub(crate) mod json;
mod map;
mod own;
mod peft;
mod safetensors;
#[cfg(test)]
pub(crate) mod tests;

pub use adapter::{Adapter, save_adapter};
pub use checkpoint::Checkpoint;
pub use files::write_whole;
pub use map::Access;
pub use own::{OwnAdapter, save_own};
pub use peft::{Biases, PeftAdapter, PeftConfig, PeftTask, save_compact, save_peft};
pub use safetensors::{Entry, FileType, SafeTensors, save_safetensors};
