//! The `randlora` command from outside: one program, so that it is linked once.
#![cfg(feature = "cli")]

#[allow(dead_code)] // The library's tests use the rest.
#[path = "../common/mod.rs"]
mod common;

mod bench;
mod command;
mod convert;
mod errors;
mod finetune;
mod help;
mod inspect;
mod methods;
mod opencl;
mod options;
mod precision;
mod several;
mod study;
mod texts;
