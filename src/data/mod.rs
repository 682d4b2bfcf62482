//! Data to train on, and the order in which it is seen.

mod batches;
pub mod digits;

pub use batches::{Batches, permutation};
