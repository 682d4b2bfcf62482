//! What labels stand for: the classes of a task, or numbers.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use randlora::{Error, Result};

use super::table::{Example, Label, short, wrong, wrong_at};

/// The classes of a task, in the order of a model's outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LabelSet {
    names: Vec<String>,
    places: HashMap<String, usize>,
}

impl LabelSet {
    /// The different labels of these examples: in numeric order if all are whole numbers, else in
    /// that of their characters. With a separator a text is several labels (see [`LabelSet::decisions`]).
    ///
    /// # Errors
    /// [`Error::Data`] with file and line for an example without a label, or with several and no
    /// separator; with the file where fewer than two classes are found.
    pub(crate) fn from_examples(
        path: &Path,
        examples: &[Example],
        separator: Option<&str>,
    ) -> Result<LabelSet> {
        let mut found = BTreeSet::new();
        for example in examples {
            match separator {
                Some(separator) => found.extend(several(path, example, separator)?),
                None => drop(found.insert(one(path, example)?)),
            }
        }
        if found.len() < 2 {
            let found =
                found.first().map_or("no label".into(), |only| format!("only the label `{}`", short(only)));
            return Err(wrong(path, format!("there is {found}: classes take at least two")));
        }
        let mut names: Vec<String> = found.into_iter().collect();
        let number = |name: &String| name.parse::<i64>().ok();
        if names.iter().all(|name| number(name).is_some()) {
            names.sort_by_key(number);
        }
        LabelSet::from_names(names)
    }

    /// The classes that a checkpoint or an adapter names.
    ///
    /// # Errors
    /// [`Error::Config`] where there are none or two have one name.
    pub(crate) fn from_names(names: Vec<String>) -> Result<LabelSet> {
        let wrong = |message| Err(Error::Config { what: "labels", message });
        let places: HashMap<String, usize> = names.iter().cloned().zip(0..).collect();
        if names.is_empty() {
            return wrong("the list is empty: name the classes".into());
        }
        match names.iter().enumerate().find(|(at, name)| places[*name] != *at) {
            Some((_, name)) => wrong(format!("two classes are called `{name}`: give each its own name")),
            None => Ok(LabelSet { names, places }),
        }
    }

    /// The classes' names.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether these are the same classes, in any order.
    pub(crate) fn same_names(&self, names: &[String]) -> bool {
        names.len() == self.names.len() && names.iter().all(|name| self.places.contains_key(name))
    }

    /// The class of an example. A number k is also class k where no class is called by a number: data
    /// sets often have numbers where checkpoints have names (`LABEL_1`, `POSITIVE`).
    ///
    /// # Errors
    /// [`Error::Data`] with file and line where there is not one label, or one of another set.
    pub(crate) fn index(&self, path: &Path, example: &Example) -> Result<usize> {
        self.place(path, example, &one(path, example)?)
    }

    /// For each class whether it is among the labels of an example: those of an array, or of a text
    /// the parts between separators, without the white space around them.
    ///
    /// # Errors
    /// [`Error::Data`] with file and line where there is no label or one of another set.
    pub(crate) fn decisions(&self, path: &Path, example: &Example, separator: &str) -> Result<Vec<bool>> {
        let mut decisions = vec![false; self.names.len()];
        for name in several(path, example, separator)? {
            decisions[self.place(path, example, &name)?] = true;
        }
        Ok(decisions)
    }

    fn place(&self, path: &Path, example: &Example, name: &str) -> Result<usize> {
        let by_number = || {
            let numbered = self.names.iter().any(|name| name.parse::<i64>().is_ok());
            name.parse().ok().filter(|&place: &usize| !numbered && place < self.names.len())
        };
        self.places.get(name).copied().or_else(by_number).ok_or_else(|| {
            let names: Vec<String> = self.names.iter().take(20).map(|name| short(name)).collect();
            let more = if self.names.len() > 20 { ", …" } else { "" };
            let message = format!("label `{}` is not among: {}{more}", short(name), names.join(", "));
            wrong_at(path, example.line, message)
        })
    }
}

/// The label of an example as a number, for regression.
///
/// # Errors
/// [`Error::Data`] with file and line where there is not one label, or it is no finite number.
pub(crate) fn number(path: &Path, example: &Example) -> Result<f64> {
    let text = match &example.label {
        Some(Label::Number(number)) => return Ok(*number),
        _ => one(path, example)?,
    };
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| {
        wrong_at(path, example.line, format!("label `{}` is not a finite number", short(&text)))
    })
}

fn one(path: &Path, example: &Example) -> Result<String> {
    match &example.label {
        Some(Label::Text(text)) => Ok(text.clone()),
        Some(Label::Number(number)) => Ok(number.to_string()),
        Some(Label::Many(labels)) => Err(wrong_at(
            path,
            example.line,
            format!("{} labels in an array where the task has one for each example", labels.len()),
        )),
        None => Err(wrong_at(path, example.line, "there is no label")),
    }
}

fn several(path: &Path, example: &Example, separator: &str) -> Result<Vec<String>> {
    match &example.label {
        Some(Label::Many(labels)) => Ok(labels.clone()),
        Some(Label::Text(text)) if !separator.is_empty() => {
            let parts = text.split(separator).map(str::trim).filter(|part| !part.is_empty());
            Ok(parts.map(str::to_string).collect())
        }
        _ => Ok(vec![one(path, example)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::table::Input;

    fn example(line: usize, label: Option<Label>) -> Example {
        Example { line, input: Input::Text { first: "x".into(), second: None }, label }
    }

    fn text(label: &str) -> Example {
        example(7, Some(Label::Text(label.into())))
    }

    fn many(labels: &[&str]) -> Example {
        example(7, Some(Label::Many(labels.iter().map(|l| l.to_string()).collect())))
    }

    fn path() -> &'static Path {
        Path::new("train.tsv")
    }

    fn set(labels: &[&str]) -> LabelSet {
        let examples: Vec<Example> = labels.iter().map(|label| text(label)).collect();
        LabelSet::from_examples(path(), &examples, None).unwrap()
    }

    fn named(names: &[&str]) -> Result<LabelSet> {
        LabelSet::from_names(names.iter().map(|name| name.to_string()).collect())
    }

    #[test]
    fn classes_are_in_numeric_or_text_order() {
        assert_eq!(set(&["10", "9", "-1", "9"]).names(), ["-1", "9", "10"]);
        assert_eq!(set(&["b", "10", "9", "b"]).names(), ["10", "9", "b"]);
        let numbers = [2.0, 0.0, 10.0].map(|n| example(1, Some(Label::Number(n))));
        let set = LabelSet::from_examples(path(), &numbers, None).unwrap();
        assert_eq!(set.names(), ["0", "2", "10"]);
        assert_eq!(set.index(path(), &text("10")).unwrap(), 2);
    }

    #[test]
    fn a_label_not_in_the_set() {
        let set = set(&["positive", "negative"]);
        assert_eq!(set.index(path(), &text("positive")).unwrap(), 1);
        let error = set.index(path(), &text("neutral")).unwrap_err().to_string();
        assert_eq!(error, "train.tsv: line 7: label `neutral` is not among: negative, positive");
        let error =
            set.index(path(), &text("a text\nof two lines, which is no label")).unwrap_err().to_string();
        let shown = "label `a text of two lines, which is …` is not among: negative, positive";
        assert_eq!(error, format!("train.tsv: line 7: {shown}"));
        // A number is a class's place only where no class is called by a number.
        assert_eq!(set.index(path(), &text("0")).unwrap(), 0);
        assert!(set.index(path(), &text("2")).is_err());
        assert!(self::set(&["1", "2"]).index(path(), &text("0")).is_err());
        let unnamed = named(&["LABEL_0", "LABEL_1"]).unwrap();
        assert_eq!(unnamed.index(path(), &text("1")).unwrap(), 1);
        assert_eq!(unnamed.index(path(), &text("LABEL_1")).unwrap(), 1);
        assert!(unnamed.index(path(), &text("2")).is_err());
        let error = set.index(path(), &example(3, None)).unwrap_err().to_string();
        assert_eq!(error, "train.tsv: line 3: there is no label");
        let error = set.index(path(), &many(&["negative", "positive"])).unwrap_err().to_string();
        assert!(error.starts_with("train.tsv: line 7: 2 labels in an array"), "{error}");
    }

    #[test]
    fn sets_that_are_none() {
        let error = named(&[]).unwrap_err().to_string();
        assert_eq!(error, "labels: the list is empty: name the classes");
        let error = named(&["a", "b", "a"]).unwrap_err().to_string();
        assert_eq!(error, "labels: two classes are called `a`: give each its own name");
        let error = LabelSet::from_examples(path(), &[text("a"), text("a")], None).unwrap_err().to_string();
        assert_eq!(error, "train.tsv: there is only the label `a`: classes take at least two");
        assert!(LabelSet::from_examples(path(), &[], None).is_err());
        assert!(LabelSet::from_examples(path(), &[text("a"), example(2, None)], None).is_err());
        assert!(LabelSet::from_examples(path(), &[text("a"), many(&["b"])], None).is_err());
    }

    #[test]
    fn several_labels_become_decisions() {
        let examples = [text("joy, love"), many(&["anger"]), many(&[])];
        let set = LabelSet::from_examples(path(), &examples, Some(",")).unwrap();
        assert_eq!(set.names(), ["anger", "joy", "love"]);
        let found = examples.map(|e| set.decisions(path(), &e, ",").unwrap());
        assert_eq!(found, [[false, true, true], [true, false, false], [false; 3]]);
        assert_eq!(set.decisions(path(), &text("joy"), "").unwrap(), [false, true, false]);
        let error = set.decisions(path(), &text("joy,fear"), ",").unwrap_err().to_string();
        assert_eq!(error, "train.tsv: line 7: label `fear` is not among: anger, joy, love");
        assert!(set.decisions(path(), &example(1, None), ",").is_err());
        let numbers = example(1, Some(Label::Number(2.0)));
        assert_eq!(named(&["1", "2"]).unwrap().decisions(path(), &numbers, ",").unwrap(), [false, true]);
    }

    #[test]
    fn numbers_for_regression() {
        assert_eq!(number(path(), &text("4.75")).unwrap(), 4.75);
        assert_eq!(number(path(), &example(1, Some(Label::Number(-2.0)))).unwrap(), -2.0);
        for label in ["good", "nan", "inf", "4,75"] {
            let error = number(path(), &text(label)).unwrap_err().to_string();
            assert_eq!(error, format!("train.tsv: line 7: label `{label}` is not a finite number"));
        }
        assert!(number(path(), &many(&["1"])).is_err());
        assert!(number(path(), &example(1, None)).is_err());
    }
}
