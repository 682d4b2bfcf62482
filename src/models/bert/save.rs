//! BERT as a model folder that transformers reads.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::{Checkpoint, save_safetensors, write_whole};
use crate::models::bert::Bert;
use crate::nn::Module;

/// What a model's outputs mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The classes' names, in the order of the outputs; empty for a regression.
    pub labels: Vec<String>,
    /// What the outputs are trained as, in transformers' words: `single_label_classification`,
    /// `multi_label_classification` or `regression`.
    pub problem: Option<String>,
}

/// What a tokenizer is made of, beside the model.
const TOKENIZER: [&str; 5] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "added_tokens.json"];

impl Bert {
    /// Writes the model with the configuration and the tokenizer of the folder that it came from:
    /// config.json, model.safetensors and the tokenizer's files, each whole.
    ///
    /// # Errors
    /// [`Error::Config`] for a model with adapters, which belong into files of their own or merged into
    /// its weights; [`Error::Io`] where the folder cannot be written.
    pub fn save(&self, from: &Checkpoint, head: &Head, folder: &Path) -> Result<()> {
        if let Some((name, _)) = self.linears().iter().find(|(_, layer)| layer.adapter().is_some()) {
            let message = format!("`{name}` has one: merge it, or save it with `save_peft`");
            return Err(Error::config("adapter", message));
        }
        let error = |source| Error::Io { path: folder.to_path_buf(), source };
        fs::create_dir_all(folder).map_err(error)?;
        let tensors: Vec<_> = self.state().into_iter().collect();
        save_safetensors(&folder.join("model.safetensors"), &tensors, &[("format", "pt")])?;
        for name in TOKENIZER {
            let (source, target) = (from.folder().join(name), folder.join(name));
            if source.is_file() {
                let bytes = fs::read(&source).map_err(|e| Error::Io { path: source, source: e })?;
                write_whole(&target, |out| out.write_all(&bytes))?;
            }
        }
        let text = serde_json::to_string_pretty(&self.config_of(from, head)).unwrap_or_default();
        write_whole(&folder.join("config.json"), |out| writeln!(out, "{text}"))
    }

    /// The configuration that the model came with, with what its head has changed.
    fn config_of(&self, from: &Checkpoint, head: &Head) -> Map<String, Value> {
        let mut config = from.config().fields().clone();
        let dtypes = self.parameters().into_iter().map(|(_, p)| p.value().dtype());
        // transformers rounds to the type that the configuration names.
        let dtype = match dtypes.max_by_key(|dtype| dtype.size()) {
            Some(DType::BF16) => "bfloat16",
            Some(DType::F16) => "float16",
            Some(DType::F64) => "float64",
            _ => "float32",
        };
        for old in ["torch_dtype", "dtype"] {
            config.remove(old);
        }
        config.insert("dtype".into(), json!(dtype));
        let count = self.config().labels;
        if count == 0 {
            config.insert("architectures".into(), json!(["BertModel"]));
            return config;
        }
        config.insert("architectures".into(), json!(["BertForSequenceClassification"]));
        if let Some(problem) = &head.problem {
            config.insert("problem_type".into(), json!(problem));
        }
        let name = |i: usize| head.labels.get(i).cloned().unwrap_or_else(|| format!("LABEL_{i}"));
        let names: Map<String, Value> = (0..count).map(|i| (i.to_string(), json!(name(i)))).collect();
        let numbers: Map<String, Value> = (0..count).map(|i| (name(i), json!(i))).collect();
        config.insert("id2label".into(), Value::Object(names));
        config.insert("label2id".into(), Value::Object(numbers));
        config
    }
}
