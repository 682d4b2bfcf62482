//! What each option of `randlora finetune` does, seen in what is written, and what happens where nothing
//! can be written.

use crate::command::{self, Work, arguments, object, refs};
use serde_json::Value;

/// Trains with these settings, and gives the results with the files `metrics.jsonl` and
/// `last/adapter_model.safetensors`.
fn train(work: &Work, settings: &[&str]) -> (Value, Vec<Value>, Vec<u8>) {
    let results = object(&refs(&arguments(work, "finetune", &[&["--force"], settings].concat())));
    let text = String::from_utf8(work.read("out/metrics.jsonl")).expect("UTF-8");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let steps = lines.filter(|line| line.get("eval_loss").is_none()).collect();
    (results, steps, work.read("out/last/adapter_model.safetensors"))
}

fn adapter(work: &Work, settings: &[&str]) -> Vec<u8> {
    train(work, &[&["--epochs", "1", "--lr", "1e-2"], settings].concat()).2
}

fn field(lines: &[Value], name: &str) -> Vec<f64> {
    lines.iter().map(|line| line[name].as_f64().expect(name)).collect()
}

#[test]
fn alpha_and_scale_and_their_defaults() {
    let work = Work::new("alpha");
    for (method, alpha) in [("randlora", 3), ("lora", 8)] {
        let with =
            |settings: &[&str]| adapter(&work, &[&["--method", method, "--rank", "4"], settings].concat());
        let plain = with(&[]);
        assert!(with(&["--scale", "auto"]) == plain, "{method}");
        let config: Value = serde_json::from_slice(&work.read("out/last/adapter_config.json")).expect("JSON");
        assert_eq!(config[format!("{method}_alpha")], alpha, "{method}");
        let half = with(&["--alpha", "10"]);
        assert!(half == with(&["--scale", "2.5"]) && half != plain, "{method}");
        // A number is the scale alone: RandLoRA then starts as in PEFT.
        let number = (f64::from(alpha) / 4.0).to_string();
        assert_eq!(with(&["--scale", &number]) == plain, method == "lora", "{method}");
    }
    let randlora = |scale: &str| adapter(&work, &["--rank", "4", "--scale", scale]);
    assert!(randlora("peft") == randlora("20"));
    // Layers of 24×24: n = 6.
    assert!(randlora("paper") == randlora(&(2.0 / 6f64.sqrt()).to_string()));
    let error = command::failure(&refs(&arguments(
        &work,
        "finetune",
        &["--method", "lora", "--scale", "peft", "--force"],
    )));
    assert!(error.contains("`peft` and `paper` are RandLoRA's: give lora a number"), "{error}");
}

#[test]
fn settings_of_the_step_make_a_difference_and_others_none() {
    let work = Work::new("steps");
    let plain = adapter(&work, &[]);
    for settings in [&["--no-mmap"][..], &["--threads", "2"], &["--accumulate", "1"], &["--seed", "0"]] {
        assert!(adapter(&work, settings) == plain, "{settings:?}");
    }
    for settings in [
        &["--weight-decay", "0.5"][..],
        &["--clip", "1e-3"],
        &["--dropout", "0.2"],
        &["--seed", "1"],
        &["--schedule", "cosine"],
        &["--warmup", "0.5"],
        &["--group-by-length"],
    ] {
        assert!(adapter(&work, settings) != plain, "{settings:?}");
    }
}

#[test]
fn accumulated_batches_are_the_steps_of_large_ones() {
    let work = Work::new("accumulate");
    let (_, large, _) = train(&work, &["--batch-size", "32", "--lr", "1e-3"]);
    let (_, parts, _) = train(&work, &["--batch-size", "8", "--accumulate", "4", "--lr", "1e-3"]);
    assert_eq!((large.len(), parts.len()), (9, 9));
    for (a, b) in field(&large, "loss").iter().zip(field(&parts, "loss")) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn the_rate_rises_and_falls_as_it_is_told() {
    let work = Work::new("rates");
    let rates = |settings: &[&str]| {
        let fixed = ["--epochs", "2", "--batch-size", "8", "--lr", "1"];
        field(&train(&work, &[&fixed, settings].concat()).1, "learning_rate")
    };
    assert!(rates(&["--schedule", "constant", "--warmup", "0"]).iter().all(|&rate| rate == 1.0));
    // 24 steps, 4 of them warm-up: as a number of steps or as a share.
    let (steps, share) = (rates(&["--warmup", "4"]), rates(&["--warmup", "0.17"]));
    assert_eq!((steps.len(), &steps), (24, &share));
    assert!(steps[..4].is_sorted() && steps[0] < 0.5 && steps[4] == 1.0, "{steps:?}");
    assert!((steps[14] - 0.5).abs() < 1e-9 && steps[23] < 0.1, "{steps:?}");
    let cosine = rates(&["--warmup", "4", "--schedule", "cosine"]);
    assert!((cosine[14] - 0.5).abs() < 1e-9 && cosine[9] > steps[9] && cosine[19] < steps[19], "{cosine:?}");
}

#[test]
fn texts_of_similar_length_together_leave_less_padding() {
    let work = Work::new("lengths");
    let tokens = |settings: &[&str]| {
        let (results, steps, _) = train(&work, &[&["--epochs", "1", "--batch-size", "8"], settings].concat());
        let of = |name: &str| results[name].as_f64().expect(name);
        (steps.len(), of("tokens_per_s") * of("seconds"))
    };
    let ((steps, mixed), (grouped_steps, grouped)) = (tokens(&[]), tokens(&["--group-by-length"]));
    assert_eq!((steps, grouped_steps), (12, 12));
    assert!(grouped < 0.95 * mixed, "{grouped} {mixed}");
}

#[test]
fn targets_by_name_by_pattern_and_all() {
    let work = Work::new("targets");
    let adapted = |targets: &str| {
        train(&work, &["--epochs", "1", "--targets", targets]);
        let found = object(&["inspect", &work.path("out/last")]);
        let layers = found["layers"].as_array().expect("a list").iter();
        layers.map(|layer| layer["name"].as_str().expect("a text").to_string()).collect::<Vec<_>>()
    };
    let attention = |layer: usize, part: &str| format!("bert.encoder.layer.{layer}.attention.self.{part}");
    assert_eq!(adapted("value"), [attention(0, "value"), attention(1, "value")]);
    assert_eq!(adapted(r".*\.1\..*(query|key)"), ["key", "query"].map(|part| attention(1, part)));
    // Six in each of two blocks, and the pooler.
    assert_eq!(adapted("all-linear").len(), 13);
}

/// Where the disk is full, or the folder's own files are somewhere that is.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_failure_that_names_the_file() {
    use std::fs::{File, create_dir};
    use std::os::unix::fs::symlink;

    let work = Work::new("full-disk");
    let full = || File::options().write(true).open("/dev/full").expect("Linux has it");
    let model = command::fixture("peft_training/model");
    for args in [arguments(&work, "eval", &[]), vec!["inspect".into(), model]] {
        let output = command::command(&refs(&args)).stdout(full()).output().expect("the command runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("error: standard output: ") && said.lines().count() == 1, "{said}");
    }
    create_dir(work.path("out")).expect("a folder");
    symlink("/dev/full", work.path("out/metrics.jsonl")).expect("a link");
    let output = command::randlora(&refs(&arguments(&work, "finetune", &["--force"])));
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    assert!(output.status.code() == Some(1) && output.stdout.is_empty(), "{said}");
    assert!(last.starts_with("error: ") && last.contains("out/metrics.jsonl: No space left"), "{said}");
}
