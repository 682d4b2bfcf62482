//! The widest vectors that the processor has, for loops that the compiler vectorises.
//!
//! A crate is compiled for the oldest processor of its target; loops that should use more are
//! compiled several times here and the fitting version is chosen when the program runs. No version
//! may contract a·b + c into one rounding, so all give the same bits.

use crate::dtype::Element;

/// A loop over slices. Mark `run` and all that it calls `#[inline(always)]`: code that is not
/// inlined into the version for the wide vectors stays narrow.
pub(crate) trait Kernel {
    /// What the loop computes in.
    type Element: Element;
    type Out;
    fn run(self) -> Self::Out;
}

/// Runs the kernel, compiled for what this processor has.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn vectorize<K: Kernel>(kernel: K) -> K::Out {
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512cd,avx2,fma,bmi1,bmi2,popcnt,f16c")]
    fn v4<K: Kernel>(kernel: K) -> K::Out {
        kernel.run()
    }
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,popcnt,f16c")]
    fn v3<K: Kernel>(kernel: K) -> K::Out {
        kernel.run()
    }
    // f64 is there to check gradients with: one version of each loop will do.
    if const { matches!(K::Element::DTYPE, crate::dtype::DType::F64) } {
        return kernel.run();
    }
    if has_v4() {
        // SAFETY: every feature that the function is compiled for was found on this processor.
        return unsafe { v4(kernel) };
    }
    if has_v3() {
        // SAFETY: as above.
        return unsafe { v3(kernel) };
    }
    kernel.run()
}

/// Has the cache fetch the line of this number, which need not be there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unused_unsafe, reason = "safe in newer versions of the standard library")]
pub(crate) fn prefetch(number: *const f32) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint: it reads nothing that the program sees, from any address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(number.cast()) }
}

/// Has the cache fetch the lines of `count` numbers from `first` on, which need not be there.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn prefetch_row(first: *const f32, count: usize) {
    for at in (0..count + 15).step_by(16) {
        prefetch(first.wrapping_add(at));
    }
}

/// Other architectures' vectors are part of their baseline (NEON) or chosen at build time (wasm).
#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub(crate) fn vectorize<K: Kernel>(kernel: K) -> K::Out {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
fn has_v3() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_v4() -> bool {
    // First what tells most processors apart: this is asked before every loop.
    is_x86_feature_detected!("avx512f")
        && has_v3()
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
}
