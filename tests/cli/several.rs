//! Several adapters with `eval`, `predict` and `merge`: one after the other on one base, and as a weighted sum.

use std::path::Path;

use crate::command::{Work, arguments, failure, fed, fixture, object, randlora, refs, text};
use crate::common::{distance, expected, largest, tensors};
use randlora::io::save_safetensors;
use randlora::{DType, Device, Tensor};
use serde_json::{Value, json};

const NAMES: [&str; 3] = ["lora", "randlora", "block"];

fn model() -> String {
    fixture("peft_training/model")
}

fn rows() -> String {
    fixture("our_adapters/rows.jsonl")
}

/// `--adapter NAME=DIR` for these fixtures.
fn adapters(names: &[&str]) -> Vec<String> {
    let one = |name: &&str| {
        ["--adapter".to_string(), format!("{name}={}", fixture(&format!("our_adapters/{name}")))]
    };
    names.iter().flat_map(one).collect()
}

/// A command on the model with these adapters.
fn with(command: &str, names: &[&str], more: &[&str]) -> Vec<String> {
    let mut args = vec![command.to_string(), "--model".into(), model()];
    args.extend(adapters(names));
    args.extend(more.iter().map(|arg| arg.to_string()));
    args
}

/// The logits of the rows, and what else they say of the model.
fn logits(work: &Work, args: &[String]) -> Vec<f64> {
    let (rows, file) = (rows(), work.path("logits.safetensors"));
    text(&[&refs(args)[..], &["--data", &rows, "--logits", &file]].concat());
    expected(&tensors(Path::new(&file)), "logits")
}

#[test]
fn each_is_what_it_is_alone() {
    let work = Work::new("several");
    let data = work.path("eval.jsonl");
    let alone = |name: &str| object(&refs(&with("eval", &[name], &["--data", &data])));
    let found = text(&refs(&with("eval", &NAMES, &["--data", &data, "--json"])));
    let found: Vec<Value> = found.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(found.len(), NAMES.len());
    for (found, name) in found.iter().zip(NAMES) {
        let mut found = found.as_object().expect("an object").clone();
        assert_eq!(found.remove("adapter"), Some(name.into()));
        assert_eq!(Value::Object(found), alone(name));
    }
    let lines = text(&refs(&with("eval", &NAMES, &["--data", &data])));
    let names: Vec<&str> =
        lines.lines().filter_map(|line| Some(line.split_once(": 64 examples, ")?.0)).collect();
    assert_eq!(names, NAMES);

    // A folder without a name is called as it was typed.
    let (lora, block) = (fixture("our_adapters/lora"), fixture("our_adapters/block"));
    let model = model();
    let args = ["eval", "--model", &model, "--adapter", &lora, "--adapter", &block, "--data", &data];
    let unnamed = text(&args);
    assert!(
        unnamed.lines().zip([&lora, &block]).all(|(line, name)| line.starts_with(&format!("{name}: "))),
        "{unnamed}"
    );
}

#[test]
fn a_weighted_sum_merged_gives_the_same_logits() {
    let work = Work::empty("weighted");
    let of = |name: &str| logits(&work, &with("eval", &[name], &[]));
    let (lora, block) = (of("lora"), of("block"));
    for (weights, head) in [("0.5,0.5", "sum"), ("0.7,0.3", "sum"), ("-0.2,0.8", "block"), ("1,1", "lora")] {
        let sum = ["--weights", weights, "--head", head];
        let active = logits(&work, &with("eval", &["lora", "block"], &sum));
        assert!(distance(&active, &lora) > 1e-3 && distance(&active, &block) > 1e-3);
        let out = work.path(&format!("merged{weights}{head}"));
        let merged =
            object(&refs(&with("merge", &["lora", "block"], &[&sum[..], &["--out", &out]].concat())));
        assert!(merged["difference"].as_f64().is_some_and(|d| d < 1e-5), "{merged}");
        let after = logits(&work, &["eval".into(), "--model".into(), out]);
        assert!(distance(&after, &active) < 1e-5 * largest(&active).max(1.0), "{weights} {head}");
    }
    // One with the weight 1 is that one, and one of 0 is not there.
    let one = logits(&work, &with("eval", &["lora"], &["--weights", "1"]));
    assert_eq!(one, lora);
    let zero = logits(&work, &with("eval", &["lora", "block"], &["--weights", "1,0", "--head", "lora"]));
    assert!(distance(&zero, &lora) < 1e-6 * largest(&lora).max(1.0));
}

#[test]
fn predictions_of_several() {
    let work = Work::empty("several-texts");
    let model = work.with_tokenizer("model", &model());
    let alone = |name: &str, more: &[&str]| {
        let adapter = fixture(&format!("our_adapters/{name}"));
        let args = ["predict", "--model", &model, "--adapter", &adapter];
        text(&[&args[..], more, &["w12 good", "w13"]].concat()).lines().map(String::from).collect::<Vec<_>>()
    };
    let several = |more: &[&str]| {
        let adapters = adapters(&["lora", "block"]);
        let args =
            [&["predict", "--model", &model][..], &refs(&adapters), more, &["w12 good", "w13"]].concat();
        text(&args).lines().map(String::from).collect::<Vec<_>>()
    };
    let (lora, block) = (alone("lora", &[]), alone("block", &[]));
    let want: Vec<String> =
        lora.iter().zip(&block).flat_map(|(a, b)| [format!("lora\t{a}"), format!("block\t{b}")]).collect();
    assert_eq!(several(&[]), want);

    let with_name = |name: &str, line: &String| {
        let mut value: Value = serde_json::from_str(line).expect("JSON");
        value["adapter"] = name.into();
        value
    };
    let (lora, block) = (alone("lora", &["--json"]), alone("block", &["--json"]));
    let found: Vec<Value> =
        several(&["--json"]).iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let want: Vec<Value> =
        lora.iter().zip(&block).flat_map(|(a, b)| [with_name("lora", a), with_name("block", b)]).collect();
    assert_eq!(found, want);
    // A sum has one answer.
    let sum = several(&["--weights", "0.5,0.5", "--head", "sum", "--json"]);
    assert!(sum.len() == 2 && !sum[0].contains("adapter"), "{sum:?}");
}

/// One base, and each line is for the adapter that it names.
#[test]
fn lines_choose_their_adapter() {
    let work = Work::empty("several-lines");
    let model = work.with_tokenizer("model", &model());
    let run = |names: &[&str], more: &[&str], lines: &str| {
        let adapters = adapters(names);
        let args =
            [&["predict", "--model", &model, "--json", "--jsonl"][..], &refs(&adapters), more].concat();
        let output = fed(&args, lines);
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (text(output.stdout), text(output.stderr))
    };
    let line = |name: &str, text: &str| json!({ "adapter": name, "text": text });
    // More than are worked on together, in turn.
    let asked: Vec<Value> =
        (0..100).map(|i| line(["lora", "block"][i % 2], &format!("w{} good", 12 + i % 30))).collect();
    let lines: String = asked.iter().map(|line| format!("{line}\n")).collect();
    let (said, error) = run(&["lora", "block"], &[], &lines);
    assert_eq!(error, "");
    let found: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(found.len(), asked.len());
    let alone = |name: &str| -> Vec<Value> {
        let (said, _) = run(&[name], &[], &lines.replace(["lora", "block"][(name == "lora") as usize], name));
        said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let (lora, block) = (alone("lora"), alone("block"));
    for (i, (asked, found)) in asked.iter().zip(&found).enumerate() {
        let want = [&lora, &block][i % 2];
        assert_eq!((&found["adapter"], &found["text"]), (&asked["adapter"], &asked["text"]));
        assert_eq!(found["label"], want[i]["label"]);
        // Another batch is another order of sums.
        let yes = |value: &Value| value["probabilities"]["yes"].as_f64().expect("a number");
        assert!((yes(found) - yes(&want[i])).abs() < 1e-6);
    }
    assert!(lora.iter().zip(&block).any(|(a, b)| a["probabilities"] != b["probabilities"]));

    // Who is not named answers too where nobody is.
    let (said, _) = run(&["lora", "block"], &[], "{\"text\": \"w12\", \"pair\": \"w13\"}\n");
    assert!(said.lines().count() == 2 && said.contains("\"pair\":\"w13\""), "{said}");
    for (lines, more, part) in [
        (
            "{\"text\": \"w12\"}\n{\"adapter\": \"dora\", \"text\": \"w12\"}",
            &[][..],
            "line 2: there is no adapter `dora`; there are: lora, block",
        ),
        ("w12", &[], "line 1: no valid JSON"),
        ("{}", &[], "line 1: there is no `text`"),
        ("[\"w12\"]", &[], "line 1: there is no `text`"),
        ("{\"text\": 5}", &[], "line 1: `text` is no text"),
        (
            "{\"adapter\": \"lora\", \"text\": \"w12\"}",
            &["--weights", "0.5,0.5", "--head", "sum"],
            "there is no adapter `lora`",
        ),
    ] {
        let (said, error) = run(&["lora", "block"], more, lines);
        assert!(said.is_empty() && error.contains(part), "{error}");
    }
}

/// The LoRA of the fixtures with a classifier of three outputs.
fn three_classes(work: &Work) -> String {
    let folder = work.copy("three", &fixture("our_adapters/lora"));
    let path = Path::new(&folder).join("adapter_model.safetensors");
    let source = tensors(&path);
    let tensor = |key: &str| {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::cpu()).expect("it is small");
        match key {
            key if key.ends_with("classifier.weight") => zeros(&[3, 24]),
            key if key.ends_with("classifier.bias") => zeros(&[3]),
            key => source.tensor(key, &Device::cpu()).expect("it is there"),
        }
    };
    let changed: Vec<_> = source.entries().map(|(key, _)| (key.to_string(), tensor(key))).collect();
    save_safetensors(&path, &changed, &[]).expect("it is written");
    work.write("three/randlora.json", r#"{"task": "classify", "max_length": 16, "labels": ["a", "b", "c"]}"#);
    folder
}

#[test]
fn what_cannot_be_said_of_several() {
    let work = Work::new("several-wrong");
    let (data, out) = (rows(), work.path("out"));
    let refused = |command: &str, names: &[&str], more: &[&str], parts: &[&str]| {
        let fixed = if command == "merge" { ["--out", &out] } else { ["--data", &data] };
        let message = failure(&refs(&with(command, names, &[&fixed[..], more].concat())));
        assert!(parts.iter().all(|part| message.contains(part)), "{message}\nlacks one of {parts:?}");
    };
    let two = ["lora", "block"];
    let head = ["--head: `lora` and `block` have each a `classifier.bias`", "`--head lora`", "`--head sum`"];
    for command in ["eval", "merge"] {
        refused(command, &two, &["--weights", "1,1"], &head);
        refused(command, &two, &["--weights", "1"], &["--weights: 1 for 2 adapters"]);
        refused(command, &two, &["--weights", "1,2,3", "--head", "lora"], &["--weights: 3 for 2 adapters"]);
        refused(
            command,
            &two,
            &["--weights", "1,1", "--head", "dora"],
            &["no adapter `dora`", "lora, block, or `sum`"],
        );
        let parts =
            ["--weights: those of adapters with a classifier sum to 0.75", "let them sum to 1", "`--head`"];
        refused(command, &two, &["--weights", "0.5,0.25", "--head", "sum"], &parts);
        refused(command, &["lora", "lora"], &[], &["--adapter: two are called `lora`", "--adapter a="]);
    }
    refused("merge", &two, &[], &["--weights: several adapters", "`--weights 1,1`", "`--weights 0.5,0.5`"]);
    refused("eval", &two, &["--logits", &work.path("logits")], &["--logits: ", "`--weights`"]);
    assert!(!Path::new(&out).exists());

    let three = format!("three={}", three_classes(&work));
    let parts = ["--adapter: the classifier of `lora` has 2 outputs, that of `three` 3", "runs of their own"];
    refused("eval", &["lora"], &["--adapter", &three], &parts);
    let other = work.copy("other", &fixture("our_adapters/block"));
    work.write("other/randlora.json", r#"{"task": "classify", "max_length": 16, "labels": ["yes", "no"]}"#);
    let other = format!("other={other}");
    let sum = ["--adapter", &other, "--weights", "0.5,0.5", "--head", "sum"];
    refused("eval", &["lora"], &sum, &["other: it has not the classes of ", "our_adapters/lora", "`--head`"]);

    let finetune = arguments(&work, "finetune", &[]).into_iter().chain(adapters(&two)).collect::<Vec<_>>();
    let finetune: Vec<&str> = finetune.iter().map(String::as_str).collect();
    assert!(failure(&finetune).contains("--adapter: there are 2: name the one that is meant"));

    // Misuse, before anything is read.
    for weights in ["nan,1", "inf,1", "a,1", "1,,1", ""] {
        let output = randlora(&refs(&with("eval", &two, &["--data", &data, "--weights", weights])));
        assert_eq!(output.status.code(), Some(2), "{weights}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("finite number"), "{weights}");
    }
    for more in [&["--weights", "1"][..], &["--head", "a"]] {
        let output = randlora(&[&["eval", "--model", &model(), "--data", &data], more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}");
    }
}

/// Sizes fit where the model is another one: only the name tells.
#[test]
fn adapters_of_different_models() {
    let work = Work::empty("several-models");
    let named = |name: &str, model: &str| {
        let folder = work.copy(name, &fixture("our_adapters/lora"));
        let config = String::from_utf8(work.read(&format!("{name}/adapter_config.json"))).expect("UTF-8");
        let mut config: Value = serde_json::from_str(&config).expect("JSON");
        config["base_model_name_or_path"] = model.into();
        work.write(&format!("{name}/adapter_config.json"), config.to_string());
        format!("{name}={folder}")
    };
    let (here, there) = (named("here", "models/tiny"), named("there", "/other/tiny/"));
    let else_ = named("else", r"C:\models\small");
    let said = |adapters: [&String; 2]| {
        let (model, rows) = (model(), rows());
        let [a, b] = adapters;
        let output = randlora(&["eval", "--model", &model, "--data", &rows, "--adapter", a, "--adapter", b]);
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert_eq!(said([&here, &there]), "");
    assert_eq!(
        said([&here, &else_]),
        "note: `here` was made for tiny and `else` for small: is it the same model?\n"
    );
}
