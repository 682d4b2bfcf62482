//! Every method on the command line: trained, saved, evaluated, trained on, shown.

use crate::command::{Work, arguments, failure, fixture, object, refs, text};
use serde_json::json;

/// The methods with adapters beside RandLoRA and LoRA, and what they need on the tiny model.
const METHODS: [(&str, &[&str]); 11] = [
    ("rslora", &[]),
    ("dora", &[]),
    ("vera", &[]),
    ("pissa", &[]),
    ("lora-xs", &["--rank", "6"]),
    ("nola", &["--coefficients", "20"]),
    ("svft", &[]),
    ("adalora", &[]),
    ("hydralora", &["--rank", "2"]),
    ("pranc", &["--coefficients", "20"]),
    ("intrinsic", &["--coefficients", "20"]),
];

#[test]
fn every_method_is_trained_saved_and_trained_on() {
    let work = Work::new("methods");
    let model = fixture("peft_training/model");
    for (method, more) in METHODS {
        let out = work.path(method);
        let args = [&["--method", method, "--out", &out, "--epochs", "2", "--lr", "1e-2"], more].concat();
        let found = object(&refs(&arguments(&work, "finetune", &args)));
        let name = if method == "rslora" { "lora" } else { method };
        assert_eq!(found["method"], json!(name));
        let last = work.path(&format!("{method}/last"));
        let data = work.path("eval.jsonl");
        let scores = object(&["eval", "--model", &model, "--adapter", &last, "--data", &data]);
        assert_eq!(scores["accuracy"], found["last"]["accuracy"], "{method}");

        let on = work.path(&format!("{method}-on"));
        let args = ["--adapter", &last, "--out", &on, "--epochs", "1"];
        let more = object(&refs(&arguments(&work, "finetune", &args)));
        // Of AdaLoRA's adapter the triplets are left that it has not taken away.
        let (at_first, left) = (&found["trained_parameters"], &more["trained_parameters"]);
        let shrunk = method == "adalora" && left.as_u64() < at_first.as_u64();
        assert!(more["method"] == found["method"] && (shrunk || left == at_first), "{method}: {left}");

        let shown = object(&["inspect", &last]);
        assert_eq!((&shown["kind"], &shown["method"]), (&json!("adapter"), &json!(name)));
        assert_eq!(&shown["trained_parameters"], left, "{method}");
        let sizes = object(&["inspect", &last, "--model", &model]);
        let layer = &sizes["layers"][0];
        assert_eq!(layer["delta"].is_null(), method == "hydralora", "{method}: {layer}");
        assert!(text(&["inspect", &last, "--model", &model]).contains(name));
    }
}

#[test]
fn bitfit_trains_the_biases_and_saves_the_model() {
    let work = Work::new("bitfit");
    let args = arguments(&work, "finetune", &["--method", "bitfit", "--epochs", "1"]);
    let found = object(&refs(&args));
    assert_eq!(found["method"], "bitfit");
    assert!(work.names("out/last").contains(&"model.safetensors".to_string()));
    let (model, data) = (work.path("out/last"), work.path("eval.jsonl"));
    let scores = object(&["eval", "--model", &model, "--data", &data]);
    assert_eq!(scores["accuracy"], found["last"]["accuracy"]);
}

#[test]
fn plans_and_settings_that_a_method_lacks() {
    let model = fixture("peft_training/model");
    for (method, more) in METHODS {
        let plan = object(&[&["inspect", &model, "--method", method, "--batch-size", "2"], more].concat());
        assert!(plan["adapter_parameters"].as_u64().unwrap() > 0, "{method}");
    }
    let work = Work::new("lacks");
    let error = |more: &[&str]| failure(&refs(&arguments(&work, "finetune", more)));
    assert!(error(&["--method", "svft", "--rank", "3"]).contains("svft has none"));
    assert!(error(&["--method", "vera", "--scale", "3"]).contains("vera has none"));
    assert!(error(&["--method", "dora", "--coefficients", "3"]).contains("dora has none"));
    assert!(error(&["--method", "pissa", "--rank", "25"]).contains("24 singular values"));
    assert!(
        failure(&["demo", "--methods", "lora,lola"]).contains("no method `lola`; there are: probe, lora")
    );
}
