//! The random bases, fixed by the format bit for bit.
//!
//! An entry is a function of (seed, matrix, base, row, column) and the distribution alone, whatever
//! else was made. It comes from the ChaCha8 key stream of [`random`](crate::random) (64-bit counter
//! and stream number, key = the seed as a little-endian u64 followed by zeros):
//!
//! | entry | stream | word |
//! |---|---|---|
//! | A[k, j] | 0 | k·2³² + j |
//! | B_i[d, k] of dense bases | 1 + i | k·2³² + d |
//! | B_i[d, k] of block bases, i = ⌊d/r⌋ mod n | 1 | k·2³² + d |
//!
//! A word w becomes an entry of mean 0 and variance 1, computed in f64 and rounded once to f32:
//!
//! | distribution | entry |
//! |---|---|
//! | uniform | √3·(2·⌊w/2⁸⌋ + 1 − 2²⁴)/2²⁴ |
//! | normal | Φ⁻¹((w + ½)/2³²), by AS 241 with a logarithm of basic operations only |
//! | ternary, sparsity s | √(s/2) if w < ⌊2³²/s⌋, −√(s/2) if w ≥ 2³² − ⌊2³²/s⌋, else 0 |
//!
//! s = 2 is the ±1 basis, s = 6 the paper's "sparse", s = √m its "very sparse" (§6.4). Where at most a fifth of
//! the entries are not 0, as of very sparse bases, B is stored by their places ([`Form`](crate::Form)).
//!
//! In block bases a row of B is zero but for the columns of the one basis ⌊d/r⌋ mod n; the entries there
//! are what dense bases have in their first, times √n, both rounded to f32, with the n of the largest
//! smaller side.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::randlora::{Bases, Pairing, Structure};
use crate::random;
use crate::tensor::Tensor;

/// What the entries of the bases look like. All have mean 0 and variance 1.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Distribution {
    /// Uniform in ±√3: the paper's best.
    Uniform,
    /// Normal.
    Normal,
    /// ±√(s/2) with probability 1/s each, 0 otherwise; s ≥ 2.
    ///
    /// With a small rank, mind the zeros: a column of A is zero throughout with probability
    /// (1 − 2/s)^r, 9 % at s = 6 and r = 6, and that column of ΔW then stays zero.
    Ternary {
        /// s.
        sparsity: f64,
    },
}

impl Distribution {
    /// Entries ±1.
    pub const SIGNS: Distribution = Distribution::Ternary { sparsity: 2.0 };
    /// The paper's sparse basis: two thirds zeros.
    pub const SPARSE: Distribution = Distribution::Ternary { sparsity: 6.0 };

    /// The paper's very sparse basis for a model whose largest smaller side is `small`: s = √m.
    pub fn very_sparse(small: usize) -> Distribution {
        Distribution::Ternary { sparsity: (small as f64).sqrt().max(2.0) }
    }

    fn entry(self, word: u32) -> f32 {
        match self {
            Distribution::Uniform => (3f64.sqrt() * random::symmetric(word)) as f32,
            Distribution::Normal => random::normal(word) as f32,
            Distribution::Ternary { sparsity } => {
                let share = (4_294_967_296.0 / sparsity) as u64;
                let value = (sparsity / 2.0).sqrt() as f32;
                match word as u64 {
                    w if w < share => value,
                    w if w >= (1 << 32) - share => -value,
                    _ => 0.0,
                }
            }
        }
    }
}

/// Everything that the bases of a model follow from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BasesSpec {
    /// The seed.
    pub seed: u64,
    /// What the entries look like.
    pub distribution: Distribution,
    /// Which rows of B a basis has.
    pub structure: Structure,
    /// r: the rank of one basis.
    pub rank: usize,
    /// The largest smaller side of the layers.
    pub small: usize,
    /// The largest larger side of the layers.
    pub large: usize,
    /// Which row of the scaled A meets which column of B. Of no matter for block bases.
    pub pairing: Pairing,
}

/// Rows of B that are made at a time.
const ROWS: usize = 256;

impl BasesSpec {
    /// Makes the bases in f32: A (r, small) and B (large, ⌈small/r⌉, r), or (large, r) of block bases.
    ///
    /// ```
    /// use randlora::adapters::{BasesSpec, Distribution};
    /// use randlora::{Device, Pairing, Structure};
    ///
    /// let spec = BasesSpec {
    ///     seed: 0,
    ///     distribution: Distribution::Uniform,
    ///     structure: Structure::Dense,
    ///     rank: 4,
    ///     small: 10,
    ///     large: 16,
    ///     pairing: Pairing::Paper,
    /// };
    /// let bases = spec.generate(&Device::cpu())?;
    /// assert_eq!((bases.a().dims(), bases.b_shape().dims()), (&[4, 10][..], &[16, 3, 4][..]));
    /// let blocks = BasesSpec { structure: Structure::Block, ..spec }.generate(&Device::cpu())?;
    /// assert_eq!(blocks.b_shape().dims(), [16, 4]);
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for a rank of 0 or a sparsity below 2, [`Error::Shape`] for sizes beyond
    /// memory.
    pub fn generate(&self, device: &Device) -> Result<Bases> {
        let BasesSpec { rank, small, large, .. } = *self;
        let device = &device.on_host();
        if rank == 0 {
            return Err(Error::config("rank", "a basis has at least rank 1"));
        }
        if let Distribution::Ternary { sparsity } = self.distribution
            && !(sparsity >= 2.0 && sparsity.is_finite())
        {
            return Err(Error::config("sparsity", format!("{sparsity} is not at least 2 and finite")));
        }
        let a_shape = crate::shape::Shape::new(&[rank, small])?;
        let b_shape = match self.structure {
            Structure::Dense => crate::shape::Shape::new(&[large, small.div_ceil(rank), rank])?,
            Structure::Block => crate::shape::Shape::new(&[large, rank])?,
        };
        let mut a = device.host().buffer::<f32>(a_shape.numel())?;
        if small > 0 {
            a.par_chunks_mut(small).enumerate().for_each(|(k, row)| self.fill(0, k, 0, row));
        }
        let mut b = device.host().buffer::<f32>(b_shape.numel())?;
        let columns = b_shape.numel() / large.max(1);
        if columns > 0 {
            b.par_chunks_mut(ROWS * columns)
                .enumerate()
                .for_each(|(i, rows)| self.fill_rows(i * ROWS, columns, rows));
        }
        let (a, b) = (Tensor::from_buffer(a, a_shape, device), Tensor::from_buffer(b, b_shape, device));
        match self.structure {
            Structure::Dense => Bases::new(&a, &b, self.pairing),
            Structure::Block => Bases::block(&a, &b, small.div_ceil(rank)),
        }
    }

    /// The entries from..from + out.len() of column k of a matrix's stream.
    fn fill(&self, stream: u64, k: usize, from: usize, out: &mut [f32]) {
        let mut words = vec![0; out.len()];
        random::words(self.seed, stream, ((k as u64) << 32) + from as u64, &mut words);
        out.iter_mut().zip(words).for_each(|(out, word)| *out = self.distribution.entry(word));
    }

    /// Rows `first..` of B, with all bases' columns side by side.
    fn fill_rows(&self, first: usize, columns: usize, rows: &mut [f32]) {
        let factor = match self.structure {
            Structure::Dense => 1.0,
            Structure::Block => (self.small.div_ceil(self.rank) as f64).sqrt() as f32,
        };
        let mut column = vec![0.0; rows.len() / columns];
        for q in 0..columns {
            self.fill(1 + (q / self.rank) as u64, q % self.rank, first, &mut column);
            rows.chunks_mut(columns).zip(&column).for_each(|(row, &entry)| row[q] = factor * entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(distribution: Distribution) -> BasesSpec {
        BasesSpec {
            seed: 42,
            distribution,
            structure: Structure::Dense,
            rank: 5,
            small: 18,
            large: 300,
            pairing: Pairing::Paper,
        }
    }

    fn b(spec: BasesSpec) -> Vec<f32> {
        spec.generate(&Device::cpu()).unwrap().b().unwrap().to_vec().unwrap()
    }

    /// FNV-1a over the bits.
    fn hash(values: &[f32]) -> u64 {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01b3))
    }

    /// The format: whoever changes these numbers breaks every adapter that was saved without its
    /// bases. tests/oracle/bases.py makes the same ones from the written formulas.
    #[test]
    fn golden() {
        let of = |spec: BasesSpec| {
            let bases = spec.generate(&Device::cpu()).unwrap();
            (hash(&bases.a().to_vec::<f32>().unwrap()), hash(&bases.b().unwrap().to_vec::<f32>().unwrap()))
        };
        let hashes = [
            Distribution::Uniform,
            Distribution::Normal,
            Distribution::SIGNS,
            Distribution::SPARSE,
            Distribution::very_sparse(768),
        ]
        .map(|distribution| of(spec(distribution)));
        assert_eq!(hashes, GOLDEN, "{hashes:#x?}");
        let block = |d| of(BasesSpec { structure: Structure::Block, ..spec(d) });
        let hashes = [block(Distribution::Uniform), block(Distribution::Normal)];
        assert_eq!(hashes, GOLDEN_BLOCK, "{hashes:#x?}");
    }

    /// And what layers with three bases make of those for three, zeros included.
    #[test]
    fn golden_written_out() {
        let block = BasesSpec { structure: Structure::Block, small: 15, ..spec(Distribution::Uniform) };
        let dense = block.generate(&Device::cpu()).unwrap().dense(3).unwrap();
        assert_eq!(dense.b_shape().dims(), [300, 3, 5]);
        let found = hash(&dense.b().unwrap().to_vec::<f32>().unwrap());
        assert_eq!(found, GOLDEN_WRITTEN_OUT, "{found:#x}");
    }

    const GOLDEN_BLOCK: [(u64, u64); 2] =
        [(0x2fbe_0d71_23a6_a109, 0x9269_4f61_2ad2_efbb), (0xba6a_f499_a8af_63a2, 0x6679_ad14_3d63_f342)];
    const GOLDEN_WRITTEN_OUT: u64 = 0x1810_00e0_9a7a_98c4;
    const GOLDEN: [(u64, u64); 5] = [
        (0x2fbe_0d71_23a6_a109, 0x8766_adcd_c4d3_85fb),
        (0xba6a_f499_a8af_63a2, 0x7a37_02f2_076a_83f3),
        (0xc135_e2ff_8d46_3935, 0x7403_7665_f10f_6e25),
        (0x2a80_0450_c6a4_1685, 0x027d_d132_759c_c92b),
        (0x2efe_3e24_bce1_a678, 0x9abd_e0dd_4944_afc0),
    ];

    #[test]
    fn an_entry_does_not_depend_on_what_else_is_made() {
        let (small, large) =
            (spec(Distribution::Uniform), BasesSpec { small: 27, large: 700, ..spec(Distribution::Uniform) });
        let (a, b) = (b(small), b(large));
        for row in 0..300 {
            assert_eq!(a[row * 20..(row + 1) * 20], b[row * 30..row * 30 + 20]);
        }
    }

    #[test]
    fn blocks_have_the_entries_of_the_first_basis_in_their_rows() {
        let dense = spec(Distribution::Normal);
        let first = b(dense);
        let block = BasesSpec { structure: Structure::Block, ..dense };
        let (own, n) = (b(block), 4);
        let written =
            block.generate(&Device::cpu()).unwrap().dense(n).unwrap().b().unwrap().to_vec::<f32>().unwrap();
        for d in 0..300 {
            let row = &own[d * 5..][..5];
            assert!(row.iter().zip(&first[d * 20..]).all(|(own, first)| *own == 2.0 * first));
            for q in 0..20 {
                // PEFT has rank ⌊q/n⌋ of basis q mod n here.
                let there = if q % n == d / 5 % n { row[q / n] } else { 0.0 };
                assert_eq!(written[d * 20 + q], there);
            }
        }
    }

    #[test]
    fn unit_variance_and_the_promised_zeros() {
        for (d, zeros) in [
            (Distribution::Uniform, 0.0),
            (Distribution::Normal, 0.0),
            (Distribution::SIGNS, 0.0),
            (Distribution::SPARSE, 2.0 / 3.0),
            (Distribution::very_sparse(768), 1.0 - 2.0 / 768f64.sqrt()),
        ] {
            let values = b(BasesSpec { small: 100, large: 2000, ..spec(d) });
            let n = values.len() as f64;
            let mean = values.iter().map(|&v| v as f64).sum::<f64>() / n;
            let square = values.iter().map(|&v| (v as f64).powi(2)).sum::<f64>() / n;
            assert!(
                mean.abs() < 0.01 && (square - 1.0).abs() < 0.02,
                "{d:?}: mean {mean}, mean square {square}"
            );
            let share = values.iter().filter(|&&v| v == 0.0).count() as f64 / n;
            assert!((share - zeros).abs() < 0.01, "{d:?}: {share} zeros");
        }
    }

    #[test]
    fn senseless_settings_are_errors() {
        let device = Device::cpu();
        assert!(BasesSpec { rank: 0, ..spec(Distribution::Uniform) }.generate(&device).is_err());
        assert!(spec(Distribution::Ternary { sparsity: 1.5 }).generate(&device).is_err());
        assert!(spec(Distribution::Ternary { sparsity: f64::NAN }).generate(&device).is_err());
        assert!(
            BasesSpec { large: usize::MAX / 2, ..spec(Distribution::Uniform) }.generate(&device).is_err()
        );
    }
}
