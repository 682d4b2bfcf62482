//! `randlora finetune`, `eval` and `predict` from outside, on texts in every kind of file.

use crate::command::{Work, examples, fed, fixture, object, randlora, text, word};
use serde_json::{Value, json};

/// The text that has these tokens.
fn sentence(example: &Value) -> String {
    let ids = example["input_ids"].as_array().expect("a list");
    let words = ids[1..ids.len() - 1].iter().map(|id| word(id.as_u64().expect("a number")));
    words.collect::<Vec<_>>().join(" ")
}

fn label(example: &Value) -> &str {
    example["label"].as_str().expect("a text")
}

/// The model of the fixtures with a tokenizer.
fn model(work: &Work) -> String {
    work.with_tokenizer("model", &fixture("peft_training/model"))
}

/// Trains on a file and evaluates on it, with these settings, and says what `finetune` found.
fn train(work: &Work, model: &str, data: &str, out: &str, settings: &[&str]) -> Value {
    let (out, data) = (work.path(out), work.path(data));
    let fixed = ["finetune", "--model", model, "--train", &data, "--eval", &data, "--out", &out];
    object(&[&fixed[..], &["--scale", "peft", "--lr", "1e-2", "--batch-size", "8"], settings].concat())
}

/// The scores of the last adapter on a file.
fn evaluate(work: &Work, model: &str, data: &str, out: &str, settings: &[&str]) -> Value {
    let (adapter, data) = (work.path(&format!("{out}/last")), work.path(data));
    object(&[&["eval", "--model", model, "--adapter", &adapter, "--data", &data], settings].concat())
}

/// Fails unless all scores of the evaluation are those of the training.
fn same_scores(evaluated: &Value, trained: &Value) {
    let mut scores = evaluated.as_object().expect("an object").clone();
    assert!(scores.remove("examples").is_some() && scores.len() >= 2, "{evaluated}");
    assert!(scores.iter().all(|(name, value)| trained[name] == *value), "{evaluated} {trained}");
}

#[test]
fn the_kind_of_a_file_makes_no_difference() {
    let work = Work::empty("files");
    let model = model(&work);
    let rows = examples(64, 3);
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let lines = |line: &dyn Fn(&str, &str) -> String| -> String {
        rows.iter().map(|row| line(&sentence(row), label(row))).collect()
    };
    work.rows("ids.jsonl", &rows);
    work.write("texts.jsonl", lines(&|s, l| format!("{}\n", json!({ "text": s, "label": l }))));
    work.write("named.jsonl", lines(&|s, l| format!("{}\n", json!({ "a": s, "b": l, "text": "w12" }))));
    work.write("header.tsv", format!("label\tsentence\r\n{}", lines(&|s, l| format!("{l}\t{s}\r\n"))));
    work.write("bare.tsv", lines(&|s, l| format!("{s}\tw12\t{l}\n")));
    work.write(
        "header.csv",
        format!("\u{feff}text,label\n{}", lines(&|s, l| format!("{},{l}\n", quoted(s)))),
    );
    work.write("bare.csv", lines(&|s, l| format!("{l},{}\n\n", quoted(s))));
    work.write("odd.names", format!("q;1,a b\n{}", lines(&|s, l| format!("{l},{}\n", quoted(s)))));
    let mut first = None;
    for (file, settings) in [
        ("ids.jsonl", &[][..]),
        ("texts.jsonl", &[]),
        ("named.jsonl", &["--text", "a", "--label", "b"]),
        ("header.tsv", &[]),
        ("header.tsv", &["--header", "--text", "2", "--label", "1"]),
        ("bare.tsv", &["--no-header", "--text", "1", "--label", "3"]),
        ("header.csv", &[]),
        ("bare.csv", &["--text", "2", "--label", "1"]),
        ("odd.names", &["--format", "csv", "--text", "a b", "--label", "q;1"]),
    ] {
        let found = train(&work, &model, file, "out", &[settings, &["--force"]].concat());
        same_scores(&evaluate(&work, &model, file, "out", settings), &found["last"]);
        let adapter = work.read("out/last/adapter_model.safetensors");
        assert!(*first.get_or_insert(adapter.clone()) == adapter, "{file} {settings:?}");
    }
}

#[test]
fn pairs_and_numbers() {
    let work = Work::empty("pairs");
    let model = model(&work);
    let others = examples(64, 5);
    let rows = examples(64, 4).into_iter().zip(others.iter().step_by(2).cycle()).map(|(a, b)| {
        let score = if label(&a) == "yes" { 2.5 } else { -1.0 };
        format!("{score}\t{}\t{}\n", sentence(&a), sentence(b))
    });
    work.write("pairs.tsv", format!("score\tsentence1\tsentence2\n{}", rows.collect::<String>()));
    let found = train(&work, &model, "pairs.tsv", "out", &["--task", "regress", "--epochs", "10"]);
    assert!(found["best"]["pearson"].as_f64() > Some(0.7), "{found}");
    assert!(found["best"]["mean_squared_error"].as_f64() < Some(1.75f64.powi(2)), "{found}");
    same_scores(&evaluate(&work, &model, "pairs.tsv", "out", &[]), &found["last"]);

    let adapter = work.path("out/best");
    let predict = |texts: &[&str]| {
        let line = object(&[&["predict", "--model", &model, "--adapter", &adapter], texts].concat());
        line["value"].as_f64().expect("a number")
    };
    let (a, b) = ("w12 good w13", "w14 w15");
    assert_ne!(predict(&["--pair", a, b]), predict(&["--pair", b, a]));
    assert_ne!(predict(&["--pair", a, b]), predict(&[a]));
    let line = text(&["predict", "--model", &model, "--adapter", &adapter, "--pair", a, b]);
    assert_eq!(line, format!("{:.4}\t{a}\t{b}\n", predict(&["--pair", a, b])));
    let odd = randlora(&["predict", "--model", &model, "--adapter", &adapter, "--pair", a]);
    let said = String::from_utf8_lossy(&odd.stderr);
    assert_eq!((odd.status.code(), &*said), (Some(2), "error: 1 texts make no pairs: give an even number\n"));
}

#[test]
fn several_labels() {
    let work = Work::empty("several");
    let model = model(&work);
    let rows = examples(64, 6);
    let labels = |row: &Value| {
        let long = if row["input_ids"].as_array().expect("a list").len() > 6 { "long" } else { "short" };
        [label(row).replace("no", ""), long.into()].into_iter().filter(|l| !l.is_empty()).collect::<Vec<_>>()
    };
    let arrays = rows.iter().map(|row| json!({ "input_ids": row["input_ids"], "labels": labels(row) }));
    work.rows("arrays.jsonl", &arrays.collect::<Vec<_>>());
    let cells = rows.iter().map(|row| format!("{}\t{}\n", sentence(row), labels(row).join(" ; ")));
    work.write("cells.tsv", format!("text\tlabels\n{}", cells.collect::<String>()));

    let found = train(&work, &model, "arrays.jsonl", "arrays", &["--epochs", "8"]);
    assert!(found["best"]["micro_f1"].as_f64() > Some(0.8), "{found}");
    same_scores(&evaluate(&work, &model, "arrays.jsonl", "arrays", &[]), &found["last"]);
    let again = train(&work, &model, "cells.tsv", "cells", &["--epochs", "8", "--separator", ";"]);
    assert_eq!(again["best"], found["best"]);
    let adapter = |out: &str| work.read(&format!("{out}/best/adapter_model.safetensors"));
    assert!(adapter("arrays") == adapter("cells"));
    let about: Value = serde_json::from_slice(&work.read("cells/best/randlora.json")).expect("JSON");
    let wanted =
        json!({ "task": "classify", "separator": ";", "labels": ["long", "short", "yes"], "max_length": 16 });
    assert_eq!(about, wanted);

    let adapter = work.path("cells/best");
    let said = object(&["predict", "--model", &model, "--adapter", &adapter, "w12 w13 good w15 w16 w17 w18"]);
    assert_eq!(said["labels"], json!(["long", "yes"]), "{said}");
    for (name, probability) in said["probabilities"].as_object().expect("an object") {
        let among = said["labels"].as_array().is_some_and(|labels| labels.contains(&json!(name)));
        assert_eq!(probability.as_f64() > Some(0.5), among, "{said}");
    }
}

#[test]
fn predictions_of_arguments_and_of_lines() {
    let work = Work::new("predict");
    let model = model(&work);
    train(&work, &model, "train.jsonl", "out", &["--epochs", "8"]);
    let adapter = work.path("out/best");
    let args = ["predict", "--model", &model, "--adapter", &adapter];
    let with = |more: &[&str], lines: &str| {
        let output = fed(&[&args[..], more].concat(), lines);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    // More lines than are worked on together.
    let rows = examples(150, 7);
    let lines: String = rows.iter().map(|row| sentence(row) + "\n").collect();
    let said: Vec<Value> =
        with(&["--json"], &lines).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(said.len(), 150);
    let mut right = 0;
    for (said, row) in said.iter().zip(&rows) {
        assert_eq!(said["text"], sentence(row));
        let [no, yes] = ["no", "yes"].map(|name| said["probabilities"][name].as_f64().expect("a number"));
        assert!((no + yes - 1.0).abs() < 1e-9);
        assert_eq!(said["label"], if yes > no { "yes" } else { "no" });
        right += usize::from(said["label"] == label(row));
    }
    assert!(right >= 130, "{right} of 150");

    let texts = [sentence(&rows[0]), sentence(&rows[1])];
    let plain = text(&[&args[..], &[&texts[0], &texts[1]]].concat());
    let of = |said: &Value, text: &str| {
        let label = said["label"].as_str().expect("a text");
        format!("{label}\t{:.4}\t{text}\n", said["probabilities"][label].as_f64().expect("a number"))
    };
    assert_eq!(plain, of(&said[0], &texts[0]) + &of(&said[1], &texts[1]));
    assert_eq!(with(&[], &texts.join("\n")), plain);
    assert_eq!(with(&[], ""), "");

    // A whole model speaks for itself.
    train(&work, &model, "train.jsonl", "full", &["--method", "full", "--epochs", "6"]);
    assert!(work.names("full/best").contains(&"tokenizer.json".into()));
    let said = object(&["predict", "--model", &work.path("full/best"), "w12 good w13"]);
    assert_eq!(said["label"], "yes");
}

#[test]
fn a_line_that_cannot_be_read_is_named() {
    let work = Work::empty("lines");
    let (model, adapter) = (model(&work), fixture("our_adapters/lora"));
    let refused = |more: &[&str], lines: &[u8]| {
        let output = fed(&[&["predict", "--model", &model, "--adapter", &adapter], more].concat(), lines);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    let before = "w12 good\n".repeat(70);
    assert_eq!(
        refused(&[], &[before.as_bytes(), b"w13\n\xff\n"].concat()),
        "error: standard input: line 72: this is not UTF-8: convert the text\n"
    );
    assert_eq!(
        refused(&["--pair"], b"w12\tw13\nw14\n"),
        "error: standard input: line 2: there is no tab between two texts\n"
    );
}
