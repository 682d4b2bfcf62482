//! Fine-tuning methods: which numbers of a model are trained, and the adapters that hold them.
//!
//! A [`Method`] is attached to a model's linear layers by name; the rest of the model is frozen.
//! Each method is one file with its equations. W0 is the frozen weight (out×in), s a scale:
//!
//! | method | change of the weight ΔW | trained in a layer |
//! |---|---|---|
//! | [`RandLora`] | s·Σᵢ Bᵢ·Λᵢ·A·Γᵢ, random Bᵢ and A | n·(r + min(in, out)) |
//! | [`Lora`] | s·B·A | r·(in + out) |
//! | [`Dora`] | g∘(W0 + s·B·A) − W0, g = m/‖rows‖ | r·(in + out) + out |
//! | [`Vera`] | Λ_b·B·Λ_d·A, random A and B | r + out |
//! | [`Pissa`] | s·(B·A − B₀·A₀), from the SVD of W0 | r·(in + out) |
//! | [`LoraXs`] | s·Uᵣ·Σᵣ·R·Vᵣᵀ of the SVD of W0 | r² |
//! | [`Svft`] | U·M·Vᵀ of the SVD of W0, M banded | min(in, out) and up |
//! | [`AdaLora`] | s·B·E·A, fewer of E's entries in time | r₀·(in + out + 1) |
//! | [`HydraLora`] | s·Σᵢ gᵢ(x)·Bᵢ·A: it depends on x | r·(in + N·out) + N·in |
//! | [`Nola`] | s·(Σⱼ βⱼ·Bⱼ)·(Σⱼ αⱼ·Aⱼ), random Aⱼ and Bⱼ | 2k |
//! | [`Pranc`] | s·Σⱼ αⱼ·Rⱼ, random Rⱼ | k |
//! | [`Intrinsic`] | P·θ, random P | d |
//! | [`Atlas`] | Σᵢ λᵢ·τᵢ, given τᵢ | their number |
//! | [`BitFit`] | none: biases are trained | out |
//! | [`Full`] | all is trained | in·out + out |
//!
//! Several on one model, active one at a time or as a weighted sum, are an [`Adapted`] model's.

mod adalora;
mod adapted;
mod atlas;
mod attach;
mod bases;
mod dora;
mod full;
mod hydra;
mod intrinsic;
mod lora;
mod lora_xs;
mod merge;
mod nola;
mod origin;
mod per_layer;
mod pissa;
mod pranc;
mod randlora;
mod recipe;
mod settings;
mod share;
mod svft;
mod torch;
mod vera;
mod weighted;

pub use adalora::{AdaLora, AdaLoraAdapter};
pub use adapted::{Adapted, Whole};
pub use atlas::{Atlas, AtlasAdapter, TaskVector, task_vector};
pub use attach::{Attached, LayerInfo, Method, Targets, attach, train_only};
pub use bases::{BasesSpec, Distribution};
pub use dora::{Dora, DoraAdapter};
pub use full::{BitFit, Full};
pub use hydra::{HydraLora, HydraLoraAdapter};
pub use intrinsic::{Intrinsic, IntrinsicAdapter};
pub use lora::{Lora, LoraAdapter};
pub use lora_xs::{LoraXs, LoraXsAdapter};
pub use merge::{merge, unmerge};
pub use nola::{Nola, NolaAdapter};
pub use origin::BasesOrigin;
pub use per_layer::PerLayer;
pub use pissa::{Pissa, PissaAdapter};
pub use pranc::{Pranc, PrancAdapter};
pub use randlora::{RandLora, RandLoraAdapter, Start};
pub use recipe::by_recipe;
pub use settings::{METHODS, Settings, by_name, default_rank};
pub use svft::{Svft, SvftAdapter};
pub use torch::{TorchBases, TorchDraw, TorchVera};
pub use vera::{Vera, VeraAdapter};
