//! `randlora merge` and `randlora convert` from outside, and `inspect` of what they write.

use std::fs;
use std::path::Path;

use crate::command::{failure, fixture, object, text};
use crate::common::{Folder, distance, expected, largest, tensors};
use serde_json::{Value, json};

const MODEL: &str = "peft_training/model";
const TINY: &str = "peft_adapters/model";

/// A folder's path as an argument, and one within it.
fn path(folder: &Folder, name: &str) -> String {
    folder.0.join(name).display().to_string()
}

/// The logits that `eval` gives for the rows of our_adapters.
fn logits(folder: &Folder, model: &str, adapter: Option<&str>) -> Vec<f64> {
    let (rows, file) = (fixture("our_adapters/rows.jsonl"), path(folder, "logits.safetensors"));
    let mut args = vec!["eval", "--model", model, "--data", &rows, "--logits", &file];
    args.extend(adapter.into_iter().flat_map(|adapter| ["--adapter", adapter]));
    text(&args);
    expected(&tensors(Path::new(&file)), "logits")
}

#[test]
fn a_merged_model_gives_the_adapters_logits() {
    for method in ["randlora", "lora", "dora", "pissa", "vera", "adalora"] {
        let folder = Folder::with(&format!("merge-{method}"), &[]);
        let (model, adapter, out) =
            (fixture(MODEL), fixture(&format!("our_adapters/{method}")), path(&folder, "f32"));
        let merge = ["merge", "--model", &model, "--adapter", &adapter];
        let merged = object(&[&merge[..], &["--out", &out]].concat());
        assert_eq!((&merged["dtype"], &merged["lost"]), (&json!("f32"), &json!(0.0)));
        assert!(merged["difference"].as_f64().is_some_and(|d| d < 1e-5), "{merged}");
        // The same without an adapter: labels and all.
        let (want, got) = (logits(&folder, &model, Some(&adapter)), logits(&folder, &out, None));
        assert!(distance(&got, &want) < 1e-5 * largest(&want).max(1.0), "{method}");
        let config: Value =
            serde_json::from_str(&fs::read_to_string(folder.0.join("f32/config.json")).unwrap()).unwrap();
        assert_eq!(config["id2label"], json!({ "0": "no", "1": "yes" }));

        // In 16 bits some of the update is lost, and what is said of it is what is in the file.
        let mut lost = vec![];
        for dtype in ["bf16", "f16"] {
            let out = path(&folder, dtype);
            let merged = object(&[&merge[..], &["--out", &out, "--dtype", dtype]].concat());
            lost.push(merged["lost"].as_f64().unwrap());
            assert!(merged["worst"]["lost"].as_f64().unwrap() >= lost[lost.len() - 1], "{merged}");
            let file = tensors(&folder.0.join(dtype).join("model.safetensors"));
            assert!(file.entries().all(|(_, entry)| entry.dtype.to_string() == dtype.to_uppercase()));
            let apart = distance(&logits(&folder, &out, None), &want);
            assert!(apart < 0.1 * largest(&want), "{apart}");
        }
        // bf16 has 3 bits less.
        assert!(lost[0] > 4.0 * lost[1] && lost[1] > 1e-5, "{lost:?}");
        let out = path(&folder, "again");
        let said = text(&[&merge[..], &["--out", &out, "--dtype", "bf16"]].concat());
        assert!(said.contains("% of ΔW") && said.contains("`--dtype f32` keeps all of it"), "{said}");
    }
}

#[test]
fn an_adapter_without_a_classifier_is_merged_too() {
    let folder = Folder::with("merge-plain", &[]);
    let (model, adapter, out) =
        (fixture("peft_adapters/model"), fixture("peft_adapters/lora-no-classifier"), path(&folder, "out"));
    let merged = object(&["merge", "--model", &model, "--adapter", &adapter, "--out", &out]);
    assert_eq!(merged["layers"], 2);
    let inspected = object(&["inspect", &out]);
    assert_eq!(inspected["architecture"]["labels"], 3);
}

#[test]
fn compact_and_back() {
    let folder = Folder::with("convert-compact", &[]);
    let model = fixture(MODEL);
    let (train, run) = (fixture("our_adapters/rows.jsonl"), path(&folder, "run"));
    text(&[
        "finetune",
        "--model",
        &model,
        "--train",
        &train,
        "--out",
        &run,
        "--rank",
        "5",
        "--epochs",
        "1",
        "--targets",
        "query,output.dense",
        "--json",
    ]);
    let best = path(&folder, "run/best");
    let [compact, peft, again] = ["compact", "peft", "again"].map(|name| path(&folder, name));
    let size = object(&["convert", &best, "--to", "compact", "--out", &compact])["bytes"].as_u64().unwrap();
    let before = fs::metadata(folder.0.join("run/best/adapter_model.safetensors")).unwrap().len();
    assert!(size < before, "{size} {before}");
    let want = logits(&folder, &model, Some(&best));
    assert_eq!(logits(&folder, &model, Some(&compact)), want);
    // The other way the model must be named: the compact form has it too.
    text(&["convert", &compact, "--to", "peft", "--out", &peft, "--model", &model]);
    assert_eq!(logits(&folder, &model, Some(&peft)), want);
    let bytes = |name: &str| fs::read(folder.0.join(name).join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes("peft"), bytes("run/best"));
    text(&["convert", &peft, "--to", "compact", "--out", &again]);
    let bytes = |name: &str| fs::read(folder.0.join(name).join("compact.safetensors")).unwrap();
    assert_eq!(bytes("again"), bytes("compact"));

    // Training goes on from it, and stays in the form.
    let on = path(&folder, "on");
    text(&[
        "finetune",
        "--model",
        &model,
        "--adapter",
        &compact,
        "--train",
        &train,
        "--out",
        &on,
        "--epochs",
        "1",
    ]);
    assert!(folder.0.join("on/best/compact.safetensors").is_file());
    assert_ne!(logits(&folder, &model, Some(&path(&folder, "on/best"))), want);

    let inspected = object(&["inspect", &compact]);
    assert_eq!(
        (&inspected["kind"], &inspected["rank"], &inspected["bases"]),
        (&json!("adapter"), &json!(5), &Value::Null)
    );
    let text = text(&["inspect", &compact]);
    assert!(text.contains("randlora") && text.contains("query"), "{text}");
}

#[test]
fn a_lora_in_the_place_of_any_update() {
    let folder = Folder::with("convert-lora", &[]);
    let (model, adapter) = (fixture(MODEL), fixture("our_adapters/randlora"));
    let want = logits(&folder, &model, Some(&adapter));
    let mut before: Option<Vec<f64>> = None;
    for rank in ["1", "4", "24"] {
        let out = path(&folder, rank);
        let converted =
            object(&["convert", &adapter, "--to", "lora", "--rank", rank, "--out", &out, "--model", &model]);
        let errors: Vec<f64> = converted["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| layer["error"].as_f64().unwrap())
            .collect();
        // A larger rank is nearer in every layer.
        if let Some(before) = &before {
            assert!(errors.iter().zip(before).all(|(now, before)| now < before), "{errors:?}");
        }
        let apart = distance(&logits(&folder, &model, Some(&out)), &want) / largest(&want);
        if rank == "24" {
            // The whole width of the model: all of the update.
            assert!(errors.iter().all(|error| *error < 1e-6) && apart < 1e-4, "{errors:?} {apart}");
        } else {
            assert!(errors.iter().all(|error| *error > 1e-3), "{errors:?}");
        }
        before = Some(errors);
    }
    // A LoRA of rank 3 is one of rank 3.
    let (lora, out) = (fixture("our_adapters/lora"), path(&folder, "same"));
    let said = text(&["convert", &lora, "--to", "lora", "--rank", "3", "--out", &out, "--model", &model]);
    assert!(said.contains("‖ΔW − BA‖/‖ΔW‖") && said.contains("0.0000"), "{said}");
    let (got, want) = (logits(&folder, &model, Some(&out)), logits(&folder, &model, Some(&lora)));
    assert!(distance(&got, &want) < 1e-4 * largest(&want));
}

#[test]
fn the_spectrum_of_the_updates() {
    let folder = Folder::with("spectrum", &[]);
    let model = fixture(MODEL);
    let plot = path(&folder, "spectrum.svg");
    for (method, rank) in [("randlora", 24), ("lora", 3)] {
        let adapter = fixture(&format!("our_adapters/{method}"));
        let args = ["inspect", &adapter, "--model", &model, "--spectrum", "--plot", &plot];
        let inspected = object(&args);
        for layer in inspected["layers"].as_array().unwrap() {
            let values: Vec<f64> =
                layer["singular_values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let sum = values.iter().map(|v| v * v).sum::<f64>().sqrt();
            let delta = layer["delta"].as_f64().unwrap();
            assert!((sum - delta).abs() < 1e-5 * delta, "{sum} {delta}");
            // LoRA's rank is exact; a singular value of RandLoRA's may drown in the rounding of f32.
            let found = layer["update_rank"].as_i64().unwrap();
            assert!(found == rank || method == "randlora" && found == rank - 1, "{method}: {found}");
            let effective = layer["effective_rank"].as_f64().unwrap();
            assert!(effective >= 1.0 && effective <= rank as f64, "{effective}");
        }
        assert!(text(&args).contains("effective rank"));
        let svg = fs::read_to_string(&plot).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("attention.self.query") && svg.contains("polyline"));
    }
}

#[test]
fn bases_drawn_as_peft_does() {
    let folder = Folder::with("seed-only", &[]);
    let (model, adapter) = (fixture(TINY), fixture("peft_adapters/randlora-seed-only"));
    let bf16 = path(&folder, "bf16");
    text(&["convert", &adapter, "--to", "peft", "--out", &bf16, "--model", &model]);
    let f16 = path(&folder, "f16");
    text(&["convert", &adapter, "--to", "peft", "--out", &f16, "--model", &model, "--peft-draw", "f16"]);
    let base = |name: &str| {
        expected(&tensors(&folder.0.join(name).join("adapter_model.safetensors")), "base_model.randlora_B")
    };
    let apart = distance(&base("bf16"), &base("f16"));
    assert!(apart > 1e-4 && apart < 0.05, "{apart}");
}

#[test]
fn what_cannot_be_is_said_in_one_line() {
    let folder = Folder::with("convert-errors", &[]);
    let (model, randlora, lora) =
        (fixture(MODEL), fixture("our_adapters/randlora"), fixture("our_adapters/lora"));
    let out = path(&folder, "out");
    fs::create_dir_all(folder.0.join("full")).unwrap();
    fs::write(folder.0.join("full/file"), "x").unwrap();
    let full = path(&folder, "full");
    let file = path(&folder, "full/file");
    for (args, part) in [
        (vec!["merge", "--model", &model, "--out", &out], "--adapter: name the adapter's folder"),
        (vec!["merge", "--model", &model, "--adapter", &randlora, "--out", &full], "with `--force`"),
        (vec!["merge", "--model", &model, "--adapter", &randlora, "--out", &file], "this is a file"),
        (
            vec!["merge", "--model", &model, "--adapter", &full, "--out", &out],
            "adapter_config.json is missing",
        ),
        (vec!["convert", &lora, "--to", "compact", "--out", &out, "--model", &model], "lora has none"),
        (vec!["convert", &randlora, "--to", "compact", "--out", &full], "with `--force`"),
        (vec!["convert", &full, "--to", "peft", "--out", &out], "adapter_config.json is missing"),
        (vec!["inspect", &randlora, "--spectrum", "--model", &full], "config.json"),
    ] {
        let message = failure(&args);
        assert!(message.contains(part), "{message}\nlacks: {part}");
        assert!(!Path::new(&out).exists(), "{args:?}");
    }
    // The model that the adapter names is not where the command runs.
    let message = failure(&["convert", &randlora, "--to", "peft", "--out", &out]);
    assert!(message.contains("which is no folder here: give its model with `--model`"), "{message}");
}
