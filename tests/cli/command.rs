//! What the tests of the command share: running it, and examples for the tiny models.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value, json};

use crate::common::Folder;

/// A file or folder below tests/oracle, as an argument.
pub(crate) fn fixture(name: &str) -> String {
    format!("{}/tests/oracle/{name}", env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_randlora"));
    command.args(args);
    command
}

pub(crate) fn randlora(args: &[&str]) -> Output {
    command(args).output().expect("the command runs")
}

/// What comes of it with this on standard input.
pub(crate) fn fed(args: &[&str], lines: impl AsRef<[u8]>) -> Output {
    let mut child = command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    child.stdin.take().expect("a pipe").write_all(lines.as_ref()).expect("it reads");
    child.wait_with_output().expect("it ends")
}

/// What a success prints.
pub(crate) fn text(args: &[&str]) -> String {
    let output = randlora(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The one object that a success prints with `--json`.
pub(crate) fn object(args: &[&str]) -> Value {
    let text = text(&[args, &["--json"]].concat());
    assert_eq!(text.lines().count(), 1, "one object in one line: {text}");
    serde_json::from_str(&text).expect("JSON")
}

/// What a failure says, in one line of standard error and nothing else.
pub(crate) fn failure(args: &[&str]) -> String {
    let output = randlora(args);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {message}");
    assert!(output.stdout.is_empty() && message.starts_with("error: "), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

/// Examples of 3 to 9 tokens below 50 for the models of tests/oracle: the class is `yes` where the
/// token 9 occurs, which is every second time.
pub(crate) fn examples(count: usize, seed: u64) -> Vec<Value> {
    let mut state = seed;
    let mut below = |n: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    };
    let mut example = |i: usize| {
        let inner = 1 + below(7);
        let mut ids: Vec<u64> = (0..inner).map(|_| 10 + below(40)).collect();
        if i % 2 == 1 {
            ids[below(inner) as usize] = 9;
        }
        let ids = [vec![2], ids, vec![3]].concat();
        json!({ "input_ids": ids, "label": if i % 2 == 1 { "yes" } else { "no" } })
    };
    (0..count).map(&mut example).collect()
}

/// What the tokenizer calls this token of an example.
pub(crate) fn word(id: u64) -> String {
    match id {
        9 => "good".into(),
        10 => ",".into(),
        11 => "\"".into(),
        _ => format!("w{id}"),
    }
}

/// The arguments of `finetune` or `eval`: what these settings leave open is the tiny model and the
/// folder's examples, and an adapter of ours for `eval`.
pub(crate) fn arguments(work: &Work, name: &str, settings: &[&str]) -> Vec<String> {
    let model = ("--model", fixture("peft_training/model"));
    let defaults = match name {
        "eval" => {
            vec![model, ("--adapter", fixture("our_adapters/lora")), ("--data", work.path("eval.jsonl"))]
        }
        _ => vec![
            model,
            ("--train", work.path("train.jsonl")),
            ("--eval", work.path("eval.jsonl")),
            ("--out", work.path("out")),
            ("--batch-size", "8".into()),
        ],
    };
    let defaults = defaults.into_iter().filter(|(name, _)| !settings.contains(name));
    let defaults = defaults.flat_map(|(name, value)| [name.into(), value]);
    [name.into()].into_iter().chain(defaults).chain(settings.iter().map(|s| s.to_string())).collect()
}

pub(crate) fn refs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// A folder to work in, which goes when the test ends.
pub(crate) struct Work(Folder);

impl Work {
    pub(crate) fn empty(name: &str) -> Work {
        Work(Folder::with(name, &[]))
    }

    /// With train.jsonl and eval.jsonl.
    pub(crate) fn new(name: &str) -> Work {
        let work = Work::empty(name);
        work.rows("train.jsonl", &examples(96, 1));
        work.rows("eval.jsonl", &examples(64, 2));
        work
    }

    /// The path of a file or folder within.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.0.join(name).to_str().expect("UTF-8").into()
    }

    /// Writes a file, and says where.
    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        fs::write(self.0.0.join(name), contents).expect("a file");
        self.path(name)
    }

    /// Writes JSONL.
    pub(crate) fn rows(&self, name: &str, rows: &[Value]) -> String {
        self.write(name, rows.iter().map(|row| format!("{row}\n")).collect::<String>())
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.0.join(name)).expect(name)
    }

    /// The names of what is there, hidden files too, in order.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.0.join(folder)).expect("a folder");
        let mut names: Vec<String> =
            entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// All files below, with their sizes, and all folders, in order.
    pub(crate) fn tree(&self) -> Vec<(PathBuf, Option<u64>)> {
        let (mut tree, mut open) = (vec![], vec![self.0.0.clone()]);
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).expect("a folder") {
                let (path, about) = entry.and_then(|e| Ok((e.path(), e.metadata()?))).expect("an entry");
                tree.push((path.clone(), about.is_file().then_some(about.len())));
                open.extend(about.is_dir().then_some(path));
            }
        }
        tree.sort();
        tree
    }

    /// Copies the files of a fixture's folder into one within, and says where it is.
    pub(crate) fn copy(&self, name: &str, from: &str) -> String {
        fs::create_dir_all(self.0.0.join(name)).expect("a folder");
        for file in fs::read_dir(from).expect("a folder") {
            let file = file.expect("an entry").path();
            fs::copy(&file, self.0.0.join(name).join(file.file_name().expect("a name"))).expect("a copy");
        }
        self.path(name)
    }

    /// A copy of a model's folder with a tokenizer of the words that [`word`] gives.
    pub(crate) fn with_tokenizer(&self, name: &str, from: &str) -> String {
        let model = self.copy(name, from);
        let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"].map(String::from).into_iter().zip(0..);
        let vocab: Map<String, Value> =
            special.chain((9..50).map(|id| (word(id), id))).map(|(word, id)| (word, json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0",
            "pre_tokenizer": { "type": "Whitespace" },
            "post_processor": { "type": "BertProcessing", "cls": ["[CLS]", 2], "sep": ["[SEP]", 3] },
            "added_tokens": [],
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" },
        });
        self.write(&format!("{name}/tokenizer.json"), tokenizer.to_string());
        model
    }
}
