//! `randlora bench` from outside.

use crate::command::{failure, fixture, object, randlora, text};
use ::randlora::{Plan, Sizes, Structure, Wants};
use serde_json::{Value, json};

fn layer<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    let shape = ["bench", "layer", "--tokens", "33", "--in", "24", "--out", "40", "--rank", "5"];
    [&shape[..], &["--rounds", "3"], settings].concat()
}

fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_else(|| panic!("`{field}` in {value}"))
}

/// The lines of a text by their first word.
fn has_lines(text: &str, starts: &[&str]) {
    for start in starts {
        assert!(text.lines().any(|line| line.starts_with(start)), "{text}\nlacks: {start}");
    }
}

#[test]
fn a_layer() {
    let found = object(&layer(&["--threads", "2"]));
    for (field, want) in [("tokens", 33), ("in", 24), ("out", 40), ("rank", 5), ("threads", 2), ("rounds", 3)]
    {
        assert_eq!(found[field], want, "{field}");
    }
    for field in
        ["frozen_ms", "full_ms", "lora_ms", "randlora_ms", "gflops", "frozen_gflops", "scratch_bytes"]
    {
        assert!(number(&found, field) > 0.0, "{field}: {found}");
    }
    for (factor, ms) in [("randlora_factor", "randlora_ms"), ("lora_factor", "lora_ms")] {
        // JSON's reader may be off in the last bit.
        let want = number(&found, ms) / number(&found, "frozen_ms");
        assert!((number(&found, factor) / want - 1.0).abs() < 1e-14, "{factor}: {found}");
    }
    let sizes = Sizes { tokens: 33, inputs: 24, outputs: 40, rank: 5 };
    let wants = Wants { diagonals: true, input: true, dropout: false };
    let plan = Plan::new(sizes, wants, Structure::Dense);
    let route = [plan.forward, plan.backward].map(|way| format!("{way:?}").to_lowercase());
    assert_eq!(found["route"], json!({ "forward": route[0], "backward": route[1] }));
    let ratio = 1.0 + plan.extra_flops(sizes, wants) / Plan::frozen_flops(sizes, wants);
    assert!((number(&found, "flop_ratio") / ratio - 1.0).abs() < 1e-14);

    let block = object(&layer(&["--bases", "block", "--threads", "2"]));
    assert_eq!((&found["bases"], &block["bases"]), (&json!("uniform"), &json!("block")));
    assert!(number(&block, "flop_ratio") < ratio);

    let dropped = object(&layer(&["--dropout", "0.1", "--threads", "1"]));
    assert_eq!((&dropped["dropout"], &dropped["threads"]), (&json!(0.1), &json!(1)));
    assert!(number(&dropped, "flop_ratio") > number(&found, "flop_ratio"));
}

#[test]
fn a_layer_to_read() {
    let text = text(&layer(&[]));
    has_lines(
        &text,
        &["shape       33 tokens, 24 → 40, rank 5", "threads ", "route ", "operations ", "GFLOP/s "],
    );
    has_lines(&text, &["scratch ", "frozen ", "full ", "lora ", "randlora "]);
}

fn step<'a>(model: &'a str, settings: &[&'a str]) -> Vec<&'a str> {
    let size = ["--batch-size", "6", "--length", "9", "--steps", "2"];
    [&["bench", "step", "--model", model][..], &size, settings].concat()
}

#[test]
fn a_step_of_each_method() {
    let model = fixture("peft_training/model");
    for (method, rank, trained) in [
        ("randlora", Some(32), 6 * (32 + 24) + 75),
        ("lora", Some(8), 6 * 2 * 8 * 24 + 75),
        ("full", None, 11_315),
        ("head", None, 75),
    ] {
        let found = object(&step(&model, &["--method", method, "--threads", "1"]));
        assert_eq!((&found["method"], &found["rank"]), (&json!(method), &json!(rank)));
        assert_eq!(found["bases"].as_str(), (method == "randlora").then_some("uniform"));
        assert_eq!((&found["precision"], &found["threads"]), (&json!("f32"), &json!(1)));
        assert_eq!(
            (&found["batch_size"], &found["length"], &found["steps"]),
            (&json!(6), &json!(9), &json!(2))
        );
        assert_eq!(found["checkpoint_activations"], false);
        assert_eq!(found["trained_parameters"], trained, "{method}");
        let ms = number(&found, "step_ms");
        assert!(ms > 0.0 && (number(&found, "tokens_per_s") * ms / 1e3 - 54.0).abs() < 1e-9, "{found}");
        assert!(number(&found, "tensor_peak_bytes") > 0.0);
        if cfg!(target_os = "linux") {
            assert!(number(&found, "peak_rss_bytes") > number(&found, "tensor_peak_bytes"));
        }
    }
}

#[test]
fn checkpointing_lowers_the_peak() {
    let model = fixture("peft_training/model");
    let settings = ["--targets", "all-linear", "--rank", "4", "--batch-size", "64", "--length", "16"];
    let run = |more: &[&str]| {
        let size = ["bench", "step", "--model", &model, "--steps", "2"];
        object(&[&size[..], &settings, more].concat())
    };
    let (plain, with) = (run(&[]), run(&["--checkpoint-activations"]));
    assert_eq!(
        (&plain["checkpoint_activations"], &with["checkpoint_activations"]),
        (&json!(false), &json!(true))
    );
    let [plain, with] = [plain, with].map(|found| number(&found, "tensor_peak_bytes"));
    assert!(with < plain, "{with} {plain}");
}

#[test]
fn a_step_to_read() {
    let model = fixture("peft_training/model");
    let lora = text(&step(&model, &["--method", "lora", "--rank", "3"]));
    has_lines(&lora, &["method    lora, rank 3", "trained   939", "batch     6 texts of 9 tokens"]);
    has_lines(&lora, &["threads ", "step ", "tokens/s ", "tensors "]);
    has_lines(&text(&step(&model, &["--method", "head"])), &["method    head"]);
}

#[test]
fn wrong_inputs() {
    let model = fixture("peft_training/model");
    for (args, part) in [
        (step("/nowhere/model", &[]), "/nowhere/model: there is no such folder"),
        (step(&model, &["--targets", "quary"]), "`quary` matches no layer; there are: "),
        (layer(&["--dropout", "1"]), "a rate of 1 does not lie in 0 ≤ p < 1"),
        (vec!["bench", "step", "--model", &model, "--length", "17"], "--length 17: the model in "),
        (
            vec!["bench", "layer", "--tokens", "4294967295", "--in", "4294967295", "--out", "4294967295"],
            "memory",
        ),
    ] {
        let message = failure(&args);
        assert!(message.contains(part), "{message}");
    }
    for args in [
        &["bench"][..],
        &["bench", "model"],
        &["bench", "layer", "--tokens", "8", "--in", "8"],
        &["bench", "layer", "--tokens", "0", "--in", "8", "--out", "8"],
        &["bench", "layer", "--tokens", "8", "--in", "8", "--out", "8", "--rank", "0"],
        &["bench", "layer", "--tokens", "8", "--in", "8", "--out", "-8"],
        &["bench", "layer", "--tokens", "8", "--in", "8", "--out", "8", "--rounds", "0"],
        &["bench", "step"],
        &["bench", "step", "--model", "m", "--method", "none"],
        &["bench", "step", "--model", "m", "--batch-size", "0"],
        &["bench", "step", "--model", "m", "--length", "0"],
        &["bench", "step", "--model", "m", "--steps", "0"],
    ] {
        let output = randlora(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(output.stdout.is_empty() && !said.is_empty(), "{args:?}");
    }
}
