//! Sixteen sums of products of pairs of bf16 numbers at a time: the one instruction that the product
//! in [`super`] is built around. All that is unsafe about it is here.
//!
//! A pair is a u32: two bf16 numbers that follow each other along k, the first in the lower half.
//! VDPBF16PS adds to each of sixteen f32 sums the product of the upper halves and then that of the
//! lower halves. Every such step rounds once, to nearest even, with denormal operands and results taken
//! for 0 whatever the processor's modes are (Intel's manual, volume 2, "VDPBF16PS").

use crate::cpu::simd::Kernel;

/// Sums in one register.
pub(super) const LANES: usize = 16;

/// What computes sixteen sums at a time. Everything is inlined into what [`Lanes::run`] compiles.
pub(super) trait Lanes: Copy + Send + Sync {
    /// Sixteen f32.
    type Sums: Copy;
    /// Sixteen pairs.
    type Pairs: Copy;

    fn zero(self) -> Self::Sums;
    fn load(self, pairs: &[u32; LANES]) -> Self::Pairs;
    /// The same pair sixteen times.
    fn splat(self, pair: u32) -> Self::Pairs;
    /// Σ + a₁·b₁ + a₀·b₀ in each lane.
    fn dot(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums;
    fn store(self, sums: Self::Sums, to: &mut [f32; LANES]);
    /// Runs the kernel, compiled for the processors that these lanes are for.
    fn run<K: Kernel<Element = f32>>(self, kernel: K) -> K::Out;
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Avx512;

/// Whether this processor has instructions for these products.
pub(super) fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Avx512::detect().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{Kernel, LANES, Lanes};

    /// The AVX512-BF16 instructions. A value exists only where [`Avx512::detect`] has found them, with all
    /// other features that [`with_features`] is compiled for: what makes the calls below sound.
    #[derive(Clone, Copy, Debug)]
    pub(in crate::cpu::bf16) struct Avx512(());

    impl Avx512 {
        /// The instructions, where the processor and the operating system have them.
        pub(in crate::cpu::bf16) fn detect() -> Option<Avx512> {
            let found = is_x86_feature_detected!("avx512bf16")
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma");
            found.then_some(Avx512(()))
        }
    }

    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn with_features<K: Kernel>(kernel: K) -> K::Out {
        kernel.run()
    }

    impl Lanes for Avx512 {
        type Sums = __m512;
        type Pairs = __m512bh;

        #[inline(always)]
        fn zero(self) -> __m512 {
            // SAFETY: `self` shows that the processor has the instruction.
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        fn load(self, pairs: &[u32; LANES]) -> __m512bh {
            // SAFETY: as above; the reference is to the 64 bytes that are read. Both types are 64 bytes
            // of which every pattern is valid.
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(pairs.as_ptr().cast())) }
        }

        #[inline(always)]
        fn splat(self, pair: u32) -> __m512bh {
            // SAFETY: as above.
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair.cast_signed())) }
        }

        #[inline(always)]
        fn dot(self, sums: __m512, a: __m512bh, b: __m512bh) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_dpbf16_ps(sums, a, b) }
        }

        #[inline(always)]
        fn store(self, sums: __m512, to: &mut [f32; LANES]) {
            // SAFETY: as above; the reference is to the 64 bytes that are written.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), sums) }
        }

        #[inline]
        fn run<K: Kernel<Element = f32>>(self, kernel: K) -> K::Out {
            // SAFETY: `self` shows that the processor has every feature that the function is compiled for.
            unsafe { with_features(kernel) }
        }
    }
}

/// The instruction's arithmetic in plain code: what tests the rest of the product on any processor.
///
/// The product of two bf16 numbers is exact in f32 unless it leaves f32's range, so that a
/// multiplication and an addition round once, as the instruction does.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Emulated;

#[cfg(test)]
impl Lanes for Emulated {
    type Sums = [f32; LANES];
    type Pairs = [u32; LANES];

    #[inline(always)]
    fn zero(self) -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    fn load(self, pairs: &[u32; LANES]) -> [u32; LANES] {
        *pairs
    }

    #[inline(always)]
    fn splat(self, pair: u32) -> [u32; LANES] {
        [pair; LANES]
    }

    #[inline(always)]
    fn dot(self, sums: [f32; LANES], a: [u32; LANES], b: [u32; LANES]) -> [f32; LANES] {
        let normal = |x: f32| if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x };
        let upper = |pair: u32| normal(f32::from_bits(pair & 0xffff_0000));
        let lower = |pair: u32| normal(f32::from_bits(pair << 16));
        std::array::from_fn(|i| {
            let sum = normal(upper(a[i]) * upper(b[i]) + normal(sums[i]));
            normal(lower(a[i]) * lower(b[i]) + sum)
        })
    }

    #[inline(always)]
    fn store(self, sums: [f32; LANES], to: &mut [f32; LANES]) {
        *to = sums;
    }

    #[inline]
    fn run<K: Kernel<Element = f32>>(self, kernel: K) -> K::Out {
        crate::cpu::simd::vectorize(kernel)
    }
}
