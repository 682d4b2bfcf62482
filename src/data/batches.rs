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
    /// The length of each of `rows`, where batches are of examples of similar length.
    lengths: Option<Vec<usize>>,
}

/// The batches over which examples are sorted by length: many enough that lengths in a batch are
/// alike, few enough that batches differ from epoch to epoch.
const WINDOW: usize = 50;

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
        Ok(Batches { rows, size, seed, lengths: None })
    }

    /// The same with examples of similar length in each batch, so that little of it is padding: the
    /// shuffled examples are sorted over windows of 50 batches, and these batches shuffled again.
    ///
    /// # Errors
    /// [`Error::Config`] unless there is a length for each example.
    pub fn grouped(self, lengths: Vec<usize>) -> Result<Batches> {
        if lengths.len() != self.rows.len() {
            let message = format!("{} lengths for {} examples", lengths.len(), self.rows.len());
            return Err(Error::config("lengths", message));
        }
        Ok(Batches { lengths: Some(lengths), ..self })
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
        let seed = random::mix(self.seed, epoch as u64);
        let mut order = permutation(self.rows.len(), seed);
        let mut batches: Vec<&[usize]> = Vec::new();
        if let Some(lengths) = &self.lengths {
            for window in order.chunks_mut(self.size.saturating_mul(WINDOW)) {
                window.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
            }
        }
        for (i, window) in order.chunks(self.size.saturating_mul(WINDOW)).enumerate() {
            let start = batches.len();
            batches.extend(window.chunks(self.size));
            if self.lengths.is_some() {
                let sorted = batches.split_off(start);
                let places = permutation(sorted.len(), random::mix(seed, i as u64 + 1));
                batches.extend(places.into_iter().map(|place| sorted[place]));
            }
        }
        batches.into_iter().map(|batch| batch.iter().map(|&i| self.rows[i]).collect()).collect()
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
    fn grouped_batches_are_of_similar_lengths() {
        let lengths: Vec<usize> = (0..1000).map(|i| (i * 37) % 101).collect();
        let plain = Batches::new(1000, 8, 1).unwrap();
        let grouped = plain.clone().grouped(lengths.clone()).unwrap();
        let padding = |batches: &Batches, epoch| -> usize {
            let longest = |batch: &Vec<usize>| batch.iter().map(|&i| lengths[i]).max().unwrap() * batch.len();
            batches.epoch(epoch).iter().map(longest).sum::<usize>() - lengths.iter().sum::<usize>()
        };
        assert!(padding(&grouped, 0) * 5 < padding(&plain, 0));
        assert_ne!(grouped.epoch(0), grouped.epoch(1));
        assert_eq!(grouped.epoch(3), grouped.epoch(3));
        assert_eq!(grouped.epoch(0).len(), plain.len());
        let mut seen = grouped.epoch(2).concat();
        seen.sort();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
        // Not from the longest to the shortest.
        let first = grouped.epoch(0)[..20].iter().map(|batch| lengths[batch[0]]).collect::<Vec<_>>();
        assert!(first.windows(2).any(|w| w[0] < w[1]) && first.windows(2).any(|w| w[0] > w[1]));
        assert!(plain.grouped(vec![1]).is_err());
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
