//! What a model of text reads: tokens, by number, in batches.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ops::index::Ids;

/// The tokens of one text, or of a pair of texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenIds {
    /// Each token's number in the vocabulary.
    pub ids: Vec<u32>,
    /// Which text of a pair each token belongs to; nothing where all are 0.
    pub segments: Vec<u32>,
    /// Whether each token is one that others may attend to; nothing where all are.
    pub mask: Vec<bool>,
}

impl TokenIds {
    /// An error unless there is a segment and a mask for every token, or none, and a token counts.
    fn check(&self, row: usize) -> Result<()> {
        let tokens = self.ids.len();
        for (what, found) in [("segments", self.segments.len()), ("places in the mask", self.mask.len())] {
            if found != 0 && found != tokens {
                let message =
                    format!("{found} {what} for {tokens} tokens: give one for each, or none at all");
                return Err(Error::data(format!("row {row} of the batch"), message));
            }
        }
        if tokens == 0 || (!self.mask.is_empty() && !self.mask.contains(&true)) {
            let message = "it has no token that counts: leave it out, or give it at least one";
            return Err(Error::data(format!("row {row} of the batch"), message));
        }
        Ok(())
    }
}

/// Texts of one length T side by side, B of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// Tokens (B, T).
    pub ids: Ids,
    /// Segments (B, T).
    pub segments: Ids,
    /// True where a token may be attended to, B·T in order; None where all may.
    pub keys: Option<Arc<[bool]>>,
}

impl TokenBatch {
    /// Rows made as long as the longest by `pad` tokens at their ends, which nothing attends to. A
    /// batch without rows has the shape (0, 1).
    ///
    /// ```
    /// use randlora::nn::{TokenBatch, TokenIds};
    ///
    /// let short = TokenIds { ids: vec![101, 102], ..TokenIds::default() };
    /// let long = TokenIds { ids: vec![101, 7592, 102], ..TokenIds::default() };
    /// let batch = TokenBatch::pad(&[&short, &long], 0)?;
    /// assert_eq!(batch.ids.as_slice(), [101, 102, 0, 101, 7592, 102]);
    /// assert_eq!(batch.keys.as_deref(), Some(&[true, true, false, true, true, true][..]));
    /// # Ok::<(), randlora::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Data`] for a row whose parts differ in length, or in which no token counts.
    pub fn pad(rows: &[&TokenIds], pad: u32) -> Result<TokenBatch> {
        rows.iter().enumerate().try_for_each(|(i, row)| row.check(i))?;
        let places = rows.iter().map(|row| row.ids.len()).max().unwrap_or(1);
        let shape = [rows.len(), places];
        let keys = fill(rows, places, false, |row| (&row.mask, true));
        Ok(TokenBatch {
            ids: Ids::new(fill(rows, places, pad, |row| (&row.ids, pad)), shape)?,
            segments: Ids::new(fill(rows, places, 0, |row| (&row.segments, 0)), shape)?,
            keys: keys.contains(&false).then(|| keys.into()),
        })
    }
}

/// A part of all rows, each row made `places` long by `pad`. Each part comes with what its elements
/// are where it is empty.
fn fill<T: Copy>(
    rows: &[&TokenIds],
    places: usize,
    pad: T,
    part: impl Fn(&TokenIds) -> (&Vec<T>, T),
) -> Vec<T> {
    let mut filled = Vec::with_capacity(rows.len().saturating_mul(places));
    for (i, row) in rows.iter().enumerate() {
        let (part, missing) = part(row);
        filled.extend_from_slice(part);
        filled.resize(i * places + row.ids.len(), missing);
        filled.resize((i + 1) * places, pad);
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ids: &[u32]) -> TokenIds {
        TokenIds { ids: ids.to_vec(), ..TokenIds::default() }
    }

    #[test]
    fn rows_are_padded_to_the_longest() -> Result<()> {
        let pair = TokenIds { segments: vec![0, 1, 1], mask: vec![true, false, true], ..row(&[5, 6, 7]) };
        let batch = TokenBatch::pad(&[&row(&[1, 2]), &pair, &row(&[3])], 9)?;
        assert_eq!((batch.ids.shape().dims(), batch.segments.shape().dims()), (&[3, 3][..], &[3, 3][..]));
        assert_eq!(batch.ids.as_slice(), [1, 2, 9, 5, 6, 7, 3, 9, 9]);
        assert_eq!(batch.segments.as_slice(), [0, 0, 0, 0, 1, 1, 0, 0, 0]);
        let keys = [true, true, false, true, false, true, true, false, false];
        assert_eq!(batch.keys.as_deref(), Some(&keys[..]));
        Ok(())
    }

    #[test]
    fn no_mask_where_nothing_is_hidden() -> Result<()> {
        let masked = TokenIds { mask: vec![true, true], ..row(&[3, 4]) };
        assert_eq!(TokenBatch::pad(&[&row(&[1, 2]), &masked], 0)?.keys, None);
        let nobody = TokenBatch::pad(&[], 0)?;
        assert_eq!((nobody.ids.shape().dims(), nobody.keys), (&[0, 1][..], None));
        Ok(())
    }

    #[test]
    fn rows_that_do_not_fit_are_named() {
        let text = |wrong: TokenIds| TokenBatch::pad(&[&row(&[1]), &wrong], 0).unwrap_err().to_string();
        assert_eq!(
            text(TokenIds { segments: vec![0], ..row(&[1, 2]) }),
            "row 1 of the batch: 1 segments for 2 tokens: give one for each, or none at all"
        );
        assert_eq!(
            text(TokenIds { mask: vec![true; 3], ..row(&[1, 2]) }),
            "row 1 of the batch: 3 places in the mask for 2 tokens: give one for each, or none at all"
        );
        let nothing =
            "row 1 of the batch: it has no token that counts: leave it out, or give it at least one";
        assert_eq!(text(row(&[])), nothing);
        assert_eq!(text(TokenIds { mask: vec![false; 2], ..row(&[1, 2]) }), nothing);
    }
}
