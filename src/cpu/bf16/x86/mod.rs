//! The kernels for x86-64, and which of them is taken: all that is unsafe about [`super`] is here.
//!
//! Loops here are written without closures and iterators over several slices: those are functions of `core`
//! that are not compiled for these instructions, and where one of them is not inlined, the sums go through
//! memory at a twentieth of the speed.

#![allow(clippy::needless_range_loop, reason = "see above: plain loops stay in registers")]

mod amx;
mod avx512;
mod pack;

use std::arch::x86_64::{__cpuid, __mmask16};
use std::sync::OnceLock;

pub(super) use amx::Amx;
pub(super) use avx512::Avx512;

use crate::cpu::bf16::micro::LANES;

/// The kernel that this processor is fastest with.
#[derive(Clone, Copy)]
pub(super) enum Fastest {
    Amx(Amx),
    Avx512(Avx512),
}

/// The fastest kernel, unless f32 is faster than all there are: with VDPBF16PS alone, AMD's processors multiply
/// at 1.9 times the speed of f32 (Zen 5), Intel's at 0.63 to 0.77 of it (the one Xeon that was measured; others
/// are taken to be alike).
pub(super) fn fastest() -> Option<Fastest> {
    static FASTEST: OnceLock<Option<Fastest>> = OnceLock::new();
    let vectors = || Avx512::detect().filter(|_| is_amd());
    *FASTEST.get_or_init(|| Amx::detect().map(Fastest::Amx).or_else(|| vectors().map(Fastest::Avx512)))
}

/// Whether AMD made this processor.
fn is_amd() -> bool {
    #[allow(unused_unsafe, reason = "safe in newer versions of the standard library")]
    // SAFETY: every processor of this architecture has the instruction and its leaf 0.
    let name = unsafe { __cpuid(0) };
    [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes) == [*b"Auth", *b"enti", *b"cAMD"]
}

/// A mask of the first `n` lanes, or of all.
#[inline]
#[target_feature(enable = "avx512f")]
fn low(n: usize) -> __mmask16 {
    if n >= LANES { !0 } else { !(!0 << n) }
}
