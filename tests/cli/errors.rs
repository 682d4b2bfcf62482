//! Wrong inputs of `randlora finetune`, `eval` and `predict`: how each is refused.

use std::path::Path;

use crate::command::{Work, arguments, examples, failure, fixture, randlora, refs};
use crate::common;
use ::randlora::{DType, Device, Tensor, io::save_safetensors};
use serde_json::{Value, json};

/// Fails unless the command with these settings ends with 1 and one line that has these parts, and has
/// written nothing.
fn refused(work: &Work, name: &str, settings: &[&str], parts: &[&str]) {
    let before = work.tree();
    let message = failure(&refs(&arguments(work, name, settings)));
    for part in parts {
        assert!(message.contains(part), "{name} {settings:?}: {message}lacks: {part}");
    }
    assert!(message.len() < 1000 && !message.contains("panicked"), "{message}");
    assert!(work.tree() == before, "{name} {settings:?} has left something: {:?}", work.tree());
}

/// A copy of the tiny model with other settings in config.json.
fn configured(work: &Work, name: &str, changes: Value) -> String {
    let model = work.copy(name, &fixture("peft_training/model"));
    let mut config: Value = serde_json::from_slice(&work.read(&format!("{name}/config.json"))).expect("JSON");
    for (field, value) in changes.as_object().expect("an object") {
        config[field] = value.clone();
    }
    work.write(&format!("{name}/config.json"), config.to_string());
    model
}

/// A copy of the tiny model with these bytes as its tensors.
fn with_tensors(work: &Work, name: &str, bytes: &[u8]) -> String {
    let model = work.copy(name, &fixture("peft_training/model"));
    work.write(&format!("{name}/model.safetensors"), bytes);
    model
}

/// A safetensors file with this header and so many bytes of values.
fn safetensors(header: &str, bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; bytes]].concat()
}

#[test]
fn models() {
    let work = Work::new("wrong-models");
    let file = "model.safetensors: ";
    let good =
        std::fs::read(format!("{}/model.safetensors", fixture("peft_training/model"))).expect("a file");
    let cut = with_tensors(&work, "cut", &good[..good.len() - 100]);
    let header = [&(good.len() as u64).to_le_bytes()[..], &good[8..]].concat();
    let header = with_tensors(&work, "header", &header);
    let huge = r#"{"classifier.bias":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#;
    let huge = with_tensors(&work, "huge", &safetensors(huge, 8));
    let lacks = r#"{"classifier.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let lacks = with_tensors(&work, "lacks", &safetensors(lacks, 8));
    let nested = work.copy("nested", &fixture("peft_training/model"));
    work.write("nested/config.json", "[".repeat(100_000));
    let bare = work.copy("bare", &fixture("peft_training/model"));
    std::fs::remove_file(format!("{bare}/config.json")).expect("it is there");
    let data = work.path("train.jsonl");
    for (model, parts) in [
        (&"/nowhere/model".to_string(), &["/nowhere/model: there is no such folder"][..]),
        (&data, &["train.jsonl: this is a file: a model is a folder with"]),
        (&bare, &["bare: config.json is missing"]),
        (&cut, &["cut/model.safetensors: ", "bytes"]),
        (&header, &["header/model.safetensors: the header", "bytes"]),
        (&huge, &["huge/", file, "`classifier.bias`", "4294967296"]),
        (&lacks, &["config.json: `num_hidden_layers` is 2, but there are 1 tensors"]),
        (&nested, &["nested/config.json: no valid JSON: recursion limit exceeded"]),
    ] {
        refused(&work, "finetune", &["--model", model], parts);
        refused(&work, "eval", &["--model", model], parts);
    }
}

#[test]
fn configurations() {
    let work = Work::new("wrong-configurations");
    for (i, (changes, part)) in [
        (json!({ "model_type": "roberta" }), "the model's family is roberta: only bert is known here"),
        // What a file says stays in the error's one line.
        (json!({ "model_type": "a\nb\u{1b}[2J" }), "the model's family is a b [2J: only bert"),
        (json!({ "hidden_act": "swoosh" }), "`hidden_act` is swoosh, which is not known here"),
        (json!({ "vocab_size": 1u64 << 60 }), "more elements than memory can address"),
        (json!({ "vocab_size": "many" }), "`vocab_size` is \"many\", not a number"),
        (
            json!({ "num_hidden_layers": u64::MAX }),
            "`num_hidden_layers` is 18446744073709551615, but there are",
        ),
        (json!({ "num_attention_heads": 5 }), "heads"),
        (json!({ "num_attention_heads": 0 }), "heads"),
        (json!({ "hidden_dropout_prob": 1.0 }), "a rate of 1 does not lie in"),
        (json!({ "attention_probs_dropout_prob": -0.5 }), "a rate of -0.5 does not lie in"),
        (json!({ "classifier_dropout": 2 }), "a rate of 2 does not lie in"),
        (json!({ "layer_norm_eps": -1 }), "-1 cannot be added to a variance"),
        (json!({ "pad_token_id": 50 }), "the token 50 is not one of the 50"),
        (json!({ "is_decoder": true }), "`is_decoder` is true"),
    ]
    .into_iter()
    .enumerate()
    {
        let model = configured(&work, &format!("model-{i}"), changes);
        for name in ["finetune", "eval"] {
            refused(&work, name, &["--model", &model], &[&format!("model-{i}/config.json: "), part]);
        }
    }
    let model = configured(&work, "model-wide", json!({ "hidden_size": 48 }));
    let parts = ["model-wide: `", "24] where config.json makes it ", "48]"];
    refused(&work, "finetune", &["--model", &model], &parts);
}

#[test]
fn adapters() {
    let work = Work::new("wrong-adapters");
    let adapter = |name: &str, file: &str, contents: &[u8]| {
        let folder = work.copy(name, &fixture("our_adapters/lora"));
        work.write(&format!("{name}/{file}"), contents);
        folder
    };
    let config = "adapter_config.json";
    let tensors =
        std::fs::read(format!("{}/adapter_model.safetensors", fixture("our_adapters/lora"))).expect("a file");
    let three = r#"{ "task": "classify", "labels": ["a", "b", "c"], "max_length": 16 }"#;
    for (folder, parts) in [
        ("/nowhere/adapter".into(), &["/nowhere/adapter"][..]),
        (fixture("peft_training/model"), &["peft_training/model", config]),
        (
            adapter("loha", config, br#"{"peft_type": "LOHA", "r": 4}"#),
            &["loha/adapter_config.json: ", "LOHA", "RANDLORA, LORA, VERA and ADALORA"],
        ),
        (adapter("list", config, b"[1]"), &["list/adapter_config.json: a JSON object is needed"]),
        (
            adapter("deep", config, "[".repeat(100_000).as_bytes()),
            &["deep/adapter_config.json: no valid JSON"],
        ),
        (adapter("cut", "adapter_model.safetensors", &tensors[..999]), &["cut/adapter_model.safetensors: "]),
        (
            adapter("labels", "randlora.json", three.as_bytes()),
            &["labels: randlora.json names 3 outputs, the classifier has 2"],
        ),
        (
            adapter("task", "randlora.json", b"{}"),
            &["task/randlora.json: `task` is neither classify nor regress"],
        ),
        (fixture("peft_adapters/lora"), &["peft_adapters/lora", "adapter_model.safetensors"]),
    ] {
        refused(&work, "eval", &["--adapter", &folder], parts);
    }
    // Classifiers of senseless sizes, which take no room in the file.
    let source =
        common::tensors(Path::new(&format!("{}/adapter_model.safetensors", fixture("our_adapters/lora"))));
    for (name, sizes) in [("scalar", vec![]), ("endless", vec![1 << 26, 0]), ("long", vec![2])] {
        let folder = work.copy(name, &fixture("our_adapters/lora"));
        let tensor = |key: &str| match key.ends_with("classifier.weight") {
            true => Tensor::zeros(&sizes[..], DType::F32, &Device::cpu()).expect("it is small"),
            false => source.tensor(key, &Device::cpu()).expect("it is there"),
        };
        let changed: Vec<_> = source.entries().map(|(key, _)| (key.to_string(), tensor(key))).collect();
        let path = Path::new(&folder).join("adapter_model.safetensors");
        save_safetensors(&path, &changed, &[]).expect("it is written");
        refused(&work, "eval", &["--adapter", &folder], &[name, "`classifier.weight` is [", "(outputs, 24)"]);
    }
    // Of a model without a classifier.
    let model = fixture("bert/plain_f16");
    let data = work.path("eval.jsonl");
    let message = failure(&["eval", "--model", &model, "--data", &data]);
    assert!(
        message.contains("bert/plain_f16: the model has no classifier: name an adapter with `--adapter`"),
        "{message}"
    );
}

#[test]
fn tables() {
    let work = Work::new("wrong-tables");
    let mut rows = examples(8, 3);
    let lengths: Vec<usize> =
        rows.iter().map(|row| row["input_ids"].as_array().map_or(0, Vec::len)).collect();
    let mut changed = |name: &str, line: usize, field: &str, value: Value| {
        let before = rows[line - 1].clone();
        rows[line - 1][field] = value;
        let path = work.rows(name, &rows);
        rows[line - 1] = before;
        path
    };
    let vocab = changed("vocab.jsonl", 3, "input_ids", json!([2, 50, 3]));
    let negative = changed("negative.jsonl", 4, "input_ids", json!([2, -1, 3]));
    let long = changed("long.jsonl", 5, "input_ids", json!(vec![2; 17]));
    let none = changed("none.jsonl", 2, "input_ids", json!([]));
    let mask = changed("mask.jsonl", 6, "attention_mask", json!([1]));
    let label = changed("label.jsonl", 7, "label", json!("maybe"));
    let zeros = changed("zeros.jsonl", 6, "attention_mask", json!(vec![0; lengths[5]]));
    let segment = changed("segment.jsonl", 1, "token_type_ids", json!(vec![2; lengths[0]]));
    let empty = work.write("empty.tsv", "");
    let header = work.write("header.csv", "text,label\n");
    let ragged = work.write("ragged.csv", "text,label\na,yes\nb\nc,no\n");
    let wide = work.write("wide.csv", "text,label\na,yes\nb,no,more\n");
    let bytes = work.write("bytes.tsv", b"text\tlabel\na\tyes\n\xff\tno\n");
    let broken = work.write("broken.jsonl", "{\"text\": \"a\", \"label\": 1}\n{\"text\": \n");
    let other = work.write("file.parquet", "PAR1");
    let texts = work.write("texts.tsv", "text\tlabel\na\tyes\nb\tno\n");
    let folder = work.path("");
    for (settings, parts) in [
        (&["--train", "/nowhere/train.tsv"][..], &["/nowhere/train.tsv: No such file"][..]),
        (&["--train", &folder], &["this is a directory: give a file of examples"]),
        (&["--train", &other], &["file.parquet: the name does not tell the format: give `--format "]),
        (&["--train", &empty], &["empty.tsv: the file is empty: give one example in each row"]),
        (&["--train", &header], &["header.csv: the file has a header and no rows"]),
        (&["--train", &ragged], &["ragged.csv: line 3: column 2 is missing: the row has 1"]),
        (&["--train", &wide], &["wide.csv: line 3: 3 columns, but the header names 2"]),
        (&["--train", &bytes], &["bytes.tsv: line 3: this is not UTF-8"]),
        (&["--train", &broken], &["broken.jsonl: line 2: ", "give one JSON object on each line"]),
        (&["--train", &texts], &["tokenizer.json: there is no such file: without it, give `input_ids`"]),
        (
            &["--train", &texts, "--label", "class"],
            &["texts.tsv: there is no column `class`; the first row has: `text`, `label`"],
        ),
        (&["--train", &texts, "--text", "3"], &["texts.tsv: there is no column 3: the first row has 2"]),
        (
            &["--label", "class"],
            &["train.jsonl: line 1: there is no field `class`; the row has: `input_ids`, `label`"],
        ),
        (&["--text", "1"], &["train.jsonl: the fields of JSONL have no numbers: give a name"]),
        (&["--train", &vocab], &["vocab.jsonl: line 3: the token 50 is not one of the model's 50"]),
        (&["--train", &negative], &["negative.jsonl: line 4: `input_ids` holds -1"]),
        (&["--train", &long], &["long.jsonl: line 5: 17 `input_ids` where at most 16 fit"]),
        (&["--train", &none], &["none.jsonl: line 2: `input_ids` is empty"]),
        (&["--train", &mask], &["mask.jsonl: line 6: `attention_mask` has 1 values, `input_ids` has "]),
        (&["--train", &zeros], &["zeros.jsonl: line 6: there is no token that counts"]),
        (&["--train", &segment], &["segment.jsonl: line 1: the segment 2 is not one of the model's 2"]),
        (&["--eval", &label], &["label.jsonl: line 7: label `maybe` is not among: no, yes"]),
        (&["--task", "regress"], &["train.jsonl: line 1: label `no` is not a finite number"]),
    ] {
        refused(&work, "finetune", settings, parts);
    }
    refused(
        &work,
        "eval",
        &["--data", &label],
        &["label.jsonl: line 7: label `maybe` is not among: no, yes"],
    );
    refused(&work, "eval", &["--data", &vocab], &["vocab.jsonl: line 3: the token 50"]);
    let one = work.rows("one.jsonl", &examples(1, 3));
    refused(
        &work,
        "finetune",
        &["--train", &one],
        &["one.jsonl: there is only the label `no`: classes take at least two"],
    );
    let model = fixture("peft_training/model");
    let message = failure(&["predict", "--model", &model, "a text"]);
    assert!(message.contains("tokenizer.json: there is no such file"), "{message}");
    // A tokenizer of another model.
    let model = work.copy("other", &model);
    let vocab = json!({ "type": "WordLevel", "vocab": { "many": 77 }, "unk_token": "many" });
    work.write(
        "other/tokenizer.json",
        json!({ "version": "1.0", "added_tokens": [], "model": vocab }).to_string(),
    );
    refused(
        &work,
        "eval",
        &["--model", &model, "--data", &texts],
        &["texts.tsv: line 2: the token 77 is not one of"],
    );
    let message = failure(&["predict", "--model", &model, "a text"]);
    assert!(message.contains("other/tokenizer.json: the token 77 is not one of the model's 50"), "{message}");
    work.write("other/tokenizer.json", "{");
    refused(&work, "eval", &["--model", &model], &["other/tokenizer.json: EOF while parsing"]);
}

#[test]
fn settings() {
    let work = Work::new("wrong-settings");
    refused(
        &work,
        "finetune",
        &["--targets", "quary"],
        &["`quary` matches no layer; there are: bert.encoder.layer.0.attention.self.query, "],
    );
    refused(&work, "finetune", &["--targets", "(query"], &["targets: `(query` is no regular expression"]);
    refused(
        &work,
        "finetune",
        &["--targets", "bert.*nothing"],
        &["the pattern `bert.*nothing` matches no layer; there are: "],
    );
    refused(
        &work,
        "finetune",
        &["--max-length", "17"],
        &["--max-length: 17 is more than the model's 16 positions"],
    );
}

#[test]
fn outputs() {
    let work = Work::new("wrong-outputs");
    let (file, taken) = (work.path("train.jsonl"), work.copy("taken", &fixture("our_adapters/lora")));
    let below = format!("{file}/out");
    refused(
        &work,
        "finetune",
        &["--out", &taken],
        &["taken: the folder exists: name another one, or write into it with `--force`"],
    );
    refused(
        &work,
        "finetune",
        &["--out", &file],
        &["train.jsonl: this is a file: name a folder to write to"],
    );
    refused(&work, "finetune", &["--out", &below], &["train.jsonl/out: "]);
    refused(&work, "eval", &["--logits", &taken], &["taken: this is a folder, not a file"]);
    refused(
        &work,
        "eval",
        &["--logits", "/nowhere/logits.safetensors"],
        &["/nowhere/logits.safetensors: No such file"],
    );
    // What is there already stays beside what is written.
    let forced = arguments(&work, "finetune", &["--out", &taken, "--force", "--epochs", "1"]);
    assert!(randlora(&refs(&forced)).status.success());
    assert!(
        work.names("taken").contains(&"expected.safetensors".into())
            && work.names("taken").contains(&"best".into())
    );
}

#[test]
fn misuse_ends_with_2() {
    let work = Work::new("misuse");
    let (adapter, before) = (fixture("our_adapters/lora"), work.tree());
    for settings in [
        &["--nonsense"][..],
        &["--method", "none"],
        &["--task", "rank"],
        &["--rank", "0"],
        &["--epochs", "0"],
        &["--epochs", "18446744073709551615"],
        &["--batch-size", "-1"],
        &["--accumulate", "0"],
        &["--lr", "nan"],
        &["--lr", "-1"],
        &["--scale", "nan"],
        &["--alpha", "inf"],
        &["--alpha", "1", "--scale", "1"],
        &["--dropout", "1"],
        &["--warmup", "1.5"],
        &["--text", "0"],
        &["--threads", "0"],
        &["--threads", "100000"],
        &["--header", "--no-header"],
        &["--adapter", &adapter, "--method", "lora"],
        &["--adapter", &adapter, "--task", "regress"],
        &["--adapter", &adapter, "--separator", ";"],
    ] {
        let output = randlora(&refs(&arguments(&work, "finetune", settings)));
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{settings:?}: {message}");
        assert!(output.stdout.is_empty() && message.starts_with("error: "), "{message}");
    }
    for args in
        [&["finetune"][..], &["eval"], &["predict"], &["eval", "--model", "a", "--data", "b", "--json", "c"]]
    {
        let output = randlora(args);
        assert!(output.status.code() == Some(2) && output.stdout.is_empty(), "{args:?}");
    }
    assert!(work.tree() == before);
}
