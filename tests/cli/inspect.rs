//! `randlora inspect` from outside.

use std::path::Path;
use std::process::Stdio;

use crate::command::{self, Work, fixture};
use randlora::io::{Access, SafeTensors};
use randlora::{DType, Device, Tensor};
use serde_json::{Value, json};

/// The arguments of the whole command.
fn inspect<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["inspect"], args].concat()
}

fn text(args: &[&str]) -> String {
    command::text(&inspect(args))
}

fn object(args: &[&str]) -> Value {
    command::object(&inspect(args))
}

fn failure(args: &[&str]) -> String {
    command::failure(&inspect(args))
}

fn sum(list: &Value, field: &str) -> u64 {
    list.as_array().expect("a list").iter().map(|x| x[field].as_u64().expect("a number")).sum()
}

#[test]
fn a_model_folder() {
    let model = object(&[&fixture("bert/multi_label_sharded")]);
    assert_eq!((&model["kind"], &model["family"]), (&json!("model"), &json!("bert")));
    let architecture = json!({
        "layers": 2, "width": 24, "heads": 4, "hidden": 33, "vocab": 27, "positions": 12, "segments": 3,
        "labels": 4,
    });
    assert_eq!(model["architecture"], architecture);
    // Embeddings and their norm; two blocks; pooler; classifier.
    let parameters = (27 + 12 + 3 + 2) * 24
        + 2 * (4 * (24 * 24 + 24) + (24 * 33 + 33) + (33 * 24 + 24) + 4 * 24)
        + (24 * 24 + 24)
        + (4 * 24 + 4);
    assert_eq!(model["parameters"], parameters);
    assert_eq!(
        (&model["bytes"], &model["dtypes"]),
        (&json!(4 * parameters), &json!({ "F32": 4 * parameters }))
    );
    assert_eq!(sum(&model["tensors"], "bytes"), 4 * parameters);
    let classifier = json!({ "name": "classifier.weight", "dtype": "F32", "shape": [4, 24], "bytes": 384 });
    assert!(model["tensors"].as_array().is_some_and(|tensors| tensors.contains(&classifier)));
    assert_eq!(model.get("label_names"), None);
}

#[test]
fn a_model_folder_to_read() {
    let text = text(&[&fixture("bert/plain_f16")]);
    let line =
        |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_string();
    assert_eq!(line("family"), "family      bert");
    assert_eq!(line("width"), "width       18");
    assert_eq!(line("parameters"), "parameters  2,874");
    assert_eq!(line("of F16"), "of F16      5,748 B");
    let words = line("embeddings.word_embeddings.weight");
    assert!(words.contains("  F16  ") && words.contains("  21×18") && words.ends_with("756 B"), "{words}");
    // Columns begin below their heads.
    let (head, place) = (line("tensor "), |line: &str, word: &str| line.find(word));
    assert_eq!(place(&head, "dtype"), place(&words, "F16"));
}

#[test]
fn another_family_is_shown_without_its_architecture() {
    let work = Work::empty("inspect-bert-regression");
    let folder = work.copy("folder", &fixture("bert/regression"));
    work.write("folder/config.json", r#"{"model_type": "gpt2"}"#);
    let model = object(&[&folder]);
    assert_eq!((&model["family"], &model["architecture"]), (&json!("gpt2"), &Value::Null));
    assert!(model["parameters"].as_u64() > Some(0));
    work.write("folder/config.json", r#"{"model_type": "bert"}"#);
    assert!(failure(&[&folder]).contains("config.json: `vocab_size` is missing"));
}

#[test]
fn a_file_of_tensors() {
    let path = fixture("bert/single_label/model.safetensors");
    let file = object(&[&path]);
    assert_eq!((&file["kind"], &file["metadata"]), (&json!("safetensors"), &json!({ "format": "pt" })));
    let folder = object(&[&fixture("bert/single_label")]);
    assert!(["parameters", "bytes", "dtypes", "tensors"].iter().all(|field| file[field] == folder[field]));
    assert!(text(&[&path]).starts_with("metadata format  pt\nparameters "));
}

#[test]
fn an_adapter_of_randlora() {
    let adapter = object(&[&fixture("peft_adapters/randlora")]);
    for (field, wanted) in [
        ("kind", json!("adapter")),
        ("method", json!("randlora")),
        ("rank", json!(5)),
        ("scale", json!(20.0)),
        ("dropout", json!(0.0)),
        ("base_model", json!("model")),
        // Layers of 12×12, 20×12 and 12×20: n = ⌈12/5⌉ and n·(r + m) numbers each.
        ("adapter_parameters", json!(13 * 3 * (5 + 12))),
        ("whole_parameters", json!(3 * 12 + 3)),
        ("trained_parameters", json!(13 * 3 * (5 + 12) + 3 * 12 + 3)),
    ] {
        assert_eq!(adapter[field], wanted, "{field}");
    }
    let whole = json!([
        { "name": "classifier.bias", "shape": [3], "parameters": 3 },
        { "name": "classifier.weight", "shape": [3, 12], "parameters": 36 },
    ]);
    assert_eq!(adapter["whole"], whole);
    let (a, b) = (adapter["bases"]["a"].clone(), adapter["bases"]["b"].clone());
    assert_eq!((a, b), (json!([5, 20]), json!([20, 4, 5])));
    assert_eq!(adapter["bases"]["bytes"], 4 * (5 * 20 + 20 * 4 * 5));
    let layers = adapter["layers"].as_array().expect("a list");
    assert_eq!(layers.len(), 13);
    let query = &layers[2];
    assert_eq!(query["name"], "bert.encoder.layer.0.attention.self.query");
    let file = fixture("peft_adapters/randlora/adapter_model.safetensors");
    for part in ["lambda", "gamma"] {
        let name = format!("base_model.model.bert.encoder.layer.0.attention.self.query.randlora_{part}");
        close(&query[part], norm(&tensor(&file, &name)));
    }
    assert_eq!(query.get("delta"), None);
}

#[test]
fn updates_are_measured_against_the_model() {
    let (folder, model) = (fixture("peft_adapters/lora"), fixture("peft_adapters/model"));
    let adapter = object(&[&folder, "--model", &model]);
    assert_eq!(adapter["bases"], Value::Null);
    let scale = adapter["scale"].as_f64().expect("a number");
    let file = format!("{folder}/adapter_model.safetensors");
    let layers = adapter["layers"].as_array().expect("a list");
    assert!(!layers.is_empty());
    for layer in layers {
        let name = layer["name"].as_str().expect("a name");
        let part = |part: &str| tensor(&file, &format!("base_model.model.{name}.lora_{part}.weight"));
        let delta = norm(&part("B").matmul(&part("A")).expect("they fit")) * scale;
        close(&layer["a"], norm(&part("A")));
        close(&layer["b"], norm(&part("B")));
        close(&layer["delta"], delta);
        let weight = tensor(&format!("{model}/model.safetensors"), &format!("{name}.weight"));
        close(&layer["relative"], delta / norm(&weight));
        assert_eq!(json!([layer["outputs"], layer["inputs"]]), json!(weight.dims()));
    }
    let read = text(&[&fixture("peft_adapters/randlora"), "--model", &model]);
    let head = read.lines().find(|line| line.starts_with("layer ")).unwrap_or_default();
    let columns: Vec<&str> = head.split_whitespace().collect();
    assert_eq!(columns, ["layer", "parameters", "‖λ‖", "‖γ‖", "‖ΔW‖", "‖ΔW‖/‖W‖"]);
}

fn tensor(file: &str, name: &str) -> Tensor {
    let file = SafeTensors::open(Path::new(file), Access::Read).expect("a file");
    file.tensor(name, &Device::cpu()).and_then(|x| x.to_dtype(DType::F64)).expect(name)
}

fn norm(x: &Tensor) -> f64 {
    x.to_vec::<f64>().expect("f64").iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn close(found: &Value, wanted: f64) {
    let found = found.as_f64().expect("a number");
    assert!((found - wanted).abs() <= 1e-5 * wanted, "{found} {wanted}");
}

#[test]
fn task_and_labels_beside_an_adapter() {
    let work = Work::empty("inspect-peft_adapters-lora-pooler-saved");
    let folder = work.copy("folder", &fixture("peft_adapters/lora-pooler-saved"));
    work.write("folder/randlora.json", r#"{"task": "classify", "labels": ["bad", "so-so", "good"]}"#);
    let adapter = object(&[&folder]);
    assert_eq!(
        (&adapter["task"], &adapter["label_names"]),
        (&json!("classify"), &json!(["bad", "so-so", "good"]))
    );
    let read = text(&[&folder]);
    assert!(read.contains("classify\n") && read.contains("bad, so-so, good\n"), "{read}");
    work.write("folder/randlora.json", "{");
    assert!(failure(&[&folder]).contains("randlora.json: no valid JSON"));
}

fn plan(method: &str, more: &[&str]) -> Value {
    let model = fixture("bert/plain_f16");
    let args = [&model, "--method", method, "--labels", "3", "--length", "10"];
    object(&[&args[..], more].concat())
}

#[test]
fn plans_count_what_is_trained() {
    let total = 2874 + 3 * 18 + 3;
    let rank = &["--rank", "4"][..];
    for (method, more, adapters, trained, layers) in [
        ("randlora", rank, 3 * 5 * (4 + 18), 3 * 5 * (4 + 18) + 57, 3),
        ("lora", rank, 3 * 4 * (18 + 18), 3 * 4 * (18 + 18) + 57, 3),
        ("full", &[], 0, total, 0),
        ("head", &[], 0, 57, 0),
    ] {
        let plan = plan(method, more);
        assert_eq!((&plan["method"], &plan["classifier_parameters"]), (&json!(method), &json!(57)));
        assert_eq!(plan["rank"], if more.is_empty() { Value::Null } else { json!(4) });
        assert_eq!(plan["adapter_parameters"], adapters, "{method}");
        assert_eq!(plan["trained_parameters"], trained, "{method}");
        assert_eq!(plan["parameters"], total + adapters, "{method}");
        assert_eq!(plan["layers"].as_array().map(Vec::len), Some(layers), "{method}");
        assert_eq!(sum(&plan["layers"], "parameters"), adapters);
        assert_eq!(plan["trained_bytes"], 4 * trained);
        assert_eq!(plan["moment_bytes"], 8 * trained);
    }
    let bases = 4 * (4 * 18 + 18 * 5 * 4);
    assert_eq!(plan("randlora", rank)["bases_bytes"], bases);
    let with = |bases: &str| plan("randlora", &["--rank", "4", "--bases", bases]);
    for name in ["uniform", "normal", "signs", "sparse", "very-sparse"] {
        assert_eq!(with(name)["bases_bytes"], bases, "{name}");
    }
    let block = with("block");
    assert_eq!(block["bases_bytes"], 4 * (4 * 18 + 18 * 4));
    assert_eq!(block["adapter_parameters"], 3 * 5 * (4 + 18));
    assert_eq!(plan("lora", rank)["bases_bytes"], 0);
}

#[test]
fn memory_in_training_is_measured() {
    let peak = |method: &str, batch: &str| {
        let plan = plan(method, &["--batch-size", batch]);
        let bytes = |field: &str| plan[field].as_u64().expect("a number");
        let held =
            ["frozen_bytes", "bases_bytes", "trained_bytes", "gradient_bytes", "moment_bytes"].map(bytes);
        let peak = bytes("training_peak_bytes");
        assert!(peak > held.iter().sum(), "{method}: {peak} {held:?}");
        peak
    };
    assert_eq!(peak("randlora", "4"), peak("randlora", "4"));
    assert!(peak("randlora", "8") > peak("randlora", "4"));
    assert!(peak("head", "8") < peak("lora", "8") && peak("lora", "8") < peak("full", "8"));
}

#[test]
fn defaults_and_targets_of_a_plan() {
    let model = fixture("bert/regression");
    let plan = object(&[&model, "--method", "lora", "--targets", r".*(query|dense)"]);
    let defaults = ["rank", "labels", "batch_size", "length"].map(|field| plan[field].as_u64());
    assert_eq!(defaults, [8, 1, 32, 11].map(Some));
    let names = plan["layers"].as_array().expect("a list").iter().filter_map(|layer| layer["name"].as_str());
    let block = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"];
    let block = block.map(|name| format!("bert.encoder.layer.0.{name}"));
    let wanted: Vec<&str> = block.iter().map(String::as_str).chain(["bert.pooler.dense"]).collect();
    assert_eq!(names.collect::<Vec<_>>(), wanted);
    let all = object(&[&model, "--method", "lora", "--targets", "all-linear"]);
    assert_eq!(all["layers"].as_array().map(Vec::len), Some(7));
    let output = command::randlora(&inspect(&[&model, "--method", "head"]));
    let read = String::from_utf8_lossy(&output.stdout);
    assert!(read.contains("measured, 32 texts of 11 tokens") && !read.contains("layers"), "{read}");
}

#[test]
fn what_cannot_be_inspected_is_named() {
    let model = &fixture("bert/bf16");
    let adapter = &fixture("peft_adapters/lora");
    for (args, wanted) in [
        (&["/nowhere/at-all"][..], "/nowhere/at-all: there is no such file or folder"),
        (&[&fixture("bert")], "neither a model (config.json) nor an adapter (adapter_config.json)"),
        (&[&fixture("bert.py")], "bert.py: the header"),
        (&[&fixture("peft_adapters/refused/ia3")], "adapter_config.json: peft_type IA3"),
        (&[&fixture("peft_adapters/refused/no-lambda")], "randlora_lambda"),
        (&[adapter, "--model", "/nowhere"], "/nowhere: there is no such folder"),
        (&[model, "--model", model], "bert/bf16: this is no adapter folder"),
        (&[adapter, "--method", "lora"], "this is an adapter: --method plans the training of a model folder"),
        (&[model, "--method", "lora", "--targets", "quary"], "`quary` matches no layer; there are: bert.enc"),
        (&[model, "--method", "lora", "--targets", "(query"], "`(query` is no regular expression: unclosed"),
        (&[model, "--method", "head", "--length", "14"], "--length 14: the model in "),
    ] {
        let message = failure(args);
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn misuse_ends_with_2() {
    let model = &fixture("bert/bf16");
    for args in [
        &[][..],
        &[model, "--method", "qlora"],
        &[model, "--rank", "4"],
        &[model, "--bases", "block"],
        &[model, "--method", "randlora", "--bases", "blocks"],
        &[model, "--method", "lora", "--rank", "0"],
        &[model, "--method", "lora", "--model", model],
    ] {
        let output = command::randlora(&inspect(args));
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    assert!(text(&["--help"]).contains("Examples:\n  randlora inspect "));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let mut child = command::command(&inspect(&[&fixture("bert/single_label")]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
