//! From texts to tokens.

use std::path::{Path, PathBuf};

use randlora::Result;
use randlora::models::BertConfig;
use randlora::nn::TokenIds;
use tokenizers::{Tokenizer, TruncationParams, TruncationStrategy};

use super::table::{Example, Input, wrong, wrong_at};

/// A model's tokenizer. Without one, examples have to bring their tokens.
#[derive(Debug)]
pub(crate) struct Encoder {
    tokenizer: Option<Tokenizer>,
    path: PathBuf,
    max_length: usize,
    vocab: usize,
    segments: usize,
}

impl Encoder {
    /// The tokenizer of a model folder, for texts of at most so many tokens.
    ///
    /// # Errors
    /// [`Error::Data`] for a malformed tokenizer.json. That there is none is an error when a text comes.
    pub(crate) fn open(folder: &Path, config: &BertConfig, max_length: usize) -> Result<Encoder> {
        let path = folder.join("tokenizer.json");
        let BertConfig { vocab, segments, .. } = *config;
        if !path.exists() {
            return Ok(Encoder { tokenizer: None, path, max_length, vocab, segments });
        }
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| wrong(&path, e.to_string()))?;
        let truncation =
            TruncationParams { max_length, strategy: TruncationStrategy::LongestFirst, ..Default::default() };
        // Its own settings may pad all texts to one length.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(Some(truncation)).map_err(|e| wrong(&path, e.to_string()))?;
        Ok(Encoder { tokenizer: Some(tokenizer), path, max_length, vocab, segments })
    }

    /// The tokens of all examples of a file.
    ///
    /// # Errors
    /// [`Error::Data`] with file and line for tokens that are too many or that the model does not have.
    pub(crate) fn examples(&self, path: &Path, examples: &[Example]) -> Result<Vec<TokenIds>> {
        let one = |example: &Example| {
            let wrong = |message: String| wrong_at(path, example.line, message);
            let tokens = match &example.input {
                Input::Text { first, second } => self.encode(first, second.as_deref())?,
                Input::Ids { input_ids, .. } if input_ids.len() > self.max_length => {
                    let (found, limit) = (input_ids.len(), self.max_length);
                    return Err(wrong(format!("{found} `input_ids` where at most {limit} fit")));
                }
                Input::Ids { input_ids, attention_mask, token_type_ids } => TokenIds {
                    ids: input_ids.clone(),
                    segments: token_type_ids.clone().unwrap_or_default(),
                    mask: attention_mask.clone().unwrap_or_default(),
                },
            };
            self.check(&tokens).map_err(wrong)?;
            Ok(tokens)
        };
        examples.iter().map(one).collect()
    }

    /// The tokens of a text or a pair of them.
    ///
    /// # Errors
    /// [`Error::Data`] that names tokenizer.json where it is missing or made for another model.
    pub(crate) fn text(&self, first: &str, second: Option<&str>) -> Result<TokenIds> {
        let tokens = self.encode(first, second)?;
        self.check(&tokens).map_err(|message| wrong(&self.path, message))?;
        Ok(tokens)
    }

    /// What the model could not read.
    fn check(&self, tokens: &TokenIds) -> std::result::Result<(), String> {
        let beyond = |what: &str, numbers: &[u32], count: usize| {
            let found = numbers.iter().find(|&&number| number as usize >= count);
            found.map_or(Ok(()), |found| Err(format!("the {what} {found} is not one of the model's {count}")))
        };
        beyond("token", &tokens.ids, self.vocab)?;
        beyond("segment", &tokens.segments, self.segments)?;
        match tokens.ids.is_empty() || (!tokens.mask.is_empty() && !tokens.mask.contains(&true)) {
            true => Err("there is no token that counts: give at least one".into()),
            false => Ok(()),
        }
    }

    fn encode(&self, first: &str, second: Option<&str>) -> Result<TokenIds> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(wrong(
                &self.path,
                "there is no such file: without it, give `input_ids` instead of texts (JSONL)",
            ));
        };
        let encoding = match second {
            Some(second) => tokenizer.encode_fast((first, second), true),
            None => tokenizer.encode_fast(first, true),
        };
        let encoding = encoding.map_err(|e| wrong(&self.path, e.to_string()))?;
        let segments = if second.is_some() { encoding.get_type_ids().to_vec() } else { vec![] };
        Ok(TokenIds { ids: encoding.get_ids().to_vec(), segments, mask: vec![] })
    }
}
