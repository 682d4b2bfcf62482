//! RandLoRA's bases and VeRA's matrices as Hugging Face PEFT draws them with torch's generator for the CPU, to the
//! bit.
//!
//! PEFT can save an adapter without its bases (`save_projection=False`): whoever loads it draws them again from
//! `projection_prng_key`. What that means, found by running torch 2.15 and PEFT 0.21.2
//! (tests/oracle/torch_bases.py):
//!
//! - A word w comes from MT19937 (Matsumoto and Nishimura, 1998), seeded by the low 32 bits of the key. Nothing
//!   is skipped: A (r, MIN) takes the first words, row by row, then the N = ⌈MIN/r⌉ bases of B, (MAX, r) each,
//!   theirs.
//! - u = (w mod 2²⁴)/2²⁴.
//! - *uniform*: with t = √3·√(2/(1 + √5²))/√fan in f64 and then f32, fan the length of a row (MIN for A, r for
//!   B), the entry is −t + u·(t − (−t)), fused and in f32, rounded to the type of the draw; what is then not
//!   below t in that type is −t.
//! - *sparse*: with p = 1/(2s), in f64 and then f32, −1 for u < p, 1 for u > 1 − p, else 0; s = 3, and √MIN
//!   for *very sparse*.
//! - A and B are each divided by their standard deviation (n − 1 in the denominator), which is rounded to the type
//!   of the draw first, as is the quotient.
//!
//! The type of the uniform draw depends on the machine: bf16 where `accelerate` finds it, which is nearly
//! everywhere, else f16. Sparse bases are f32.
//!
//! VeRA's A (r, in) and B (out, r) are uniform in f32 with t = √3·(√2/√fan), A first, and are divided by nothing.

use crate::device::Device;
use crate::dtype::{BF16, DType, Element, F16};
use crate::error::{Error, Result};
use crate::ops::randlora::{Bases, Pairing};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// What PEFT draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TorchDraw {
    /// Uniform numbers in this type: bf16 or f16.
    Uniform(DType),
    /// `sparse=True`: two thirds zeros.
    Sparse,
    /// `very_sparse=True`: a share of 1 − 1/√MIN zeros.
    VerySparse,
}

/// Everything that the bases of an adapter saved without them follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TorchBases {
    /// `projection_prng_key`; a negative one in two's complement.
    pub key: u64,
    /// What is drawn.
    pub draw: TorchDraw,
    /// r.
    pub rank: usize,
    /// MIN: the smaller of the largest input and the largest output size of the adapted layers.
    pub small: usize,
    /// MAX: the larger of the two.
    pub large: usize,
}

impl TorchBases {
    /// Draws the bases: A (r, MIN) and B (MAX, ⌈MIN/r⌉, r), in f32.
    ///
    /// ```
    /// use randlora::adapters::{TorchBases, TorchDraw};
    /// use randlora::{DType, Device};
    ///
    /// let draw = TorchDraw::Uniform(DType::BF16);
    /// let bases = TorchBases { key: 0, draw, rank: 4, small: 10, large: 16 }.generate(&Device::cpu())?;
    /// assert_eq!((bases.a().dims(), bases.b_shape().dims()), (&[4, 10][..], &[16, 3, 4][..]));
    /// assert_eq!(bases.a().to_vec::<f32>()?[..3], [-0.012939453, 0.9296875, -1.421875]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a rank of 0, a type that PEFT does not draw in, or bases whose standard deviation
    /// is 0 or undefined; [`Error::Shape`] for sizes beyond memory.
    pub fn generate(&self, device: &Device) -> Result<Bases> {
        let TorchBases { rank, small, large, .. } = *self;
        let device = &device.on_host();
        if rank == 0 {
            return Err(Error::config("rank", "a basis has at least rank 1"));
        }
        let count = small.div_ceil(rank);
        let shapes = (Shape::new(&[rank, small])?, Shape::new(&[large, count, rank])?);
        let mut a = device.host().buffer::<f32>(shapes.0.numel())?;
        let mut b = device.host().buffer::<f32>(shapes.1.numel())?;
        let mut twister = Twister::new(self.key as u32);
        let in_a = self.entry(small)?;
        a.iter_mut().for_each(|a| *a = in_a(twister.unit()));
        let in_b = self.entry(rank)?;
        match self.draw {
            // One basis after the other; they lie side by side.
            TorchDraw::Uniform(_) => (0..count).for_each(|i| {
                let rows = b.chunks_mut(count * rank);
                rows.flat_map(|row| &mut row[i * rank..][..rank]).for_each(|b| *b = in_b(twister.unit()));
            }),
            _ => b.iter_mut().for_each(|b| *b = in_b(twister.unit())),
        }
        self.normalise(&mut a)?;
        self.normalise(&mut b)?;
        let (a, b) = (Tensor::from_buffer(a, shapes.0, device), Tensor::from_buffer(b, shapes.1, device));
        Bases::new(&a, &b, Pairing::Peft)
    }

    /// How an entry follows from u, in a matrix with rows of this length.
    fn entry(&self, fan: usize) -> Result<Box<dyn Fn(f32) -> f32>> {
        let sparsity = match self.draw {
            TorchDraw::Uniform(_) => {
                let gain = (2.0 / (1.0 + 5f64.sqrt() * 5f64.sqrt())).sqrt();
                return Ok(Box::new(uniform(gain, fan, self.rounding()?)));
            }
            TorchDraw::Sparse => 3.0,
            TorchDraw::VerySparse => (self.small as f64).sqrt(),
        };
        let (low, high) = ((1.0 / (2.0 * sparsity)) as f32, (1.0 - 1.0 / (2.0 * sparsity)) as f32);
        Ok(Box::new(move |u| match u {
            _ if u > high => 1.0,
            _ if u < low => -1.0,
            _ => 0.0,
        }))
    }

    /// Rounding to the type that is drawn in.
    fn rounding(&self) -> Result<fn(f32) -> f32> {
        match self.draw {
            TorchDraw::Uniform(DType::BF16) => Ok(|x| BF16::from_f64(x as f64).to_f32()),
            TorchDraw::Uniform(DType::F16) => Ok(|x| F16::from_f64(x as f64).to_f32()),
            TorchDraw::Uniform(other) => {
                Err(Error::config("draw", format!("PEFT draws in bf16 or f16, not in {other}")))
            }
            TorchDraw::Sparse | TorchDraw::VerySparse => Ok(|x| x),
        }
    }

    /// Divides by the standard deviation.
    fn normalise(&self, values: &mut [f32]) -> Result<()> {
        let round = self.rounding()?;
        let count = values.len() as f64;
        let mean = values.iter().map(|&v| v as f64).sum::<f64>() / count;
        let squares = values.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>();
        let deviation = round((squares / (count - 1.0)).sqrt() as f32);
        if !(deviation > 0.0 && deviation.is_finite()) {
            let message = format!(
                "their standard deviation is {deviation}, by which PEFT divides: choose a larger rank or \
                 denser bases"
            );
            return Err(Error::config("bases", message));
        }
        values.iter_mut().for_each(|v| *v = round(*v / deviation));
        Ok(())
    }
}

/// How a uniform entry of this gain follows from u, in a matrix with rows of this length.
fn uniform(gain: f64, fan: usize, round: fn(f32) -> f32) -> impl Fn(f32) -> f32 {
    let bound = (3f64.sqrt() * (gain / (fan as f64).sqrt())) as f32;
    let (width, end) = (bound + bound, round(bound));
    move |u| {
        let entry = round(u.mul_add(width, -bound));
        if entry >= end { -end } else { entry }
    }
}

/// Everything that the matrices of a VeRA adapter saved without them follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TorchVera {
    /// `projection_prng_key`; a negative one in two's complement.
    pub key: u64,
    /// r.
    pub rank: usize,
    /// The largest input size of the adapted layers.
    pub inputs: usize,
    /// The largest output size of them.
    pub outputs: usize,
}

impl TorchVera {
    /// Draws A (r, inputs) and B (outputs, r), in f32.
    ///
    /// # Errors
    /// [`Error::Shape`] for sizes beyond memory.
    pub fn generate(&self, device: &Device) -> Result<[Tensor; 2]> {
        let TorchVera { rank, inputs, outputs, .. } = *self;
        let mut twister = Twister::new(self.key as u32);
        let mut draw = |rows: usize, columns: usize| {
            let shape = Shape::new(&[rows, columns])?;
            let mut values = device.host().buffer::<f32>(shape.numel())?;
            let entry = uniform(2f64.sqrt(), columns, |x| x);
            values.iter_mut().for_each(|value| *value = entry(twister.unit()));
            Ok(Tensor::from_buffer(values, shape, device))
        };
        Ok([draw(rank, inputs)?, draw(outputs, rank)?])
    }
}

/// MT19937.
struct Twister {
    state: [u32; Twister::SIZE],
    next: usize,
}

impl Twister {
    const SIZE: usize = 624;
    const MIDDLE: usize = 397;

    fn new(seed: u32) -> Twister {
        let mut state = [seed; Twister::SIZE];
        for i in 1..Twister::SIZE {
            let before = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = before.wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Twister { state, next: Twister::SIZE }
    }

    fn word(&mut self) -> u32 {
        if self.next == Twister::SIZE {
            self.turn();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// The next 624 words, before they are tempered.
    fn turn(&mut self) {
        for i in 0..Twister::SIZE {
            let both = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Twister::SIZE] & 0x7fff_ffff);
            let twist = (both >> 1) ^ if both & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + Twister::MIDDLE) % Twister::SIZE] ^ twist;
        }
        self.next = 0;
    }

    /// From 0 to below 1, in steps of 2⁻²⁴.
    fn unit(&mut self) -> f32 {
        (self.word() & 0x00ff_ffff) as f32 / 16_777_216.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The generator's reference implementation prints these.
    #[test]
    fn known_words() {
        let mut twister = Twister::new(5489);
        assert_eq!([0; 3].map(|_| twister.word()), [3_499_211_612, 581_869_302, 3_890_346_734]);
        // The 10,000th, as C++ demands of std::mt19937.
        let mut twister = Twister::new(5489);
        assert_eq!((0..10_000).map(|_| twister.word()).last(), Some(4_123_659_995));
    }

    #[test]
    fn what_peft_could_not_draw_is_an_error() {
        let spec = TorchBases { key: 0, draw: TorchDraw::Sparse, rank: 2, small: 6, large: 8 };
        let device = Device::cpu();
        assert!(TorchBases { rank: 0, ..spec }.generate(&device).is_err());
        assert!(TorchBases { draw: TorchDraw::Uniform(DType::F64), ..spec }.generate(&device).is_err());
        assert!(TorchBases { large: usize::MAX / 2, ..spec }.generate(&device).is_err());
        // One number has no standard deviation.
        let error = TorchBases { rank: 1, small: 1, large: 1, ..spec }.generate(&device).unwrap_err();
        assert!(error.to_string().contains("standard deviation is NaN"), "{error}");
    }
}
