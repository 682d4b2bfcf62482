//! Free memory by size, and how much there is.

use std::collections::BTreeMap;

/// A pool's use of memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PoolBytes {
    /// In buffers.
    pub(crate) live: usize,
    /// The most that was in buffers at one time.
    pub(crate) peak: usize,
    /// Free, but kept.
    pub(crate) kept: usize,
}

/// Pieces of device memory that nobody uses at the moment.
#[derive(Debug)]
pub(super) struct Pool<M> {
    free: BTreeMap<usize, Vec<M>>,
    pub(super) bytes: PoolBytes,
}

impl<M> Default for Pool<M> {
    fn default() -> Self {
        Pool { free: BTreeMap::new(), bytes: PoolBytes::default() }
    }
}

impl<M> Pool<M> {
    /// A free piece of this class of size.
    pub(super) fn take(&mut self, size: usize) -> Option<M> {
        let memory = self.free.get_mut(&size)?.pop()?;
        self.bytes.kept -= size;
        self.count_fresh(size);
        Some(memory)
    }

    /// Counts a piece as in use.
    pub(super) fn count_fresh(&mut self, size: usize) {
        self.bytes.live += size;
        self.bytes.peak = self.bytes.peak.max(self.bytes.live);
    }

    /// Takes a piece back.
    pub(super) fn put(&mut self, size: usize, memory: M) {
        self.bytes.live -= size;
        self.bytes.kept += size;
        self.free.entry(size).or_default().push(memory);
    }

    /// Lets go of all free pieces.
    pub(super) fn clear(&mut self) {
        self.free.clear();
        self.bytes.kept = 0;
    }

    pub(super) fn reset_peak(&mut self) {
        self.bytes.peak = self.bytes.live;
    }
}

/// The size of the piece that so many bytes get: eight sizes from one power of two to the next, so that
/// batches of slightly different length share pieces and at most an eighth is wasted.
pub(super) fn class(bytes: usize) -> usize {
    const LEAST: usize = 256;
    let bytes = bytes.max(LEAST);
    let step = (1 << bytes.ilog2()) / 8;
    bytes.checked_next_multiple_of(step).unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_an_eighth_at_most() {
        for bytes in (1..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789, usize::MAX]) {
            let size = class(bytes);
            assert!(size >= bytes && (size == 256 || size - bytes <= bytes / 8), "{bytes} {size}");
            assert_eq!(class(size), size);
        }
    }

    #[test]
    fn pieces_come_back() {
        let mut pool = Pool::default();
        assert_eq!(pool.take(512), None);
        pool.count_fresh(512);
        pool.put(512, 'a');
        assert_eq!(pool.bytes, PoolBytes { live: 0, peak: 512, kept: 512 });
        assert_eq!((pool.take(256), pool.take(512)), (None, Some('a')));
        assert_eq!(pool.bytes, PoolBytes { live: 512, peak: 512, kept: 0 });
    }
}
