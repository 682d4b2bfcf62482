//! Every method on the command line: trained, saved, evaluated, trained on, shown.

use std::path::Path;

use crate::command::{Work, arguments, examples, failure, fixture, object, randlora, refs, text};
use crate::common::{load, tensors};
use randlora::io::{Access, save_safetensors};
use randlora::nn::Module;
use randlora::{Device, Tensor};
use serde_json::{Value, json};

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
    for method in ["atlas", "svft", "pranc", "intrinsic", "bitfit", "full", "head"] {
        let error = error(&["--method", method, "--alpha", "8"]);
        assert!(error.contains(&format!("--alpha: {method} has no alpha: leave it out")), "{error}");
    }
    assert!(error(&["--method", "lora", "--bases", "block"]).contains("bases: lora has none: leave it out"));
    let plan = failure(&["inspect", &model, "--method", "lora", "--bases", "block"]);
    assert!(plan.contains("bases: lora has none"), "{plan}");
    assert!(error(&["--method", "pissa", "--rank", "25"]).contains("24 singular values"));
    assert!(
        failure(&["demo", "--methods", "lora,lola"]).contains("no method `lola`; there are: probe, lora")
    );
}

/// Trains the tiny model on these examples.
fn finetune(work: &Work, out: &str, more: &[&str]) -> Value {
    object(&refs(&arguments(work, "finetune", &[&["--out", &work.path(out)], more].concat())))
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.detach().to_vec().expect("f32")
}

#[test]
fn atlas_combines_whole_models_and_adapters() {
    let work = Work::new("atlas");
    let model = fixture("peft_training/model");
    // What others have learned may be of other classes.
    let mut others = examples(96, 5);
    (0..96).for_each(|i| others[i]["label"] = json!(["a", "b", "c"][i % 3]));
    let others = work.rows("others.jsonl", &others);
    let other = ["--train", &others, "--eval", &others, "--epochs", "1"];
    finetune(&work, "full", &[&["--method", "full", "--lr", "1e-3"], &other[..]].concat());
    finetune(&work, "lora", &["--method", "lora", "--lr", "1e-2", "--epochs", "1"]);
    finetune(
        &work,
        "nola",
        &["--method", "nola", "--coefficients", "9", "--targets", "query", "--epochs", "1"],
    );
    let folders = ["full/last", "lora/best", "nola/last"].map(|folder| work.path(folder));

    let vectors = folders.join(",");
    let atlas = ["--method", "atlas", "--task-vectors", &vectors, "--epochs", "2", "--lr", "1e-1"];
    let found = finetune(&work, "atlas", &atlas);
    assert_eq!(found["method"], "atlas");
    // Six layers with a number for each task, and the classifier.
    assert_eq!(found["trained_parameters"], json!(6 * 3 + (24 + 1) * 2));
    assert_eq!(
        work.names("atlas/last"),
        ["adapter_config.json", "adapter_model.safetensors", "randlora.json"]
    );
    let saved = tensors(Path::new(&work.path("atlas/last/adapter_model.safetensors")));
    let [base, tuned] = [Path::new(&model), Path::new(&folders[0])].map(|folder| load(folder, Access::Read));
    let mut compared = 0;
    for ((name, before), (_, after)) in base.linears().into_iter().zip(tuned.linears()) {
        let Some(_) = saved.entry(&format!("{name}.atlas.tau.0")) else { continue };
        let tau = saved.tensor(&format!("{name}.atlas.tau.0"), &Device::cpu()).expect("it is there");
        let changed = after.weight().value().sub(before.weight().value()).expect("the same sizes");
        assert_eq!(numbers(&tau), numbers(&changed), "{name}");
        assert!(numbers(&tau).iter().any(|&x| x != 0.0), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 6);
    // The folder needs none of those that it was made from.
    folders.iter().for_each(|folder| std::fs::remove_dir_all(folder).expect("it was made"));

    let (last, data) = (work.path("atlas/last"), work.path("eval.jsonl"));
    let scores = object(&["eval", "--model", &model, "--adapter", &last, "--data", &data]);
    assert_eq!((&scores["accuracy"], &scores["loss"]), (&found["last"]["accuracy"], &found["last"]["loss"]));
    let merged = work.path("merged");
    let done = object(&["merge", "--model", &model, "--adapter", &last, "--out", &merged]);
    assert!(done["layers"] == json!(6) && done["difference"].as_f64().expect("a number") < 1e-4, "{done}");
    let of_merged = object(&["eval", "--model", &merged, "--data", &data]);
    assert_eq!(of_merged["accuracy"], found["last"]["accuracy"]);
    let more = finetune(&work, "more", &["--adapter", &last, "--epochs", "1"]);
    assert_eq!(more["trained_parameters"], found["trained_parameters"]);
    object(&["eval", "--model", &model, "--adapter", &work.path("more/last"), "--data", &data]);

    let shown = object(&["inspect", &last]);
    assert_eq!((&shown["method"], &shown["vectors"]), (&json!("atlas"), &json!(3)));
    assert_eq!(shown["adapter_parameters"], json!(6 * 3));
    assert_eq!(shown["given_parameters"], json!(6 * 3 * 24 * 24));
    let sizes = object(&["inspect", &last, "--model", &model]);
    assert!(sizes["layers"][0]["delta"].as_f64().expect("a number") > 0.0, "{sizes}");
    assert!(text(&["inspect", &last]).contains("given, not trained"));
}

#[test]
fn task_vectors_that_are_none_are_refused() {
    let work = Work::new("no-task-vectors");
    let model = fixture("peft_training/model");
    finetune(&work, "hydra", &["--method", "hydralora", "--rank", "2", "--epochs", "1"]);
    let before = work.tree();
    let error = |more: &[&str]| failure(&refs(&arguments(&work, "finetune", more)));
    let of = |folder: &str| error(&["--method", "atlas", "--task-vectors", folder]);
    let lacks =
        "--task-vectors: atlas combines models that were fine-tuned from this one: name their folders";
    assert!(error(&["--method", "atlas"]).contains(lacks));
    assert!(failure(&["inspect", &model, "--method", "atlas"]).contains(lacks));
    assert!(error(&["--task-vectors", &model]).contains("randlora combines none: say `--method atlas`"));
    assert!(of("/nowhere/model").contains("/nowhere/model: there is no such folder"));
    assert!(of(&model).contains("peft_training/model: it changes none of the layers that are adapted"));
    let wide = of(&fixture("bert/single_label"));
    assert!(wide.contains("single_label: ") && wide.contains("in the base and [36, 36] after it"), "{wide}");
    let to_do =
        format!("name a model that was fine-tuned from {model}, or leave that layer out with `--targets`");
    assert!(wide.contains(&to_do), "{wide}");
    let hydra = of(&work.path("hydra/last"));
    assert!(hydra.contains("hydra/last: ") && hydra.contains("an adapter that can be merged"), "{hydra}");
    let both = work.copy("both", &model);
    work.copy("both", &fixture("our_adapters/lora"));
    assert!(of(&both).contains("both: it holds both a model and an adapter: give each a folder of its own"));
    std::fs::remove_dir_all(both).expect("it was made");
    let short = work.copy("short", &model);
    let config = String::from_utf8(work.read("short/config.json")).expect("UTF-8");
    work.write("short/config.json", config.replace("hidden_layers\": 2", "hidden_layers\": 1"));
    let lacks = of(&short);
    assert!(lacks.contains("short: it lacks `bert.encoder.layer.1.") && lacks.contains(&to_do), "{lacks}");
    std::fs::remove_dir_all(short).expect("it was made");
    type Edit<'a> = &'a dyn Fn(&mut Vec<(String, Tensor)>);
    let edited = |edit: Edit<'_>| {
        let broken = work.copy("broken", &model);
        let file = Path::new(&broken).join("model.safetensors");
        let stored = tensors(&file);
        let read = |name: &str| (name.to_string(), stored.tensor(name, &Device::cpu()).expect("it is there"));
        let mut kept = stored.entries().map(|(name, _)| read(name)).collect();
        edit(&mut kept);
        save_safetensors(&file, &kept, &[("format", "pt")]).expect("a file");
        let message = of(&broken);
        std::fs::remove_dir_all(broken).expect("it was made");
        message
    };
    let key = |name: &str| name.ends_with("layer.1.attention.self.key.weight");
    let infinite = edited(&|tensors| {
        let weight = tensors.iter_mut().find(|(name, _)| key(name)).expect("it is there");
        weight.1 = weight.1.scale(f64::INFINITY).expect("f32");
    });
    assert!(infinite.contains("key` is not finite: ") && infinite.contains(&to_do), "{infinite}");
    let missing = edited(&|tensors| tensors.retain(|(name, _)| !key(name)));
    assert!(missing.contains("key.weight`") && missing.contains("broken"), "{missing}");
    let vectors = fixture("our_adapters/lora");
    let set = |more: &[&str]| error(&[&["--method", "atlas", "--task-vectors", &vectors], more].concat());
    assert!(set(&["--rank", "3"]).contains("atlas has none"));
    assert!(set(&["--dropout", "0.1"]).contains("atlas has none"));
    assert!(set(&["--scale", "2"]).contains("atlas has none"));
    assert!(set(&["--coefficients", "2"]).contains("atlas has none"));
    assert!(work.tree() == before);
    let both = ["--adapter", &vectors, "--task-vectors", &vectors];
    assert_eq!(randlora(&refs(&arguments(&work, "finetune", &both))).status.code(), Some(2));
    let plan =
        object(&["inspect", &model, "--method", "atlas", "--task-vectors", &vectors, "--batch-size", "2"]);
    assert_eq!(plan["adapter_parameters"], json!(6));
    assert_eq!(plan["given_bytes"], json!(6 * 24 * 24 * 4));
    let other = work.copy("other", &model);
    let output =
        randlora(&["inspect", &other, "--method", "atlas", "--task-vectors", &vectors, "--batch-size", "2"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("task vectors"), "{output:?}");
    let note = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(note.contains("lora was made for model: is it the same model as"), "{note}");
}
