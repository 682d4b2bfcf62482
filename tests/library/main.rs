//! The library on checkpoints and adapters' files, from outside: one program, so that it is linked once.

#[allow(dead_code)] // The command's tests use the rest.
#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod bert;
mod mapped;
#[cfg(feature = "opencl")]
mod opencl;
mod own;
mod peft;
mod peft_compact;
mod peft_methods;
mod scale;
mod several;
mod torch_bases;
