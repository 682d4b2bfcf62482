//! ChaCha with 8 rounds (Bernstein, 2008), with a counter and a stream number of 64 bits each.
//!
//! A block is 16 words that follow from the key, the stream and the block's number alone:
//!
//! | words | 0–3 | 4–11 | 12, 13 | 14, 15 |
//! |---|---|---|---|---|
//! | at the start | "expand 32-byte k" | the key | the block's number | the stream |
//!
//! The start goes through four double rounds and is added to the result. Blocks do not depend on each other, so
//! one is made in each lane of a vector. The key is the seed as a little-endian u64, then zeros.

use crate::cpu::simd::{Kernel, vectorize};

/// The words of a block.
pub(super) const BLOCK: usize = 16;
/// The blocks that are made at once: as many as the widest vectors have lanes.
pub(super) const LANES: usize = 16;
/// The words that are made at once.
pub(super) const WORDS: usize = BLOCK * LANES;

const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// Writes the words of the blocks `first..first + 16`.
pub(super) fn blocks(seed: u64, stream: u64, first: u64, out: &mut [u32; WORDS]) {
    vectorize(Blocks { seed, stream, first, out });
}

struct Blocks<'a> {
    seed: u64,
    stream: u64,
    first: u64,
    out: &'a mut [u32; WORDS],
}

impl Kernel for Blocks<'_> {
    // For numbers of 32 bits, of which u32 is none that tensors hold: the widest vectors.
    type Element = f32;
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let mut words = [[0; LANES]; BLOCK];
        // One loop for everything, which the compiler turns into vectors as a whole.
        for lane in 0..LANES {
            let start = start(self.seed, self.stream, self.first.wrapping_add(lane as u64));
            let mut state = start;
            // Written out: with a loop inside the compiler leaves the one around it as it is.
            double_round(&mut state);
            double_round(&mut state);
            double_round(&mut state);
            double_round(&mut state);
            for ((word, end), start) in words.iter_mut().zip(state).zip(start) {
                word[lane] = end.wrapping_add(start);
            }
        }
        for (lane, block) in self.out.chunks_exact_mut(BLOCK).enumerate() {
            for (to, word) in block.iter_mut().zip(&words) {
                *to = word[lane];
            }
        }
    }
}

#[inline(always)]
fn start(seed: u64, stream: u64, block: u64) -> [u32; BLOCK] {
    let mut state = [0; BLOCK];
    state[..4].copy_from_slice(&CONSTANTS);
    (state[4], state[5]) = halves(seed);
    (state[12], state[13]) = halves(block);
    (state[14], state[15]) = halves(stream);
    state
}

#[inline(always)]
fn halves(x: u64) -> (u32, u32) {
    (x as u32, (x >> 32) as u32)
}

/// The columns of the state seen as a 4×4 matrix, then its diagonals.
#[inline(always)]
fn double_round(state: &mut [u32; BLOCK]) {
    quarter_round(state, 0, 4, 8, 12);
    quarter_round(state, 1, 5, 9, 13);
    quarter_round(state, 2, 6, 10, 14);
    quarter_round(state, 3, 7, 11, 15);
    quarter_round(state, 0, 5, 10, 15);
    quarter_round(state, 1, 6, 11, 12);
    quarter_round(state, 2, 7, 8, 13);
    quarter_round(state, 3, 4, 9, 14);
}

#[inline(always)]
fn quarter_round(state: &mut [u32; BLOCK], a: usize, b: usize, c: usize, d: usize) {
    state[a] = state[a].wrapping_add(state[b]);
    state[d] = (state[d] ^ state[a]).rotate_left(16);
    state[c] = state[c].wrapping_add(state[d]);
    state[b] = (state[b] ^ state[c]).rotate_left(12);
    state[a] = state[a].wrapping_add(state[b]);
    state[d] = (state[d] ^ state[a]).rotate_left(8);
    state[c] = state[c].wrapping_add(state[d]);
    state[b] = (state[b] ^ state[c]).rotate_left(7);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published test vector for a key of 256 zero bits, 8 rounds (eSTREAM;
    /// draft-strombergson-chacha-test-vectors, TC1).
    #[test]
    fn published_words() {
        let mut out = [0; WORDS];
        blocks(0, 0, 0, &mut out);
        let bytes: Vec<u8> = out.iter().flat_map(|w| w.to_le_bytes()).collect();
        let first = "3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e\
                     984ce172b9216f419f445367456d5619314a42a3da86b001387bfdb80e0cfe42";
        let second = "d2aefa0deaa5c151bf0adb6c01f2a5adc0fd581259f9a2aadcf20f8fd566a26b\
                      5032ec38bbc5da98ee0c6f568b872a65a08abf251deb21bb4b56e5d8821e68aa";
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex[..256], format!("{first}{second}"));
    }

    /// Words of tests/oracle/bases.py, whose formulas are plain Python: where the seed, the stream and both halves of
    /// the block's number go.
    #[test]
    fn words_of_another_hand() {
        let mut out = [0; WORDS];
        blocks(0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, (1 << 32) + 5, &mut out);
        assert_eq!(out[..4], [0x917c_9e2a, 0x8a4f_20e9, 0xb33c_8b78, 0x63cd_4d16]);
        assert_eq!(out[12..16], [0x6c18_76c5, 0x2063_2bf0, 0xbe58_582c, 0x744c_fe8c]);
    }

    /// Every lane's block is the one that plain code gives; numbers of blocks beyond 32 bits too.
    #[test]
    fn lanes_are_blocks() {
        let (seed, stream) = (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210);
        for first in [0, 5, u32::MAX as u64 - 7, u64::MAX - 3] {
            let mut out = [0; WORDS];
            blocks(seed, stream, first, &mut out);
            for (lane, block) in out.chunks_exact(BLOCK).enumerate() {
                let start = start(seed, stream, first.wrapping_add(lane as u64));
                let mut state = start;
                (0..4).for_each(|_| double_round(&mut state));
                let want: Vec<u32> = state.iter().zip(start).map(|(a, b)| a.wrapping_add(b)).collect();
                assert_eq!(block, want);
            }
        }
    }
}
