//! The handwritten digits that come with this crate: 1,797 images of 8×8 pixels from the UCI
//! Machine Learning Repository (E. Alpaydin and C. Kaynak, CC BY 4.0, see `digits.LICENSE.md`).

use crate::data::permutation;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Pixels along a side of an image.
pub const SIDE: usize = 8;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// The largest value of a pixel; 0 is no ink.
pub const INK: u8 = 16;
/// Different labels.
pub const CLASSES: usize = 10;

/// Images of handwritten digits with their labels.
///
/// ```
/// use randlora::{Device, data::digits::Digits};
///
/// let digits = Digits::embedded();
/// assert_eq!((digits.len(), digits.labels()[0]), (1797, 0));
/// let (images, labels) = digits.batch(&[0, 1, 2], &Device::cpu())?;
/// assert_eq!((images.dims(), &labels[..]), (&[3, 1, 8, 8][..], &[0, 1, 2][..]));
/// # Ok::<(), randlora::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digits {
    images: Vec<[u8; PIXELS]>,
    labels: Vec<u8>,
}

/// The numbers of the images to learn from, to choose settings by, and to report on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// 1,077 of the embedded images.
    pub train: Vec<usize>,
    /// 360 of them.
    pub validation: Vec<usize>,
    /// 360 of them.
    pub test: Vec<usize>,
}

impl Digits {
    /// The 1,797 images that are part of this crate.
    pub fn embedded() -> Digits {
        parse(include_bytes!("digits.bin")).expect("a test reads the embedded file")
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The pixels of each image, row by row, each 0 to [`INK`].
    pub fn images(&self) -> &[[u8; PIXELS]] {
        &self.images
    }

    /// The digit that each image shows.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// The images with these numbers as a tensor (n, 1, 8, 8) of values 0 to 1, and their labels.
    ///
    /// # Errors
    /// [`Error::Index`] for a number that no image has.
    pub fn batch(&self, rows: &[usize], device: &Device) -> Result<(Tensor, Vec<u32>)> {
        if let Some(&index) = rows.iter().find(|&&row| row >= self.len()) {
            return Err(Error::Index { op: "digits", index, size: self.len() });
        }
        let pixels = rows.iter().flat_map(|&row| self.images[row]).map(|p| p as f32 / INK as f32).collect();
        let labels = rows.iter().map(|&row| self.labels[row] as u32).collect();
        Ok((Tensor::from_vec(pixels, [rows.len(), 1, SIDE, SIDE], device)?, labels))
    }

    /// The same split for everybody: three fifths, one fifth, one fifth, in a fixed random order.
    pub fn split(&self) -> Split {
        let mut order = permutation(self.len(), 0x6469_6769_7473);
        let fifth = self.len().div_ceil(5);
        let test = order.split_off(order.len().saturating_sub(fifth));
        let validation = order.split_off(order.len().saturating_sub(fifth));
        Split { train: order, validation, test }
    }
}

const MAGIC: &[u8] = b"digits8\n";

/// Reads the format that `tests/oracle/pack_digits.py` writes and describes. Only what it would
/// write is accepted, byte for byte.
///
/// # Errors
/// [`Error::Data`] for anything else.
pub fn parse(bytes: &[u8]) -> Result<Digits> {
    let wrong = |message: String| Error::data("digits", message);
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| wrong("it does not begin with \"digits8\"".into()))?;
    let (count, rest) =
        rest.split_first_chunk::<4>().ok_or_else(|| wrong("it ends before the count".into()))?;
    let n = u32::from_le_bytes(*count) as usize;
    let short = || wrong(format!("it is too short for {n} images"));
    let (labels, rest) = rest.split_at_checked(n.div_ceil(2)).ok_or_else(short)?;
    let maps = n.checked_mul(PIXELS / 8).ok_or_else(short)?;
    let (maps, pixels) = rest.split_at_checked(maps).ok_or_else(short)?;
    let maps: Vec<u64> =
        maps.chunks_exact(8).map(|m| u64::from_le_bytes(m.try_into().expect("8 bytes"))).collect();
    let labels = nibbles(labels, n).ok_or_else(|| wrong("the half byte after the labels is not 0".into()))?;
    if let Some(i) = labels.iter().position(|&label| label as usize >= CLASSES) {
        return Err(wrong(format!("image {i} has the label {}", labels[i])));
    }
    let inked = maps.iter().map(|m| m.count_ones() as usize).sum();
    let pixels = nibbles(pixels, inked)
        .ok_or_else(|| wrong(format!("{} bytes are not {inked} pixels", pixels.len())))?;
    let mut pixels = pixels.into_iter();
    let image = |map: &u64| {
        std::array::from_fn(|i| if map >> i & 1 == 1 { 1 + pixels.next().unwrap_or(0) } else { 0 })
    };
    Ok(Digits { images: maps.iter().map(image).collect(), labels })
}

/// `n` half bytes, the low one first; None where the bytes hold more or fewer.
fn nibbles(bytes: &[u8], n: usize) -> Option<Vec<u8>> {
    let mut values: Vec<u8> = bytes.iter().flat_map(|b| [b & 15, b >> 4]).collect();
    if bytes.len() != n.div_ceil(2) || (values.len() > n && values[n] != 0) {
        return None;
    }
    values.truncate(n);
    Some(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_embedded_images_are_the_originals() {
        let digits = Digits::embedded();
        // Counted in scikit-learn's text file.
        assert_eq!(digits.len(), 1797);
        assert_eq!(digits.images.iter().flatten().map(|&p| p as usize).sum::<usize>(), 561_718);
        let counts: Vec<usize> = (0..10).map(|d| digits.labels.iter().filter(|&&l| l == d).count()).collect();
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert_eq!(digits.images[0][..16], [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0]);
        assert_eq!(digits.images.iter().flatten().max(), Some(&INK));
    }

    #[test]
    fn the_split_has_every_image_once() {
        let split = Digits::embedded().split();
        assert_eq!((split.train.len(), split.validation.len(), split.test.len()), (1077, 360, 360));
        let mut all = [&split.train[..], &split.validation, &split.test].concat();
        all.sort();
        assert_eq!(all, (0..1797).collect::<Vec<_>>());
        assert_eq!(Digits::embedded().split(), split);
        let none = Digits { images: vec![], labels: vec![] };
        assert!(none.split().train.is_empty());
    }

    #[test]
    fn a_batch_of_unknown_images_is_an_error() {
        let digits = Digits::embedded();
        assert!(matches!(
            digits.batch(&[1797], &Device::cpu()),
            Err(Error::Index { index: 1797, size: 1797, .. })
        ));
        assert_eq!(digits.batch(&[], &Device::cpu()).unwrap().0.dims(), [0, 1, 8, 8]);
    }

    #[test]
    fn malformed_files() {
        let good = include_bytes!("digits.bin");
        let change = |at: usize, to: u8| {
            let mut bytes = good.to_vec();
            bytes[at] = to;
            bytes
        };
        let huge = [MAGIC, &[255; 4]].concat();
        let one = |label: u8, map: u64, pixels: &[u8]| {
            [MAGIC, &[1, 0, 0, 0, label], &map.to_le_bytes(), pixels].concat()
        };
        assert_eq!(parse(&one(7, 0b101, &[0xf2])).unwrap().images[0][..4], [3, 0, 16, 0]);
        let bad: [&[u8]; 11] = [
            b"",
            b"digits8",
            MAGIC,
            &good[..good.len() - 1],
            &[&good[..], &[0]].concat(),
            &change(0, b'D'),
            &change(8, 0),
            &change(12, 0xff),
            &huge,
            &one(0x17, 0, &[]),
            &one(7, 1, &[0x12]),
        ];
        for bytes in bad {
            assert!(matches!(parse(bytes), Err(Error::Data { .. })), "{} bytes", bytes.len());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(head in any::<bool>(), count in 0u8..4, tail in prop::collection::vec(any::<u8>(), 0..80)) {
            let head = if head { [MAGIC, &[count, 0, 0, 0]].concat() } else { vec![] };
            if let Ok(digits) = parse(&[head, tail].concat()) {
                prop_assert!(digits.labels.iter().all(|&l| l < 10) && digits.images.len() == digits.labels.len());
            }
        }
    }
}
