use std::path::PathBuf;

use super::*;

/// A file of the assets beside the project (`RANDLORA_ASSETS`), or `None` where there are none.
fn asset(inside: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets");
    let path = std::env::var_os("RANDLORA_ASSETS").map_or_else(beside, PathBuf::from).join(inside);
    if !path.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing: set RANDLORA_ASSETS", path.display());
        eprintln!("skipped: {} is missing", path.display());
        return None;
    }
    Some(path)
}

/// A file with this content for as long as the value lives.
struct File(PathBuf);

impl File {
    fn new(name: &str, content: impl AsRef<[u8]>) -> File {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("randlora-table-{}-{count}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        File(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0.parent().unwrap());
    }
}

fn columns(text: &str, pair: &str, label: &str) -> Columns {
    let column = |name: &str| (!name.is_empty()).then(|| name.parse().unwrap());
    Columns { text: column(text), pair: column(pair), label: column(label), ..Columns::default() }
}

fn with_header(header: bool, columns: Columns) -> Columns {
    Columns { header: Some(header), ..columns }
}

/// Each example as "line first|second label".
fn shown(name: &str, content: impl AsRef<[u8]>, columns: &Columns, labels: Labels) -> Result<Vec<String>> {
    let file = File::new(name, content);
    Ok(read(&file.0, columns, labels)?.iter().map(show).collect())
}

fn show(example: &Example) -> String {
    let input = match &example.input {
        Input::Text { first, second: None } => first.clone(),
        Input::Text { first, second: Some(second) } => format!("{first}|{second}"),
        ids => format!("{ids:?}"),
    };
    match &example.label {
        None => format!("{} {input}", example.line),
        Some(Label::Text(text)) => format!("{} {input} {text}", example.line),
        Some(label) => format!("{} {input} {label:?}", example.line),
    }
}

#[track_caller]
fn reads(name: &str, content: &str, columns: &Columns, expected: &[&str]) {
    assert_eq!(shown(name, content, columns, Labels::IfThere).unwrap(), expected);
}

/// The error, without the folder before the file's name.
#[track_caller]
fn fails(name: &str, content: impl AsRef<[u8]>, columns: &Columns, expected: &str) {
    let error = shown(name, content, columns, Labels::Needed).unwrap_err().to_string();
    let error = &error[error.find(&format!("{name}:")).unwrap()..];
    assert_eq!(error, format!("{name}: {expected}"));
}

#[test]
fn columns_by_the_usual_names() {
    let none = Columns::default();
    reads("a.tsv", "sentence\tlabel\na \"b\t0\n\"c\t1\n", &none, &["2 a \"b 0", "3 \"c 1"]);
    reads("a.txt", "Label\tText\n0\tx", &none, &["2 x 0"]);
    reads("a.csv", "idx,premise,hypothesis,label\n7,x,y,2\n", &none, &["2 x|y 2"]);
    reads("a.csv", "question,sentence,label\nx,y,no\n", &none, &["2 x|y no"]);
    reads("a.csv", "sentence1,sentence2,score\nx,y,4.75\n", &none, &["2 x|y 4.75"]);
    reads("a.csv", "text,other\nx,y\n", &none, &["2 x"]);
    // A text that is asked for stands alone; a second one that is asked for joins the usual first.
    reads("a.csv", "sentence1,sentence2\nx,y\n", &columns("sentence1", "", ""), &["2 x"]);
    reads("a.csv", "sentence1,sentence2\nx,y\n", &columns("", "sentence1", ""), &["2 x|x"]);
}

#[test]
fn columns_by_name_and_number() {
    let table = "tweet\tmood\tnote\nx\tglad\tn\ny\tsad\tm\n";
    reads("a.tsv", table, &columns("tweet", "", "mood"), &["2 x glad", "3 y sad"]);
    reads("a.tsv", table, &columns("1", "note", "2"), &["2 x|n glad", "3 y|m sad"]);
    reads("a.tsv", table, &with_header(true, columns("1", "", "2")), &["2 x glad", "3 y sad"]);
    reads("a.tsv", "gj04\t1\t\tx\ngj04\t0\t*\ty\n", &columns("4", "", "2"), &["1 x 1", "2 y 0"]);
    // Some files have remarks behind some of their rows.
    reads("a.tsv", "x\t1\ny\t0\tremark\n", &columns("1", "", "2"), &["1 x 1", "2 y 0"]);
}

#[test]
fn a_header_above_numbered_columns_is_seen() {
    let numbers = columns("1", "", "2");
    reads("a.tsv", "sentence\tmood\nx\tglad\n", &numbers, &["2 x glad"]);
    reads("a.tsv", "tweet\tstars\nx\t1\ny\t4.5\n", &numbers, &["2 x 1", "3 y 4.5"]);
    reads("a.tsv", "x\tglad\ny\tsad\n", &numbers, &["1 x glad", "2 y sad"]);
    reads("a.tsv", "x\tglad\n", &numbers, &["1 x glad"]);
    reads("a.tsv", "x\t5.0\ny\t1\n", &numbers, &["1 x 5.0", "2 y 1"]);
    let headless = with_header(false, numbers);
    reads("a.tsv", "sentence\tlabel\nx\t1\n", &headless, &["1 sentence label", "2 x 1"]);
}

#[test]
fn quoted_fields() {
    let table = "text,label\n\"a, \"\"b\"\"\nc\",0\n\nd \"e\", 1 \n\"f\",\"2\"";
    reads("a.csv", table, &Columns::default(), &["2 a, \"b\"\nc 0", "5 d \"e\" 1", "6 f 2"]);
    let open = "a quote is opened in this row and never closed";
    fails("a.csv", "text,label\na,0\nb,\"1\nc,0\n", &Columns::default(), &format!("line 3: {open}"));
    fails("a.csv", "text,label\na,0\n\"b,1", &Columns::default(), &format!("line 3: {open}"));
    reads("a.csv", "label,text\n0,\"a\n\"\"b\"\"\"\n", &Columns::default(), &["2 a\n\"b\" 0"]);
}

#[test]
fn byte_order_marks_crlf_and_blank_lines() {
    let table = "\u{feff}sentence\tlabel\r\n\r\nx \t0\r\n\n\ny\t 1\r\n";
    reads("a.tsv", table, &Columns::default(), &["3 x  0", "6 y 1"]);
    reads("a.csv", &table.replace('\t', ","), &Columns::default(), &["3 x  0", "6 y 1"]);
    let rows = "\u{feff}{\"text\": \"x\", \"label\": \"a\"}\r\n\r\n{\"text\": \"y\", \"label\": \"b\"}\r\n";
    reads("a.jsonl", rows, &Columns::default(), &["1 x a", "3 y b"]);
}

#[test]
fn the_format_is_told_by_the_extension_or_an_option() {
    let given = Columns { format: Some(Format::Csv), ..Columns::default() };
    reads("a.data", "text,label\nx,0\n", &given, &["2 x 0"]);
    reads("A.TSV", "text\tlabel\nx\t0\n", &Columns::default(), &["2 x 0"]);
    for name in ["a.ndjson", "a.json"] {
        reads(name, "{\"text\": \"x\"}\n", &Columns::default(), &["1 x"]);
    }
    let expected = "the name does not tell the format: give `--format tsv|csv|jsonl`";
    fails("a.data", "text,label\n", &Columns::default(), expected);
    fails("data", "text,label\n", &Columns::default(), expected);
}

#[test]
fn what_a_column_is() {
    assert_eq!("12".parse(), Ok(Column::Number(12)));
    assert_eq!("2nd".parse(), Ok(Column::Name("2nd".into())));
    assert!("0".parse::<Column>().unwrap_err().contains("counted from 1"));
    assert!("99999999999999999999999".parse::<Column>().is_err());
    assert!("".parse::<Column>().is_err());
}

#[test]
fn columns_that_are_not_there() {
    let table = "tweet\tmood\nx\t0\n";
    let none = Columns::default();
    let no_header = "no header is found: give `--text` and `--label` as numbers of columns, 1 to 2";
    fails("a.tsv", table, &none, no_header);
    fails("a.tsv", "x\t0\n", &columns("1", "", ""), no_header);
    let missing = "there is no column `words`; the first row has: `tweet`, `mood`";
    fails("a.tsv", table, &columns("words", "", "mood"), missing);
    fails("a.tsv", table, &columns("tweet", "words", "mood"), missing);
    fails("a.tsv", table, &columns("tweet", "", "words"), missing);
    let label = "no column is called like a label; give `--label` one of: `tweet`, `mood`";
    fails("a.tsv", table, &columns("tweet", "", ""), label);
    let text = "no column is called like a text; give `--text` one of: `tweet`, `label`";
    fails("a.tsv", "tweet\tlabel\nx\t0\n", &none, text);
    fails("a.tsv", "tweet\tlabel\nx\t0\n", &columns("", "tweet", ""), text);
    fails("a.tsv", table, &columns("1", "", "3"), "there is no column 3: the first row has 2");
    let headless = with_header(false, columns("tweet", "", "2"));
    let message = "column `tweet` cannot be found without a header: give its number";
    fails("a.tsv", table, &headless, message);
    let twice = "two columns are called `a`: give a number";
    fails("a.tsv", "a\ta\tlabel\nx\ty\t0\n", &columns("a", "", "label"), twice);
    // A long first row is a text, not a header.
    let long = format!("{}\t0\n", "x".repeat(50));
    let message = format!("there is no column `text`; the first row has: `{}…`, `0`", "x".repeat(30));
    fails("a.tsv", long, &columns("text", "", "2"), &message);
}

#[test]
fn a_label_column_that_is_asked_for_must_be_there() {
    let one = shown("a.csv", "text,label\nx,0\n", &columns("text", "", "mood"), Labels::IfThere);
    assert!(one.unwrap_err().to_string().contains("no column `mood`"));
    let two = shown("a.jsonl", "{\"text\": \"x\"}\n", &columns("text", "", "mood"), Labels::IfThere);
    assert!(two.unwrap_err().to_string().contains("no field `mood`"));
}

#[test]
fn rows_that_do_not_fit() {
    let none = Columns::default();
    let few = "line 3: column 2 is missing: the row has 1";
    fails("a.tsv", "text\tlabel\nx\t0\ny\n", &none, few);
    fails("a.csv", "text,label\nx, y,0\n", &none, "line 2: 3 columns, but the header names 2");
    fails("a.tsv", "text\tlabel\nx\t0\ny\t \n", &none, "line 3: the label is empty");
    fails("a.tsv", "text\tlabel\n", &none, "the file has a header and no rows: give one example in each");
    for name in ["a.tsv", "a.csv", "a.jsonl"] {
        for content in ["", "\u{feff}", "\r\n \n"] {
            fails(name, content, &none, "the file is empty: give one example in each row");
        }
        fails(name, b"a\nb\xff\n", &none, "line 2: this is not UTF-8: convert the file");
    }
}

#[test]
fn files_that_cannot_be_read() {
    let file = File::new("a.tsv", "");
    let missing = read(&file.0.with_file_name("b.tsv"), &Columns::default(), Labels::Needed).unwrap_err();
    assert!(matches!(&missing, Error::Io { path, .. } if path.ends_with("b.tsv")), "{missing}");
    let folder = file.0.parent().unwrap();
    let error = read(folder, &Columns::default(), Labels::Needed).unwrap_err().to_string();
    assert!(error.ends_with("this is a directory: give a file of examples"), "{error}");
}

#[test]
fn fields_of_json() {
    let none = Columns::default();
    let pair = "{\"premise\": \"x\", \"hypothesis\": \"y\", \"label\": 2}\n";
    reads("a.jsonl", pair, &none, &["1 x|y Number(2.0)"]);
    reads("a.jsonl", pair, &columns("hypothesis", "", ""), &["1 y Number(2.0)"]);
    reads("a.jsonl", pair, &columns("", "hypothesis", ""), &["1 x|y Number(2.0)"]);
    let row = |label: &str| format!("{{\"text\": \"x\", \"label\": {label}}}");
    reads("a.jsonl", &row("\" a \""), &none, &["1 x a"]);
    reads("a.jsonl", &row("true"), &none, &["1 x true"]);
    reads("a.jsonl", &row("4.75"), &none, &["1 x Number(4.75)"]);
    reads("a.jsonl", &row("[\"a\", 1, 2.5]"), &none, &["1 x Many([\"a\", \"1\", \"2.5\"])"]);
    reads("a.jsonl", &row("[]"), &none, &["1 x Many([])"]);
    reads("a.jsonl", &row("null"), &none, &["1 x"]);
    fails("a.jsonl", row("{}"), &none, "line 1: `label` is an object, not a label");
    fails("a.jsonl", row("[[1]]"), &none, "line 1: `label` is an array, not a label");
    fails("a.jsonl", row("\" \""), &none, "line 1: `label`: the label is empty");
}

#[test]
fn tokens_instead_of_text() {
    let tokens = "{\"input_ids\": [101, 7, 102], \"attention_mask\": [1, 1, 0], \"token_type_ids\": [0, 0, 1], \
                  \"label\": \"a\"}\n{\"input_ids\": [5], \"attention_mask\": null, \"label\": \"b\"}";
    let file = File::new("a.jsonl", tokens);
    let found = read(&file.0, &Columns::default(), Labels::Needed).unwrap();
    let full = Input::Ids {
        input_ids: vec![101, 7, 102],
        attention_mask: Some(vec![true, true, false]),
        token_type_ids: Some(vec![0, 0, 1]),
    };
    let bare = Input::Ids { input_ids: vec![5], attention_mask: None, token_type_ids: None };
    assert_eq!([&found[0].input, &found[1].input], [&full, &bare]);

    // Tokens come before a text, unless a text is asked for.
    let both = "{\"text\": \"x\"}\n{\"text\": \"y\", \"input_ids\": [5]}\n";
    reads("a.jsonl", both, &Columns::default(), &["1 x", &format!("2 {bare:?}")]);
    reads("a.jsonl", both, &columns("text", "", ""), &["1 x", "2 y"]);

    let row = |fields: &str| format!("{{\"label\": 0, {fields}}}\n");
    let cases = [
        ("\"input_ids\": []", "`input_ids` is empty"),
        ("\"input_ids\": \"5\"", "`input_ids` is a string, not an array"),
        ("\"input_ids\": [-1]", "`input_ids` holds -1, not a whole number from 0 to 4294967295"),
        ("\"input_ids\": [1.5]", "`input_ids` holds 1.5, not a whole number from 0 to 4294967295"),
        (
            "\"input_ids\": [4294967296]",
            "`input_ids` holds 4294967296, not a whole number from 0 to 4294967295",
        ),
        (
            "\"input_ids\": [1, 2], \"attention_mask\": [1]",
            "`attention_mask` has 1 values, `input_ids` has 2",
        ),
        (
            "\"input_ids\": [1], \"attention_mask\": [2]",
            "`attention_mask` holds 2, not a whole number from 0 to 1",
        ),
        (
            "\"input_ids\": [1], \"token_type_ids\": [0, 0]",
            "`token_type_ids` has 2 values, `input_ids` has 1",
        ),
    ];
    for (fields, expected) in cases {
        fails("a.jsonl", row(fields), &Columns::default(), &format!("line 1: {expected}"));
    }
}

#[test]
fn json_that_does_not_fit() {
    let none = Columns::default();
    let first = "{\"sentence1\": \"x\", \"sentence2\": \"y\", \"label\": 0}\n";
    let second = |row: &str| format!("{first}{row}\n");
    let cases = [
        ("{\"sentence1\": 3}", "`sentence1` is a number, not a string"),
        (
            "{\"sentence1\": \"x\", \"label\": 0}",
            "there is no field `sentence2`; the row has: `label`, `sentence1`",
        ),
        (
            "{\"sentence1\": \"x\", \"sentence2\": \"y\", \"label\": null}",
            "there is no field `label`; the row has: `sentence1`, `sentence2`",
        ),
    ];
    for (row, expected) in cases {
        fails("a.jsonl", second(row), &none, &format!("line 2: {expected}"));
    }
    for row in ["{\"sentence1\": \"x\"", "[1]", "{} {}"] {
        let error = shown("a.jsonl", second(row), &none, Labels::Needed).unwrap_err().to_string();
        assert!(error.contains("a.jsonl: line 2: column "), "{error}");
        assert!(error.ends_with("; give one JSON object on each line"), "{error}");
        assert_eq!(error.matches("line").count(), 2, "{error}");
    }
    let label = "line 1: no field is called like a label; give `--label` one of: `mood`, `text`";
    fails("a.jsonl", "{\"text\": \"x\", \"mood\": 1}", &none, label);
    let text = "line 1: no field is called like a text; give `--text` one of: `label`, `tweet`";
    fails("a.jsonl", "{\"tweet\": \"x\", \"label\": 1}", &none, text);
    let number = "the fields of JSONL have no numbers: give a name for 2";
    fails("a.jsonl", first, &columns("2", "", ""), number);
}

proptest::proptest! {
    /// Whatever a file holds, it is read or refused, and lines are those of the file.
    #[test]
    fn any_text_is_read_or_refused(text in "[a1\",\t\r\n{}:é]{0,40}", header: bool) {
        let path = Path::new("any");
        for columns in [columns("1", "2", "1"), with_header(header, columns("1", "", ""))] {
            for delimiter in [b',', b'\t'] {
                let read = delimited::read(path, &text, delimiter, &columns, Labels::IfThere);
                let lines = text.matches('\n').count() + 1;
                proptest::prop_assert!(read.unwrap_or_default().iter().all(|e| (1..=lines).contains(&e.line)));
            }
        }
        drop(jsonl::read(path, &text, &Columns::default(), Labels::IfThere));
    }
}

#[test]
fn real_tables() {
    let count =
        |name: &str, columns: &Columns| asset(name).map(|path| read(&path, columns, Labels::Needed).unwrap());
    if let Some(sst2) = count("data/sst2/train.tsv", &Columns::default()) {
        assert_eq!(sst2.len(), 6000);
        assert!(show(&sst2[0]).starts_with("2 a cautionary tale about the folly"));
        assert!(sst2.iter().all(|e| matches!(&e.label, Some(Label::Text(t)) if t == "0" || t == "1")));
    }
    if let Some(sst2) = count("data/sst2/validation.tsv", &columns("1", "", "2")) {
        assert_eq!((sst2.len(), sst2[871].line), (872, 873));
    }
    for (name, rows) in [("train", 8551), ("dev", 527), ("out_of_domain_dev", 516)] {
        if let Some(cola) = count(&format!("data/cola/{name}.tsv"), &columns("4", "", "2")) {
            assert_eq!((cola.len(), cola[rows - 1].line), (rows, rows));
        }
    }
    for (name, rows) in [("train", 5749), ("dev", 1500)] {
        if let Some(stsb) = count(&format!("data/stsb/{name}.csv"), &columns("1", "2", "3")) {
            assert_eq!((stsb.len(), stsb[rows - 1].line), (rows, rows));
            let score = |e: &Example| super::super::labels::number(Path::new(name), e).unwrap();
            assert!(stsb.iter().all(|e| (0.0..=5.0).contains(&score(e))));
        }
    }
}
