//! The operations: one file each, with the forward, the vjp and its derivation, the method that
//! applies it, and the cases that all shared checks run over.
//!
//! In derivations y is the result, L the final loss, and dx stands for ∂L/∂x.

pub(crate) mod activation;
pub(crate) mod arithmetic;
pub(crate) mod attention;
pub(crate) mod binary_cross_entropy;
#[cfg(test)]
pub(crate) mod cases;
pub(crate) mod cast;
pub(crate) mod concat;
pub(crate) mod dropout;
pub(crate) mod fastfood;
pub(crate) mod index;
pub(crate) mod linear;
pub(crate) mod lora;
pub(crate) mod loss;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod pointwise;
pub(crate) mod randlora;
pub(crate) mod random_sum;
pub(crate) mod reduce;
pub(crate) mod softmax;
pub(crate) mod transfer;
pub(crate) mod view;

/// The cases of all operations.
#[cfg(test)]
pub(crate) fn cases() -> Vec<cases::Case> {
    [
        activation::cases(),
        arithmetic::cases(),
        attention::cases(),
        binary_cross_entropy::cases(),
        cast::cases(),
        concat::cases(),
        dropout::cases(),
        fastfood::cases(),
        index::cases(),
        linear::cases(),
        lora::cases(),
        matmul::cases(),
        randlora::cases(),
        random_sum::cases(),
        loss::cases(),
        norm::cases(),
        reduce::cases(),
        softmax::cases(),
        view::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
