//! The order in which examples are seen.

use crate::error::{Error, Result};
use crate::random;

/// The stream of the orders, so that they share no words with other uses of the same seed.
const STREAM: u64 = u64::from_le_bytes(*b"shuffle\0");

/// The numbers 0..n in a random order that is a function of `n` and the seed alone.
pub fn permutation(n: usize, seed: u64) -> Vec<usize> {
    let mut words = vec![0; 2 * n];
    random::words(seed, STREAM, 0, &mut words);
    let mut order: Vec<usize> = (0..n).collect();
    // Fisher and Yates: each place from the end gets one of those not yet placed.
    for (i, pair) in (1..n).rev().zip(words.chunks_exact(2)) {
        let word = (pair[0] as u128) << 32 | pair[1] as u128;
        order.swap(i, ((word * (i as u128 + 1)) >> 64) as usize);
    }
    order
}

/// Examples in batches, shuffled anew in every epoch: the order is a function of the seed and the
/// epoch alone. The last batch of an epoch may be smaller.
///
/// ```
/// # use randlora::data::Batches;
/// let batches = Batches::new(10, 4, 42)?;
/// let epoch = batches.epoch(0);
/// assert_eq!(epoch.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
/// assert_eq!(epoch, batches.epoch(0));
/// assert_ne!(epoch, batches.epoch(1));
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Batches {
    rows: Vec<usize>,
    size: usize,
    seed: u64,
}

impl Batches {
    /// Of the examples 0..n, `size` at a time.
    pub fn new(n: usize, size: usize, seed: u64) -> Result<Batches> {
        Batches::of((0..n).collect(), size, seed)
    }

    /// Of the examples with these numbers: one part of a split.
    ///
    /// # Errors
    /// [`Error::Config`] for batches of 0.
    pub fn of(rows: Vec<usize>, size: usize, seed: u64) -> Result<Batches> {
        if size == 0 {
            return Err(Error::config("batch size", "a batch of 0 examples teaches nothing: use at least 1"));
        }
        Ok(Batches { rows, size, seed })
    }

    /// The number of batches in an epoch.
    pub fn len(&self) -> usize {
        self.rows.len().div_ceil(self.size)
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The numbers of the examples of each batch of an epoch.
    pub fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        let order = permutation(self.rows.len(), random::mix(self.seed, epoch as u64));
        order.chunks(self.size).map(|batch| batch.iter().map(|&i| self.rows[i]).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_once() {
        for n in [0, 1, 2, 7, 1000] {
            let mut order = permutation(n, 3);
            assert!(n < 7 || order.windows(2).any(|w| w[0] > w[1]));
            order.sort();
            assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
        let batches = Batches::of(vec![5, 7, 9], 2, 1).unwrap();
        let mut seen = batches.epoch(4).concat();
        seen.sort();
        assert_eq!((seen, batches.len()), (vec![5, 7, 9], 2));
        assert!(Batches::new(0, 4, 0).unwrap().epoch(0).is_empty());
        assert!(matches!(Batches::new(4, 0, 0), Err(Error::Config { .. })));
    }

    #[test]
    fn all_orders_are_about_equally_likely() {
        let mut count = std::collections::HashMap::new();
        for seed in 0..6000 {
            *count.entry(permutation(3, seed)).or_insert(0) += 1;
        }
        assert_eq!(count.len(), 6);
        assert!(count.values().all(|&c| (850..1150).contains(&c)), "{count:?}");
    }
}
