//! Modules: parameters with names, and the layers and blocks that models are made of.
//!
//! A module owns its parameters and has a method `forward` that takes its input and a
//! [`Context`]. What is common to all modules is that their parameters can be visited by name; see
//! [`Module`].

mod attention;
mod block;
mod checkpoint;
mod context;
mod embedding;
mod init;
mod linear;
mod module;
mod norm;
mod parameter;
mod tokens;

pub use attention::{AttentionConfig, MultiHeadAttention};
pub use block::{Activation, BlockConfig, BlockNames, EncoderBlock, Mlp, NormPlace};
pub use checkpoint::checkpoint;
pub use context::Context;
pub use embedding::Embedding;
pub use init::Init;
pub use linear::{CloneAdapter, Linear, LinearAdapter, Merged, Recipe};
pub use module::{Item, ItemMut, Module, join};
pub use norm::{LayerNorm, RmsNorm};
pub use parameter::Parameter;
pub use tokens::{TokenBatch, TokenIds};
