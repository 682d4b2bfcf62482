//! `randlora devices` and `--device opencl` from outside.

use crate::command::{Work, arguments, failure, randlora, refs};
#[cfg(feature = "opencl")]
use crate::command::{object, text};
#[cfg(feature = "opencl")]
use crate::common::Folder;
#[cfg(feature = "opencl")]
use serde_json::Value;
#[cfg(feature = "opencl")]
use std::path::{Path, PathBuf};

#[test]
fn a_device_that_is_not_there_says_what_to_do() {
    let work = Work::new("no-device");
    let message = failure(&refs(&arguments(&work, "finetune", &["--device", "opencl:999"])));
    let reasons =
        ["the feature `opencl`", "there is no device 999", "install the driver", "no driver is installed"];
    assert!(reasons.iter().any(|reason| message.contains(reason)), "{message}");
    let output = randlora(&refs(&arguments(&work, "finetune", &["--device", "gpu"])));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`cpu`, `opencl` or `opencl:N` is needed"));
}

#[cfg(not(feature = "opencl"))]
#[test]
fn a_build_without_opencl_says_so() {
    assert!(failure(&["devices"]).contains("build with the feature `opencl`"));
}

/// Whether there is a device to test on; under CI there must be one.
#[cfg(feature = "opencl")]
fn is_there() -> bool {
    let found = randlora::Device::opencl(0);
    assert!(found.is_ok() || std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{found:?}");
    if let Err(error) = &found {
        eprintln!("not tested: {error}");
    }
    found.is_ok()
}

#[cfg(feature = "opencl")]
#[test]
fn devices_are_listed() {
    if !is_there() {
        return;
    }
    assert!(text(&["devices"]).starts_with("opencl:0  "));
    let listed: Value = serde_json::from_str(&text(&["devices", "--json"])).expect("JSON");
    assert!(listed[0]["memory_bytes"].as_u64().expect("a number") > 0);
}

#[cfg(feature = "opencl")]
#[test]
fn a_training_on_opencl_is_that_on_the_cpu() {
    if !is_there() {
        return;
    }
    let work = Work::new("opencl");
    let losses = |device: &str| -> Vec<f64> {
        let out = work.path(device);
        let settings = ["--out", &out, "--device", device, "--epochs", "2"];
        object(&refs(&arguments(&work, "finetune", &settings)));
        let lines = String::from_utf8(work.read(&format!("{device}/metrics.jsonl"))).expect("UTF-8");
        let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.filter_map(|line| line["loss"].as_f64()).take(20).collect()
    };
    let (cpu, opencl) = (losses("cpu"), losses("opencl"));
    assert_eq!((cpu.len(), opencl.len()), (20, 20));
    for (step, (a, b)) in cpu.iter().zip(&opencl).enumerate() {
        assert!((a - b).abs() <= 1e-3, "step {step}: {a} and {b}");
    }
    // Either device takes either's adapter.
    let accuracy = |trained: &str, device: &str| {
        let adapter = work.path(&format!("{trained}/last"));
        let settings = ["--adapter", &adapter, "--device", device];
        object(&refs(&arguments(&work, "eval", &settings)))["accuracy"].as_f64().expect("a number")
    };
    for trained in ["cpu", "opencl"] {
        assert_eq!(accuracy(trained, "cpu"), accuracy(trained, "opencl"), "{trained}");
    }
    let bf16 = failure(&refs(&arguments(&work, "eval", &["--device", "opencl", "--precision", "bf16"])));
    assert!(bf16.contains("OpenCL devices compute in f32"), "{bf16}");
}

/// all-MiniLM-L6-v2 without dropout, and the first rows of SST-2, for training and for evaluation.
#[cfg(feature = "opencl")]
fn minilm_and_sst2(work: &Work) -> Option<(Folder, [String; 2])> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets");
    let assets = std::env::var_os("RANDLORA_ASSETS").map_or_else(beside, PathBuf::from);
    let model = std::env::var_os("RANDLORA_MINILM").map(PathBuf::from).unwrap_or_default();
    let sst2 = assets.join("data/sst2");
    if !sst2.is_dir() || !model.join("model.safetensors").is_file() {
        let message = "SST-2 or all-MiniLM-L6-v2 is not there: set RANDLORA_ASSETS to the assets and \
                       RANDLORA_MINILM to the folder with model.safetensors";
        assert!(std::env::var_os("CI").is_none(), "{message}");
        eprintln!("not tested: {message}");
        return None;
    }
    let files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let folder = Folder::with("opencl-minilm", &files.map(|file| model.join(file)));
    for name in ["hidden_dropout_prob", "attention_probs_dropout_prob"] {
        folder.edit("config.json", &format!("\"{name}\": 0.1"), &format!("\"{name}\": 0.0"));
    }
    let rows = |file: &str, count: usize| {
        let text = std::fs::read_to_string(sst2.join(file)).expect("a table");
        work.write(file, text.lines().take(1 + count).map(|line| format!("{line}\n")).collect::<String>())
    };
    Some((folder, [rows("train.tsv", 80), rows("validation.tsv", 48)]))
}

/// Twenty steps of the README's training in small: 4 texts in a step.
#[cfg(feature = "opencl")]
#[test]
fn minilm_on_sst2_follows_the_cpu() {
    let work = Work::empty("opencl-sst2");
    let Some((model, [train, eval])) = is_there().then(|| minilm_and_sst2(&work)).flatten() else { return };
    let model = model.0.to_str().expect("UTF-8");
    let losses = |device: &str| -> Vec<f64> {
        let settings = "--rank 16 --scale peft --lr 1e-3 --epochs 1 --batch-size 4 --max-length 24 --seed 0";
        let out = work.path(device);
        let files = ["finetune", "--model", model, "--train", &train, "--eval", &eval, "--out", &out];
        let settings: Vec<&str> = settings.split(' ').chain(["--device", device]).collect();
        object(&[&files[..], &settings].concat());
        let lines = String::from_utf8(work.read(&format!("{device}/metrics.jsonl"))).expect("UTF-8");
        let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.filter_map(|line| line["loss"].as_f64()).collect()
    };
    let (cpu, opencl) = (losses("cpu"), losses("opencl"));
    assert!(cpu.len() >= 20 && cpu.len() == opencl.len(), "{} and {}", cpu.len(), opencl.len());
    let apart = cpu.iter().zip(&opencl).take(20).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("twenty losses from {:.4} to {:.4}, at most {apart:.1e} apart", cpu[0], cpu[19]);
    assert!(apart <= 1e-3, "{cpu:?}\n{opencl:?}");

    // What was trained on one device is the same on the other.
    let scores = |device: &str| {
        let adapter = work.path("opencl/last");
        let files = ["eval", "--model", model, "--adapter", &adapter, "--data", &eval, "--device", device];
        object(&files)["accuracy"].as_f64().expect("a number")
    };
    assert_eq!(scores("cpu"), scores("opencl"));
}

#[cfg(feature = "opencl")]
#[test]
fn a_bench_counts_what_a_device_was_asked_for() {
    if !is_there() {
        return;
    }
    let shape =
        ["bench", "layer", "--tokens", "9", "--in", "24", "--out", "40", "--rank", "5", "--rounds", "1"];
    let found = object(&[&shape[..], &["--device", "opencl"]].concat());
    assert!(found["device"].as_str().is_some_and(|name| name.contains("OpenCL")), "{found}");
    assert!(found["opencl"]["launches"].as_u64().is_some_and(|n| n > 5), "{found}");
    // A layer, forward and backward, is asked for without waiting for it.
    assert_eq!((&found["opencl"]["waits"], &found["opencl"]["bytes_down"]), (&0.into(), &0.into()));
    assert!(object(&shape)["opencl"].is_null());
}
