//! Dropout, whose mask is a function of a key: nothing is drawn "next", nothing is saved.

use crate::compute;
use crate::cpu::parallel::{self, GRAIN};
use crate::cpu::simd::{Kernel, vectorize};
use crate::cpu::{Float, dispatch};
use crate::error::{Error, Result};
use crate::grad::{Op, Saves, apply};
use crate::opencl;
use crate::random;
use crate::tensor::Tensor;

/// What a mask is made from: the same key and shape give the same mask, in the forward, in the
/// backward, and when a checkpointed forward is run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DropoutKey {
    /// Of the run.
    pub seed: u64,
    /// Of the optimiser, or any number that differs from one forward to the next.
    pub step: u64,
    /// The place in the model: two dropouts of one forward must not share a mask.
    pub site: u64,
}

/// The stream of the masks, so that they share no words with other uses of the same seed.
const STREAM: u64 = u64::from_le_bytes(*b"dropout\0");

impl DropoutKey {
    fn mixed(self) -> u64 {
        random::mix(random::mix(self.seed, self.step), self.site)
    }
}

/// Words from this on keep their element: p·2³² is exact, and a word is at least that if it is at least the
/// ceiling, which may be 2³².
fn threshold(p: f64) -> u64 {
    (p * 4_294_967_296.0).ceil() as u64
}

/// The mask for rate p as OpenCL devices make it.
pub(crate) fn cl_mask(key: DropoutKey, p: f64) -> opencl::dropout::Mask {
    opencl::dropout::Mask {
        seed: key.mixed(),
        stream: STREAM,
        threshold: threshold(p),
        scale: 1.0 / (1.0 - p),
    }
}

/// x, whose elements lie one after another on an OpenCL device, times the mask that belongs to them.
pub(crate) fn cl_masked(x: &Tensor, key: DropoutKey, p: f64) -> Result<Tensor> {
    let y = opencl::dropout::masked(x.cl()?, cl_mask(key, p))?;
    Ok(Tensor::from_cl(y, x.dtype(), *x.shape(), x.device()))
}

/// An error unless 0 ≤ p < 1.
pub(crate) fn check_rate(p: f64) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        return Ok(());
    }
    Err(Error::config("dropout", format!("a rate of {p} does not lie in 0 ≤ p < 1")))
}

/// Elements `from..from + out.len()` of the mask for rate p: 1/(1 − p) where kept, 0 elsewhere.
///
/// Element i is kept if and only if word i of the key's stream is at least p·2³², so with
/// probability 1 − ⌈p·2³²⌉/2³².
pub(crate) fn mask_range<T: Float>(key: DropoutKey, p: f64, from: u64, out: &mut [T]) {
    const WORDS: usize = 1024;
    let mut words = [0; WORDS];
    let seed = key.mixed();
    let threshold = threshold(p);
    let scale = T::from_f64(1.0 / (1.0 - p));
    for (i, out) in out.chunks_mut(WORDS).enumerate() {
        let words = &mut words[..out.len()];
        random::words(seed, STREAM, from + (i * WORDS) as u64, words);
        vectorize(Mask { words, threshold, scale, out });
    }
}

/// x times the mask that belongs to its elements.
pub(crate) fn mask_in_place<T: Float>(key: DropoutKey, p: f64, x: &mut [T]) {
    parallel::chunks(x, GRAIN, &|i, x| mask_from(key, p, (i * GRAIN) as u64, x));
}

/// x times elements `from..from + x.len()` of the mask, on the calling thread.
pub(crate) fn mask_from<T: Float>(key: DropoutKey, p: f64, from: u64, x: &mut [T]) {
    const PART: usize = 1024;
    let mut mask = [T::ZERO; PART];
    for (i, x) in x.chunks_mut(PART).enumerate() {
        let mask = &mut mask[..x.len()];
        mask_range(key, p, from + (i * PART) as u64, mask);
        vectorize(Times { x, mask });
    }
}

/// x ← x∘mask.
pub(crate) struct Times<'a, T> {
    pub(crate) x: &'a mut [T],
    pub(crate) mask: &'a [T],
}

impl<T: Float> Kernel for Times<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (x, &m) in self.x.iter_mut().zip(self.mask) {
            *x = *x * m;
        }
    }
}

struct Mask<'a, T> {
    words: &'a [u32],
    threshold: u64,
    scale: T,
    out: &'a mut [T],
}

impl<T: Float> Kernel for Mask<'_, T> {
    type Element = T;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (out, &word) in self.out.iter_mut().zip(self.words) {
            *out = if word as u64 >= self.threshold { self.scale } else { T::ZERO };
        }
    }
}

/// y = x∘m/(1 − p) with a random m of zeros and ones. m does not depend on x, so
/// **dx = dy∘m/(1 − p)**: the same function, with m made again from the key.
#[derive(Debug)]
struct Dropout {
    p: f64,
    key: DropoutKey,
}

impl Dropout {
    fn masked(&self, x: &Tensor) -> Result<Tensor> {
        let x = compute::contiguous(x)?;
        if x.is_on_opencl() {
            return cl_masked(&x, self.key, self.p);
        }
        dispatch!("dropout", x.dtype(), T => {
            let (from, mut y) = (x.elements::<T>()?, x.device().host().buffer::<T>(x.numel())?);
            parallel::chunks(&mut y, GRAIN, &|i, y| {
                y.copy_from_slice(&from[i * GRAIN..][..y.len()]);
                mask_from(self.key, self.p, (i * GRAIN) as u64, y);
            });
            Ok(Tensor::from_buffer(y, *x.shape(), x.device()))
        })
    }
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn forward(&self, x: &[&Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        Ok((self.masked(x[0])?, vec![]))
    }

    fn vjp(
        &self,
        _: &[&Tensor],
        _: &Tensor,
        _: &[Tensor],
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.masked(dy)?)])
    }

    fn saves(&self, _: &[bool]) -> Saves {
        Saves::NOTHING
    }

    fn runs_on_opencl(&self, x: &[&Tensor]) -> bool {
        compute::all_f32(x)
    }
}

impl Tensor {
    /// Each element set to 0 with probability p, the others divided by 1 − p; a function of the
    /// key and the element's place. With p = 0 the tensor itself.
    ///
    /// ```
    /// # use randlora::{DType, Device, DropoutKey, Tensor};
    /// let x = Tensor::ones([1000], DType::F32, &Device::cpu())?;
    /// let key = DropoutKey { seed: 1, step: 0, site: 0 };
    /// let y = x.dropout(0.2, key)?.to_vec::<f32>()?;
    /// let dropped = y.iter().filter(|&&y| y == 0.0).count();
    /// assert!((150..250).contains(&dropped) && y.contains(&1.25));
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] unless 0 ≤ p < 1.
    pub fn dropout(&self, p: f64, key: DropoutKey) -> Result<Tensor> {
        check_rate(p)?;
        if p == 0.0 { Ok(self.clone()) } else { apply(Dropout { p, key }, &[self]) }
    }
}

#[cfg(test)]
pub(crate) fn cases() -> Vec<crate::ops::cases::Case> {
    use crate::cpu::naive::Naive;
    use crate::ops::cases::Case;
    let key = DropoutKey { seed: 3, step: 1, site: 4 };
    let case = |name, p: f64| {
        Case::new(
            name,
            &["a b c"],
            move |x| x[0].dropout(p, key),
            move |x| {
                let mut words = vec![0; x[0].data.len()];
                random::words(key.mixed(), STREAM, 0, &mut words);
                let keep = |w: &u32| if *w as f64 >= p * 2f64.powi(32) { 1.0 / (1.0 - p) } else { 0.0 };
                let mask = Naive { dims: x[0].dims.clone(), data: words.iter().map(keep).collect() };
                x[0].zip(&mask, |x, m| x * m)
            },
        )
    };
    vec![case("dropout", 0.3), case("dropout of nothing", 0.0), case("dropout of nearly all", 0.95)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device};

    const KEY: DropoutKey = DropoutKey { seed: 9, step: 8, site: 7 };

    #[test]
    fn any_range_of_a_mask_can_be_made_alone() {
        let (mut whole, mut part) = (vec![0f32; 5000], vec![0f32; 1500]);
        mask_range(KEY, 0.4, 0, &mut whole);
        mask_range(KEY, 0.4, 777, &mut part);
        assert_eq!(part, whole[777..777 + 1500]);
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let mask = |key| {
            let mut mask = vec![0f64; 200];
            mask_range(key, 0.5, 0, &mut mask);
            mask
        };
        let keys = [
            KEY,
            DropoutKey { seed: 8, ..KEY },
            DropoutKey { step: 9, ..KEY },
            DropoutKey { site: 8, ..KEY },
        ];
        for (i, &a) in keys.iter().enumerate() {
            assert!(keys[..i].iter().all(|&b| mask(a) != mask(b)));
        }
    }

    #[test]
    fn rates_and_means() -> Result<()> {
        // Several chunks of the parallel loop.
        let x = Tensor::ones([100_000], DType::F64, &Device::cpu())?;
        for p in [0.01, 0.5, 0.9] {
            let y = x.dropout(p, KEY)?.to_vec::<f64>()?;
            let mean = y.iter().sum::<f64>() / y.len() as f64;
            assert!((mean - 1.0).abs() < 5.0 * (p / (1.0 - p) / 1e5).sqrt(), "{p}: {mean}");
            let mut mask = vec![0.0; y.len()];
            mask_range(KEY, p, 0, &mut mask);
            assert_eq!(y, mask);
        }
        assert!(!x.track().dropout(0.1, KEY)?.dropout(0.0, KEY)?.to_vec::<f64>()?.is_empty());
        assert_eq!(x.device().nodes_made(), 1);
        for p in [-0.1, 1.0, f64::NAN] {
            assert!(matches!(x.dropout(p, KEY), Err(Error::Config { .. })));
        }
        Ok(())
    }
}
