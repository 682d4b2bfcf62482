//! `randlora finetune` and `eval` from outside, on a tiny model with examples that bring their tokens.

use std::fs;
use std::path::Path;

use crate::command::{self, Work, arguments, examples, fixture, object, randlora, refs, text};
use crate::common;
use serde_json::{Map, Value, json};

const ADAPTER: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "randlora.json"];

/// Settings with which each method learns the examples.
const METHODS: [(&str, &str); 2] = [("randlora", "1e-2"), ("lora", "1e-2")];

fn training(work: &Work, out: &str, settings: &[&str]) -> Vec<String> {
    let out = work.path(out);
    arguments(work, "finetune", &[&["--out", &out], settings].concat())
}

fn train(work: &Work, out: &str, settings: &[&str]) -> Value {
    object(&refs(&training(work, out, settings)))
}

/// The scores of an adapter on eval.jsonl.
fn evaluate(work: &Work, adapter: &str) -> Map<String, Value> {
    let (model, adapter, data) =
        (fixture("peft_training/model"), work.path(adapter), work.path("eval.jsonl"));
    let found = object(&["eval", "--model", &model, "--adapter", &adapter, "--data", &data]);
    scores(&found)
}

/// The scores in an object, without what else it says.
fn scores(object: &Value) -> Map<String, Value> {
    let mut scores = object.as_object().expect("an object").clone();
    scores.retain(|name, _| !["examples", "epoch", "step", "eval_loss"].contains(&name.as_str()));
    scores
}

/// The lines of a training's metrics.jsonl: of its steps, and of its epochs.
fn metrics(work: &Work, out: &str) -> (Vec<Value>, Vec<Value>) {
    let text = String::from_utf8(work.read(&format!("{out}/metrics.jsonl"))).expect("UTF-8");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.partition(|line| line.get("eval_loss").is_none())
}

fn mean(lines: &[Value], field: &str) -> f64 {
    lines.iter().map(|line| line[field].as_f64().expect(field)).sum::<f64>() / lines.len() as f64
}

#[test]
fn a_training_leaves_adapters_and_its_record() {
    let work = Work::new("training");
    for (method, rate) in METHODS {
        let args = training(&work, method, &["--method", method, "--lr", rate, "--epochs", "8", "--json"]);
        let output = randlora(&refs(&args));
        let (results, said) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said}");
        let found: Value = serde_json::from_str(&results).expect("one object");
        assert_eq!((results.lines().count(), &found["method"]), (1, &json!(method)));
        let progress = [&format!("{method}: 6 adapted layers, "), "epoch 8: evaluation loss ", "written: "];
        assert!(progress.iter().all(|part| said.contains(*part)), "{said}");

        assert_eq!(work.names(method), ["best", "curves.svg", "last", "metrics.jsonl"]);
        assert!(work.read(&format!("{method}/curves.svg")).starts_with(b"<svg"));
        for saved in ["best", "last"] {
            assert_eq!(work.names(&format!("{method}/{saved}")), ADAPTER);
        }
        let (steps, epochs) = metrics(&work, method);
        assert_eq!((steps.len(), epochs.len()), (8 * 96 / 8, 8));
        assert!(steps.iter().zip(1..).all(|(line, step)| line["step"] == step));
        let (first, last) = (mean(&steps[..12], "loss"), mean(&steps[84..], "loss"));
        assert!(first > 0.5 && last < 0.5 * first, "{method}: {first} {last}");

        let accuracy = found["best"]["accuracy"].as_f64().expect("a number");
        assert!(accuracy >= 0.9, "{method}: {accuracy}");
        for saved in ["best", "last"] {
            let epoch = found[saved]["epoch"].as_u64().expect("a number") as usize;
            assert_eq!(scores(&found[saved]), scores(&epochs[epoch - 1]));
            assert_eq!(scores(&found[saved]), evaluate(&work, &format!("{method}/{saved}")));
        }
        let best = epochs.iter().map(|line| line["accuracy"].as_f64().expect("a number"));
        assert_eq!(best.fold(0.0, f64::max), accuracy);
    }
}

#[test]
fn results_to_read() {
    let work = Work::new("to-read");
    let results = text(&refs(&training(&work, "out", &["--epochs", "1"])));
    let starts: Vec<&str> =
        results.lines().map(|line| line.split_inclusive(' ').next().unwrap_or("")).collect();
    assert_eq!(starts, ["best: ", "last: ", "386 "], "{results}");
    let (model, adapter, data) =
        (fixture("peft_training/model"), work.path("out/best"), work.path("eval.jsonl"));
    let line = text(&["eval", "--model", &model, "--adapter", &adapter, "--data", &data]);
    assert!(line.starts_with("64 examples, accuracy 0.") && line.lines().count() == 1, "{line}");
}

/// The model of the fixtures with dropout.
fn with_dropout(work: &Work) -> String {
    let model = work.copy("model", &fixture("peft_training/model"));
    let config = String::from_utf8(work.read("model/config.json")).expect("UTF-8");
    work.write("model/config.json", config.replace("_prob\": 0.0", "_prob\": 0.1"));
    model
}

#[test]
fn a_seed_gives_one_file_on_any_number_of_threads() {
    let work = Work::new("seeds");
    let model = with_dropout(&work);
    for (method, _) in METHODS {
        let run = |out: &str, seed: &str, threads: &str| {
            let fixed = ["--model", &model, "--method", method, "--dropout", "0.1", "--epochs", "2"];
            train(&work, out, &[&fixed[..], &["--seed", seed, "--threads", threads, "--force"]].concat());
            ["best", "last"].map(|saved| ADAPTER.map(|file| work.read(&format!("{out}/{saved}/{file}"))))
        };
        let one = run("one", "5", "1");
        assert!(run("two", "5", "2") == one, "{method}");
        assert!(run("other", "6", "1")[1][1] != one[1][1], "{method}");
    }
}

/// With gradients that add up over batches, batches of texts of one length, and dropout everywhere.
#[test]
fn checkpointed_activations_change_no_bit() {
    let work = Work::new("checkpointed");
    let model = with_dropout(&work);
    for method in ["randlora", "lora", "full"] {
        let run = |out: &str, more: &[&str]| {
            let fixed = ["--model", &model, "--method", method, "--dropout", "0.1", "--epochs", "2"];
            let together = ["--accumulate", "2", "--group-by-length", "--force"];
            train(&work, out, &[&fixed[..], &together, more].concat());
            let file = if method == "full" { "model.safetensors" } else { ADAPTER[1] };
            (metrics(&work, out).1, work.read(&format!("{out}/last/{file}")))
        };
        let plain = run("plain", &["--threads", "2"]);
        assert!(run("with", &["--checkpoint-activations", "--threads", "1"]) == plain, "{method}");
    }
}

#[test]
fn training_goes_on_from_an_adapter() {
    let work = Work::new("goes-on");
    for (method, default_rate) in [("randlora", 3e-4), ("lora", 1e-3)] {
        train(&work, method, &["--method", method, "--lr", "1e-2", "--epochs", "4"]);
        let (adapter, out) = (work.path(&format!("{method}/last")), format!("{method}-more"));
        let constant = ["--adapter", &adapter, "--schedule", "constant", "--warmup", "0"];
        let more = train(&work, &out, &constant);
        assert_eq!(more["method"], method);
        let (before, after) = (metrics(&work, method).0, metrics(&work, &out).0);
        assert!(mean(&after[..12], "loss") < mean(&before[..12], "loss"), "{method}");
        assert!(after.iter().all(|line| line["learning_rate"] == default_rate), "{method}: {}", after[0]);
        assert_eq!(scores(&more["last"]), evaluate(&work, &format!("{out}/last")));

        // Without a step of any size the adapter is the one that it was.
        train(&work, &out, &[&constant[..], &["--lr", "0", "--epochs", "1", "--force"]].concat());
        for file in ADAPTER {
            assert!(
                work.read(&format!("{out}/last/{file}")) == work.read(&format!("{method}/last/{file}")),
                "{file}"
            );
        }
    }
}

#[test]
fn full_and_head_leave_whole_models() {
    let work = Work::new("whole");
    let data = work.path("eval.jsonl");
    for (method, rate, names) in [("full", "3e-3", ["no", "yes"]), ("head", "1e-2", ["no", "yes"])] {
        let found = train(&work, method, &["--method", method, "--lr", rate, "--epochs", "6"]);
        for saved in ["best", "last"] {
            let folder = format!("{method}/{saved}");
            assert_eq!(work.names(&folder), ["config.json", "model.safetensors", "randlora.json"]);
            let config: Value =
                serde_json::from_slice(&work.read(&format!("{folder}/config.json"))).expect("JSON");
            assert_eq!(config["id2label"], json!({ "0": names[0], "1": names[1] }));
            assert_eq!(config["label2id"], json!({ "no": 0, "yes": 1 }));
            assert_eq!(config["problem_type"], "single_label_classification");
            let wanted = scores(&found[saved]);
            let model = work.path(&folder);
            assert_eq!(scores(&object(&["eval", "--model", &model, "--data", &data])), wanted);
            // config.json alone says what the outputs are, too.
            fs::remove_file(format!("{model}/randlora.json")).expect("it is there");
            assert_eq!(scores(&object(&["eval", "--model", &model, "--data", &data])), wanted);
        }
        let accuracy = found["best"]["accuracy"].as_f64().expect("a number");
        assert!(if method == "full" { accuracy >= 0.9 } else { accuracy > 0.5 }, "{method}: {accuracy}");
    }
    let tensor = |folder: &str, name: &str| {
        common::expected(&common::tensors(&Path::new(folder).join("model.safetensors")), name)
    };
    let (base, query) = (fixture("peft_training/model"), "bert.encoder.layer.1.attention.self.query.weight");
    assert!(tensor(&work.path("head/last"), query) == tensor(&base, query));
    assert!(tensor(&work.path("full/last"), query) != tensor(&base, query));
}

#[test]
fn logits_need_no_labels() {
    let work = Work::new("logits");
    train(&work, "out", &["--lr", "1e-2"]);
    let (model, adapter, file) =
        (fixture("peft_training/model"), work.path("out/last"), work.path("l.safetensors"));
    let mut rows = examples(64, 2);
    let right: Vec<bool> = rows.iter().map(|row| row["label"] == "yes").collect();
    rows.iter_mut().for_each(|row| drop(row.as_object_mut().expect("an object").remove("label")));
    let data = work.rows("unlabelled.jsonl", &rows);
    let args = ["eval", "--model", &model, "--adapter", &adapter, "--data", &data];
    assert_eq!(object(&[&args[..], &["--logits", &file]].concat()), json!({ "examples": 64 }));
    let written = common::tensors(Path::new(&file));
    assert_eq!(
        written.entries().map(|(name, entry)| (name, entry.dims.clone())).collect::<Vec<_>>(),
        [("logits", vec![64, 2])]
    );
    let logits = common::expected(&written, "logits");
    let correct = logits.chunks(2).zip(&right).filter(|(row, yes)| (row[1] > row[0]) == **yes).count();
    assert_eq!(evaluate(&work, "out/last")["accuracy"], correct as f64 / 64.0);
    // Without --logits there would be nothing to say.
    assert!(command::failure(&args).contains("unlabelled.jsonl: line 1: no field is called like a label"));
}

/// The step and the steps of the state that is left, in the error of a training that diverged.
fn diverged(args: &[&str]) -> (u64, u64) {
    let output = randlora(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && output.stdout.is_empty(), "{said}");
    let error = said.lines().last().unwrap_or_default();
    assert!(error.starts_with("error: ") && error.contains(": lower the learning rate"), "{error}");
    let number = |before: &str| {
        let (_, rest) = error.split_once(before).unwrap_or_else(|| panic!("{error} lacks {before}"));
        rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).expect("a number")
    };
    (number(" is not finite at step "), number(" has the state after "))
}

#[test]
fn a_training_that_diverges_keeps_the_last_good_adapter() {
    let work = Work::new("diverged");
    let none = evaluate_untrained(&work);
    for method in ["randlora", "lora"] {
        let args = training(&work, method, &["--method", method, "--lr", "1e30", "--clip", "0"]);
        let (step, kept) = diverged(&refs(&args));
        assert!((2..=12).contains(&step) && kept == 0, "{method}: {step} {kept}");
        assert_eq!(work.names(method), ["last", "metrics.jsonl"]);
        assert_eq!(evaluate(&work, &format!("{method}/last")), none, "{method}");
    }
    // Without an evaluation the last is the best, too.
    let (model, data, out) = (fixture("peft_training/model"), work.path("train.jsonl"), work.path("alone"));
    let args =
        ["finetune", "--model", &model, "--train", &data, "--out", &out, "--lr", "1e30", "--clip", "0"];
    diverged(&args);
    for file in ADAPTER {
        assert!(
            work.read(&format!("alone/best/{file}")) == work.read(&format!("alone/last/{file}")),
            "{file}"
        );
    }
}

/// Where no loss follows the step that breaks the numbers.
#[test]
fn the_last_step_is_looked_at_too() {
    let work = Work::new("last-step");
    let (model, data, out) = (fixture("peft_training/model"), work.path("train.jsonl"), work.path("out"));
    let args = [
        "finetune",
        "--model",
        &model,
        "--train",
        &data,
        "--out",
        &out,
        "--method",
        "lora",
        "--epochs",
        "1",
        "--batch-size",
        "400",
        "--warmup",
        "0",
        "--clip",
        "0",
        "--schedule",
        "constant",
        "--lr",
        "1e39",
    ];
    assert_eq!(diverged(&args), (1, 0));
    let tensors = common::tensors(Path::new(&work.path("out/best/adapter_model.safetensors")));
    for (name, _) in tensors.entries() {
        assert!(common::expected(&tensors, name).iter().all(|x| x.is_finite()), "{name}");
    }
}

/// A pooler that the model's folder lacks is drawn once and then part of what was trained.
#[test]
fn what_the_model_lacks_is_trained_and_saved() {
    let work = Work::new("no-pooler");
    let files = ["config.json", "model.safetensors"]
        .map(|name| Path::new(&fixture("peft_training/model")).join(name));
    let bare = common::Folder::with("bare-model", &files);
    bare.rename(&files[1], "model.safetensors", |name| (!name.contains("pooler")).then(|| name.into()));
    let (bare, data) = (bare.0.display().to_string(), work.path("eval.jsonl"));
    for method in ["lora", "head"] {
        let found =
            train(&work, method, &["--model", &bare, "--method", method, "--seed", "1", "--lr", "1e-2"]);
        let best = work.path(&format!("{method}/best"));
        let again = match method {
            "lora" => object(&["eval", "--model", &bare, "--adapter", &best, "--data", &data]),
            _ => object(&["eval", "--model", &best, "--data", &data]),
        };
        assert_eq!(scores(&again), scores(&found["best"]), "{method}");
    }
    let adapter = fixture("our_adapters/lora");
    let error = command::failure(&["eval", "--model", &bare, "--adapter", &adapter, "--data", &data]);
    assert!(error.contains("there is no tensor `bert.pooler.dense"), "{error}");
}

#[test]
fn force_leaves_nothing_of_another_method() {
    let work = Work::new("force");
    train(&work, "out", &["--method", "lora", "--epochs", "1"]);
    train(&work, "out", &["--method", "head", "--epochs", "1", "--force"]);
    assert_eq!(work.names("out/best"), ["config.json", "model.safetensors", "randlora.json"]);
    assert_eq!(work.names("out"), ["best", "curves.svg", "last", "metrics.jsonl"]);
}

/// What PEFT has saved has no randlora.json.
#[test]
fn training_goes_on_from_an_adapter_of_peft() {
    let work = Work::new("from-peft");
    let adapter = fixture("peft_training/lora-trained");
    let rows: Vec<Value> = examples(40, 3)
        .into_iter()
        .map(|mut row| {
            row["label"] = json!(if row["label"] == "yes" { 1 } else { 0 });
            row
        })
        .collect();
    let data = work.rows("numbered.jsonl", &rows);
    let model = fixture("peft_training/model");
    let args =
        ["finetune", "--model", &model, "--adapter", &adapter, "--train", &data, "--out", &work.path("out")];
    assert_eq!(object(&args)["method"], "lora");
    assert!(work.names("out/best").contains(&"randlora.json".to_string()));
}

/// The scores of a classifier that is new: no step has changed it.
fn evaluate_untrained(work: &Work) -> Map<String, Value> {
    train(work, "untrained", &["--lr", "0", "--epochs", "1"]);
    evaluate(work, "untrained/last")
}

#[test]
fn what_an_epoch_saved_is_not_replaced_by_something_older() {
    let work = Work::new("late");
    // Two steps an epoch. The classifier alone is trained, at a rate that grows with the steps: its logits grow
    // with their square until they overflow, on every processor alike. What is within the model may instead come
    // to rest, where layer norm makes nothing of it.
    let settings =
        ["--warmup", "1000000", "--lr", "4e42", "--clip", "0", "--epochs", "200", "--batch-size", "48"];
    let (step, kept) =
        diverged(&refs(&training(&work, "out", &[&["--method", "head"], &settings[..]].concat())));
    assert!(step > 4 && kept == (step - 2) / 2 * 2, "{step} {kept}");
    let (_, epochs) = metrics(&work, "out");
    let (model, data) = (work.path("out/last"), work.path("eval.jsonl"));
    let evaluated = object(&["eval", "--model", &model, "--data", &data]);
    assert_eq!(scores(&epochs[kept as usize / 2 - 1]), scores(&evaluated));
}

#[test]
fn our_adapters_give_pefts_logits() {
    let (model, data) = (fixture("peft_training/model"), fixture("our_adapters/rows.jsonl"));
    let work = Work::empty("our-adapters");
    for method in ["randlora", "block", "lora", "dora", "pissa", "vera", "adalora"] {
        let (adapter, file) = (fixture(&format!("our_adapters/{method}")), work.path("logits.safetensors"));
        text(&["eval", "--model", &model, "--adapter", &adapter, "--data", &data, "--logits", &file]);
        let logits = |file: &str| common::expected(&common::tensors(Path::new(file)), "logits");
        let apart = common::distance(&logits(&file), &logits(&format!("{adapter}/expected.safetensors")));
        println!("{method}: {apart:.1e}");
        assert!(apart <= 1e-4, "{method}: {apart:e}");
    }
}
