//! `randlora study` from outside: what it trains, goes on from, chooses and says.

use std::fs;

use crate::command::{Work, examples, failure, fixture, randlora, text};
use serde_json::Value;

/// A folder `toy` with a task, and the arguments of a study of it.
fn study(name: &str) -> (Work, Vec<String>) {
    let work = Work::empty(name);
    fs::create_dir_all(work.path("toy")).expect("a folder");
    work.rows("toy/train.jsonl", &examples(120, 1));
    work.rows("toy/dev.jsonl", &examples(64, 2));
    let args = [
        ("--model", fixture("peft_training/model")),
        ("--task", work.path("toy")),
        ("--out", work.path("out")),
        ("--held-out", "40".into()),
        ("--max-train", "64".into()),
        ("--epochs", "2".into()),
        ("--batch-size", "8".into()),
        ("--max-length", "16".into()),
        ("--rank", "8".into()),
    ];
    let args = args.into_iter().flat_map(|(name, value)| [name.to_string(), value]);
    let args = ["study".to_string()].into_iter().chain(args).collect();
    (work, args)
}

/// The arguments with more of them, which take the place of those of the same name but for tasks.
fn with<'a>(args: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    let replaced = |name: &str| name != "--task" && more.contains(&name);
    let kept = args[1..].chunks(2).filter(|pair| !replaced(&pair[0])).flatten().map(String::as_str);
    ["study"].into_iter().chain(kept).chain(more.iter().copied()).collect()
}

fn lines(work: &Work) -> Vec<Value> {
    let text = String::from_utf8(work.read("out/runs.jsonl")).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The cells of a method's row.
fn cells(table: &str, method: &str) -> Vec<String> {
    let row = table.lines().find(|line| line.starts_with(&format!("| {method} |"))).expect(method);
    row.split('|').map(|cell| cell.trim().to_string()).collect()
}

#[test]
fn a_study_chooses_by_held_out_rows_and_goes_on_where_it_was() {
    let (work, args) = study("study");
    let methods =
        ["--methods", "lora,randlora:block@peft", "--lr", "1e-2,1e-5", "--seeds", "2", "--jobs", "2"];
    let table = text(&with(&args, &methods));
    // Two methods at two rates with the first seed, then the better rate of each with the other.
    let first = lines(&work);
    assert_eq!(first.len(), 2 * 2 + 2);
    assert_eq!(work.names("out"), ["data", "runs.jsonl", "table.md", "toy.svg"]);
    assert_eq!(String::from_utf8(work.read("out/table.md")).expect("UTF-8"), table);
    for method in ["lora", "randlora:block@peft"] {
        let of = |rate: &str, seed: u64| {
            let mut found = first.iter().filter(|line| {
                let settings = &line["settings"];
                settings["method"] == method && settings["lr"] == rate && settings["seed"] == seed
            });
            found.next().map(|line| line["result"].clone())
        };
        let held_out = |rate: &str| of(rate, 0).expect(rate)["held_out"].as_f64().expect("a number");
        let best = if held_out("1e-2") > held_out("1e-5") { "1e-2" } else { "1e-5" };
        let judged = [0, 1].map(|seed| of(best, seed).expect(best)["validation"].as_f64().expect("a number"));
        let cells = cells(&table, method);
        let mean = 50.0 * (judged[0] + judged[1]);
        assert!(cells[3].starts_with(&format!("{mean:.1} ± ")) && cells[3].ends_with(" (2)"), "{cells:?}");
        assert!(cells[4].starts_with(best), "{cells:?}");
    }
    // As many numbers, as near as ranks come.
    let trained = |method: &str| cells(&table, method)[2].parse::<f64>().expect("a number");
    assert!((trained("lora") / trained("randlora:block@peft") - 1.0).abs() < 0.1, "{table}");
    // The rows are the file's, each in one place.
    let rows = |name: &str| String::from_utf8(work.read(name)).expect("UTF-8").lines().count();
    assert_eq!([rows("out/data/toy-train.jsonl"), rows("out/data/toy-held-out.jsonl")], [64, 40]);

    // All is there: nothing is trained.
    let before = work.read("out/runs.jsonl");
    assert_eq!(text(&with(&args, &methods)), table);
    assert!(work.read("out/runs.jsonl") == before);
    // An interruption in the middle of a line costs that line, even in the middle of a character.
    work.write("out/runs.jsonl", [&before[..before.len() - 7], &"é".as_bytes()[..1]].concat());
    text(&with(&args, &methods));
    let again = lines(&work);
    let without_times = |lines: &[Value]| -> Vec<Value> {
        let mut lines = lines.to_vec();
        for line in &mut lines {
            let result = line["result"].as_object_mut().expect("an object");
            result.retain(|name, _| !["seconds", "cpu_seconds", "peak_bytes"].contains(&name.as_str()));
        }
        lines
    };
    let (mut first, mut again) = (without_times(&first), without_times(&again));
    first.sort_by_key(Value::to_string);
    again.sort_by_key(Value::to_string);
    assert_eq!(first, again);
    // One more seed is one more training of each method.
    text(&with(&args, &["--methods", "lora,randlora:block@peft", "--lr", "1e-2,1e-5", "--seeds", "3"]));
    assert_eq!(lines(&work).len(), 8);
}

#[test]
fn a_rate_at_which_training_diverges_is_not_chosen() {
    let (work, args) = study("study-diverged");
    let table = text(&with(&args, &["--methods", "full", "--lr", "1e-3,1e30", "--seeds", "1"]));
    assert!(cells(&table, "full")[4].starts_with("1e-3"), "{table}");
    let diverged =
        lines(&work).into_iter().find(|line| line["settings"]["lr"] == "1e30").expect("it is there");
    assert!(diverged["result"]["diverged"].as_str().expect("a text").contains("is not finite"), "{diverged}");
}

#[test]
fn other_data_are_another_study() {
    let (work, args) = study("study-data");
    let head = ["--methods", "head", "--lr", "1e-2", "--seeds", "1"];
    text(&with(&args, &head));
    // As many rows, but others: what is known says nothing about them.
    work.rows("toy/train.jsonl", &examples(120, 3));
    text(&with(&args, &head));
    let lines = lines(&work);
    assert_eq!(lines.len(), 2);
    assert_ne!(lines[0]["settings"]["data"], lines[1]["settings"]["data"]);
}

#[test]
fn what_a_study_refuses() {
    let (work, args) = study("study-refuses");
    let misuse = |more: &[&str]| {
        let output = randlora(&with(&args, more));
        assert_eq!(output.status.code(), Some(2), "{more:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(misuse(&["--methods", "lola"]).contains("no method `lola` among: randlora, lora"));
    assert!(misuse(&["--methods", "atlas"]).contains("atlas needs task vectors, which a study has none of"));
    assert!(misuse(&["--methods", "lora:block"]).contains("lora has no bases"));
    assert!(misuse(&["--methods", "randlora@big"]).contains("auto, peft, paper or a finite number"));
    assert!(misuse(&["--task", "toy,colour=3"]).contains("`colour=3` is not among: text="));
    assert!(misuse(&["--lr", "0"]).contains("a number above 0"));
    assert!(failure(&with(&args, &["--held-out", "120"])).contains("ask for fewer with `--held-out`"));
    assert!(
        failure(&with(&args, &["--task", &work.path("nothing")])).contains("there is none of: train.tsv")
    );
    let twice = ["--task", &work.path("toy"), "--task", &work.path("other/toy")];
    assert!(failure(&with(&args, &twice)).contains("two folders of this name"));
    let metric = format!("{},metric=bleu", work.path("toy"));
    let alone: Vec<String> =
        args.iter().map(|arg| if *arg == work.path("toy") { metric.clone() } else { arg.clone() }).collect();
    let message = failure(&with(&alone, &["--methods", "head", "--lr", "1e-2"]));
    assert!(message.contains("`eval` says no `bleu`"), "{message}");
    work.write("out/runs.jsonl", "{}\n");
    assert!(failure(&with(&args, &["--methods", "head"])).contains("runs.jsonl: line 1: this is no record"));
}
