//! `randlora`: a tensor engine written from scratch, in which RandLoRA, full-rank
//! parameter-efficient fine-tuning, is one operation.
//!
//! This page is a tour in six stops. Each names the files to read next to it; together they are an
//! evening's reading, from a number to a fine-tuned model. Every example runs as a test.
//!
//! # 1. A tensor
//!
//! A [`Tensor`] is a shape, strides and an offset over a shared buffer. It never changes once made.
//! Transposing, slicing and broadcasting make another layout over the same buffer; only what
//! computes makes new numbers.
//!
//! ```
//! use randlora::{Device, Tensor};
//!
//! let device = Device::cpu();
//! let x = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &device)?;
//! let columns = x.t()?.slice(0, 1..3)?;               // a view: nothing is copied
//! assert_eq!(columns.layout().strides(), [1, 3]);
//! assert_eq!(columns.to_vec::<f32>()?, [2.0, 5.0, 3.0, 6.0]);
//! assert_eq!(x.add(&x.slice(0, 0..1)?)?.to_vec::<f32>()?, [2.0, 4.0, 6.0, 5.0, 7.0, 9.0]);
//!
//! // What does not fit is an error that says what to change.
//! let error = x.matmul(&x).unwrap_err().to_string();
//! assert_eq!(error, "matmul: inner sizes differ: [2, 3] × [2, 3] (3 against 2); did you mean b.t()?");
//! # Ok::<(), randlora::Error>(())
//! ```
//!
//! There are no globals: memory, its counters and its reuse belong to the [`Device`], threads are
//! those of the caller's rayon pool. The same input gives the same bits whatever their number.
//! *Read `shape.rs`, `tensor.rs`, and `cpu/walk.rs` for how a kernel walks any layout.*
//!
//! # 2. An operation and its vjp
//!
//! Training needs derivatives. An operation y = f(x) has a Jacobian J, far too large to write down;
//! what the chain rule needs is only its product with a vector, the *vector-Jacobian product*: given
//! dy = ∂L/∂y, return dx = Jᵀ·dy. For y = x·Wᵀ that is dx = dy·W and dW = dyᵀ·x. An [`Op`] is a
//! forward and a vjp side by side; without one there is no other:
//!
//! ```
//! use randlora::{Device, Op, Result, Saves, Tensor, apply};
//!
//! /// y = x·σ(x), dx = dy·(σ(x) + y·(1 − σ(x))).
//! #[derive(Debug)]
//! struct Swish;
//!
//! impl Op for Swish {
//!     fn name(&self) -> &'static str {
//!         "swish"
//!     }
//!     fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
//!         Ok((x[0].mul(&x[0].sigmoid()?)?, vec![]))
//!     }
//!     fn vjp(&self, x: &[&Tensor], y: &Tensor, _: &[Tensor], dy: &Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
//!         let s = x[0].sigmoid()?;
//!         let slope = s.add(&y.mul(&s.neg()?.add_scalar(1.0)?)?)?;
//!         Ok(vec![Some(dy.mul(&slope)?)])
//!     }
//!     fn saves(&self, _: &[bool]) -> Saves {
//!         Saves::inputs(&[0]).and(Saves::OUTPUT)     // what the vjp reads; all else is dropped
//!     }
//! }
//!
//! let x = Tensor::from_vec(vec![0.0, 1.0], [2], &Device::cpu())?.track();
//! let y = apply(Swish, &[&x])?;
//! assert_eq!(y.sum_all()?.backward()?.of(&x)?.to_vec::<f64>()?[0], 0.5);
//! # Ok::<(), randlora::Error>(())
//! ```
//!
//! `saves` and the last argument of `vjp`, `need`, are what fine-tuning lives on: a frozen layer
//! keeps no input and computes no gradient of its weight. *Read `ops/arithmetic.rs`, then
//! `ops/linear.rs`, `ops/softmax.rs`, `ops/attention/`: each derives its vjp in its documentation.*
//!
//! # 3. The graph
//!
//! [`apply`] is the only way into the graph. A tracked tensor holds the node that made it; a node
//! holds its operation, its parents and what was saved. That is all: no tape, no session. Backward
//! counts how often each node is used, then runs each vjp once all its uses have reported, and adds
//! up what flows together. Neither it nor dropping a graph recurses.
//!
//! ```
//! use randlora::{Device, Error, Tensor};
//!
//! let x = Tensor::from_vec(vec![3.0], [1], &Device::cpu())?.track();
//! let y = x.mul(&x)?.add(&x)?;                          // x used three times
//! assert_eq!(y.backward()?.of(&x)?.item()?, 7.0);       // 2x + 1
//! assert!(matches!(y.backward(), Err(Error::GraphUsed { .. })));
//! # Ok::<(), randlora::Error>(())
//! ```
//!
//! What backward reads is what training's memory goes to. [`nn::checkpoint`] makes a whole module one
//! operation that keeps its input alone, and runs the module again when its gradients are wanted.
//!
//! *Read `grad.rs`. It is the whole engine. Then `nn/checkpoint.rs`.*
//!
//! # 4. Gradcheck
//!
//! A wrong gradient still trains, only worse: it must be found by other means than looking.
//! [`gradcheck`] compares ⟨v, Jᵀw⟩ from the vjp with a central difference of ⟨w, f(x)⟩ along v, for
//! random v and w. Every operation here passes it over random shapes, strides and broadcasts; it
//! is public, for yours:
//!
//! ```
//! use randlora::{Device, Tensor, gradcheck};
//!
//! let x = Tensor::from_vec(vec![0.3, -1.2, 2.5, 0.1], [2, 2], &Device::cpu())?;
//! gradcheck::function("row softmax", |x| x[0].softmax(1)).check(&[x.clone()])?;
//!
//! // Here the factor's own gradient is cut by mistake.
//! let wrong = gradcheck::function("wrong", |x| x[0].mul(&x[0].detach()));
//! assert!(wrong.check(&[x]).is_err());
//! # Ok::<(), randlora::Error>(())
//! ```
//!
//! *Read `gradcheck/`, whose `mistakes` are a list of planted errors that it has to find, and
//! `ops/cases.rs`, which runs every check over every operation.*
//!
//! # 5. RandLoRA, from the formula to the panel
//!
//! Fine-tuning changes a weight W0 (out×in) by some ΔW. LoRA trains two thin matrices, ΔW = s·B·A:
//! few numbers, but a low rank. RandLoRA turns it round: thin *random* matrices, enough of them for
//! full rank, all frozen, and trained diagonals between them,
//!
//! > ΔW = s·Σᵢ Bᵢ Λᵢ A Γᵢ, i = 1 … n = ⌈m/r⌉, m = min(in, out).
//!
//! A (r×m) and the Bᵢ (max(in, out)×r) are drawn once for the whole model, from a seed: an adapter is
//! that seed and the diagonals λ and γ, n·(r + m) numbers a layer. In one matrix product,
//! ΔW = s·B·C, where B has all Bᵢ side by side and C has the rows λᵢ\[k\]·A\[k, :\]∘γᵢ. With
//! M = ∂L/∂C the gradients are two sums,
//!
//! > dλᵢ\[k\] = Σⱼ M\[(i,k), j\]·A\[k, j\]·γᵢ\[j\],  dγᵢ\[j\] = Σₖ M\[(i,k), j\]·λᵢ\[k\]·A\[k, j\].
//!
//! Composed from primitives this keeps C, ΔW and its dense gradient for every layer. As one
//! operation, [`randlora_linear`], it keeps λ, γ and the input. It goes one of two ways in each
//! half, and [`Plan`] picks the cheaper by counting operations:
//!
//! - **panel**: for some columns J, build W_J = W0_J + s·B·C_J in scratch and use it in the product
//!   that the frozen layer needs anyway; backward, G_J = dyᵀ·x_J takes its place and
//!   M_J = s·Bᵀ·G_J that of C_J. Extra work that does not grow with the tokens.
//! - **factored**: for some columns Q of B, z = x·C_Qᵀ and y += s·z·B_Qᵀ; backward, h = dy·B_Q and
//!   M_Q = s·hᵀ·x. Cheap where tokens are few.
//!
//! With block bases ([`Structure::Block`], ours) every row of B belongs to one basis: W_J is built n
//! times cheaper and B is n times smaller, for as many trained numbers and full rank.
//!
//! ```
//! use randlora::adapters::{self, RandLora, Targets};
//! use randlora::nn::{Context, Init, Linear, Module};
//! use randlora::optim::{AdamW, Optimizer};
//! use randlora::{DType, Device, Tensor, analysis};
//!
//! let device = Device::cpu();
//! let init = Init::seeded(0, &device);
//! let mut layer = Linear::init(&init, 20, 30, true)?;
//! let method = RandLora { rank: 4, scale: 1.0, ..RandLora::default() };
//! adapters::attach(&mut layer, &method, &Targets::AllLinear, &[])?;
//! assert_eq!(layer.trainable_count(), 5 * (4 + 20));    // n·(r + m), n = 20/4
//!
//! let (x, goal) = (init.normal("x", [40, 20], 1.0)?, init.normal("goal", [40, 30], 1.0)?);
//! let mut optimizer = AdamW::new();
//! for step in 0..2 {
//!     let loss = layer.forward(&x, &Context::train(0, step))?.mse_loss(&goal)?;
//!     optimizer.step(&mut layer, &loss.backward()?, 0.01)?;
//! }
//! assert_eq!(layer.delta()?.map(|d| analysis::rank(&d)).transpose()?, Some(20)); // full rank
//! # Ok::<(), randlora::Error>(())
//! ```
//!
//! *Read `ops/randlora/`: `layer.rs` for the algebra, `panel.rs` and `factored.rs` for the two ways,
//! `plan.rs` for the choice; then `adapters/`, `train.rs`, and `src/cli/demo/` for the whole at
//! work.*
//!
//! # 6. A real model
//!
//! [`io`] reads model folders as Hugging Face writes them, mapped and checked to the last byte, and
//! adapter folders as PEFT does. [`models`] have the parameter names of their checkpoints, so that
//! loading is by name and adapters go back and forth:
//!
//! ```
//! use randlora::io::{Access, Checkpoint, PeftAdapter};
//! use randlora::models::{Bert, BertLoad};
//! use randlora::nn::{Context, TokenBatch, TokenIds};
//! use randlora::Device;
//!
//! // A tiny BERT that the tests have; any other is loaded in the same way.
//! let (folder, adapter) = ("tests/oracle/peft_training/model", "tests/oracle/our_adapters/randlora");
//! let checkpoint = Checkpoint::open(folder.as_ref(), Access::Map)?;
//! let (mut model, _) = Bert::load(&checkpoint, BertLoad { labels: Some(2), seed: 0 }, &Device::cpu())?;
//! PeftAdapter::open(adapter.as_ref())?.attach(&mut model)?;
//! let text = TokenIds { ids: vec![2, 12, 9, 31, 3], ..TokenIds::default() };
//! let logits = model.forward(&TokenBatch::pad(&[&text], 0)?, &Context::eval())?;
//! assert_eq!(logits.dims(), [1, 2]);
//! # Ok::<(), randlora::Error>(())
//! ```
//!
//! *Read `io/safetensors.rs`, `models/bert/`, `io/peft/`, and `src/cli/finetune/` for how they come
//! together.*
//!
//! # What it does not do
//!
//! First derivatives only: a vjp runs untracked. Computation is in f32 and f64; bf16 and f16 store
//! frozen weights, and layers can round to bf16 what they multiply ([`Precision`]). On OpenCL devices
//! ([`Device::opencl`]) computation is in f32.

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
pub mod io;
mod linalg;
pub mod metrics;
pub mod models;
pub mod nn;
mod opencl;
mod ops;
pub mod optim;
#[cfg(test)]
mod precision_tests;
mod random;
mod shape;
mod storage;
mod system;
mod tensor;
pub mod train;

pub use device::{ClDevice, CpuDevice, Device, Memory, Precision};
pub use dtype::{BF16, DType, Element, F16};
pub use error::{Error, Result};
pub use grad::{Gradients, Leaf, Op, Saves, apply};
pub use opencl::runtime::{OpenClCounts, OpenClDevices, OpenClInfo};
pub use ops::attention::AttentionOptions;
pub use ops::dropout::DropoutKey;
pub use ops::index::Ids;
pub use ops::lora::lora_linear;
pub use ops::randlora::{
    Bases, Form, Pairing, Plan, RandLoraOptions, Sizes, Structure, Wants, Way, randlora_linear,
};
pub use shape::{IntoShape, Layout, MAX_RANK, Shape};
pub use tensor::Tensor;

/// The README's example is a test too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
