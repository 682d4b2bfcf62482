//! Which layers get an adapter, as it is written on the command line.

use randlora::adapters::Targets;
use randlora::{Error, Result};
use regex::Regex;

/// What is adapted where nothing else is asked for.
pub(crate) const DEFAULT: &str = "query,key,value";

/// What an option for targets says of itself.
pub(crate) const HELP: &str = "The layers that get an adapter: names or last parts of names with commas \
                               between, `all-linear`, or a regular expression for whole names";

/// The characters of which one makes a text a pattern, if it is no list of names.
const SPECIAL: &[char] = &['.', '*', '|', '(', ')', '[', ']', '^', '$', '\\', '+', '?'];

/// The targets that a text means among a model's linear layers: `all-linear`; names or last parts of
/// names with commas between; or else, where a character is special in it, a regular expression that
/// has to match a layer's whole name. The classifier is never one of them.
///
/// # Errors
/// [`Error::NoMatch`] where nothing has such a name or matches, [`Error::Config`] for an expression
/// that is none.
pub(crate) fn parse(text: &str, layers: &[String]) -> Result<Targets> {
    let text = text.trim();
    if text == "all-linear" {
        return Ok(Targets::AllLinear);
    }
    let layers: Vec<&String> = layers.iter().filter(|layer| *layer != "classifier").collect();
    let none = |wanted: String| {
        Err(Error::NoMatch { wanted, available: layers.iter().map(|layer| layer.to_string()).collect() })
    };
    let names: Vec<&str> = text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let found = |name: &&str| layers.iter().any(|layer| Targets::names(&[name]).matches(layer));
    let Some(unknown) = names.iter().find(|name| !found(name)) else {
        return if names.is_empty() {
            none("an empty list of targets".into())
        } else {
            Ok(Targets::names(&names))
        };
    };
    if !text.contains(SPECIAL) {
        return none(format!("`{unknown}`"));
    }
    let pattern = pattern(text)?;
    let matching = layers.iter().filter(|layer| pattern.is_match(layer)).map(|layer| layer.to_string());
    let matching: Vec<String> = matching.collect();
    match matching.is_empty() {
        false => Ok(Targets::Names(matching)),
        // With other names that are there, this one is a typing error rather than part of a pattern.
        true if names.iter().any(found) => none(format!("`{unknown}`")),
        true => none(format!("the pattern `{text}`")),
    }
}

/// An expression for whole names.
fn pattern(text: &str) -> Result<Regex> {
    // On its own first: a parenthesis too many must not close the group.
    Regex::new(text).and_then(|_| Regex::new(&format!(r"\A(?:{text})\z"))).map_err(|error| {
        let error = error.to_string();
        let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
        Error::Config { what: "targets", message: format!("`{text}` is no regular expression: {reason}") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Vec<String> {
        let names = ["attention.self.query", "attention.self.key", "output.dense"];
        let layers = (0..2).flat_map(|i| names.map(|name| format!("bert.encoder.layer.{i}.{name}")));
        layers.chain(["bert.pooler.dense".into(), "classifier".into()]).collect()
    }

    fn error(text: &str) -> String {
        parse(text, &layers()).unwrap_err().to_string()
    }

    #[test]
    fn names_come_before_patterns() -> Result<()> {
        assert_eq!(parse("all-linear", &layers())?, Targets::AllLinear);
        assert_eq!(parse("query, key,", &layers())?, Targets::names(&["query", "key"]));
        // The dots are special in a pattern, but this is a name.
        assert_eq!(parse("attention.self.query", &layers())?, Targets::names(&["attention.self.query"]));
        Ok(())
    }

    #[test]
    fn a_pattern_matches_whole_names() -> Result<()> {
        let names =
            |i: usize| ["query", "key"].map(|name| format!("bert.encoder.layer.{i}.attention.self.{name}"));
        let found = parse(r".*\.1\..*(query|key)", &layers())?;
        assert_eq!(found, Targets::Names(names(1).to_vec()));
        assert_eq!(parse("bert.*(query|key)", &layers())?, Targets::Names([names(0), names(1)].concat()));
        // All but the classifier.
        assert!(
            matches!(parse(".*", &layers())?, Targets::Names(found) if found.len() == layers().len() - 1)
        );
        // A comma may be part of a pattern.
        let digits = r"bert\.encoder\.layer\.\d{1,2}\.output\.dense";
        assert!(matches!(parse(digits, &layers())?, Targets::Names(found) if found.len() == 2));
        Ok(())
    }

    #[test]
    fn what_matches_nothing_lists_what_is_there() {
        assert!(error("quary").starts_with("`quary` matches no layer; there are: bert.encoder.layer.0."));
        assert!(error("query,attention.self.valeu").starts_with("`attention.self.valeu` matches no layer"));
        assert!(error("(query|key)").starts_with("the pattern `(query|key)` matches no layer; there are: "));
        assert!(error(" , ").starts_with("an empty list of targets matches no layer"));
        assert!(error("classifier").ends_with("bert.pooler.dense"));
    }

    #[test]
    fn an_invalid_pattern_says_so_in_one_line() {
        for text in ["(query", "query)|(key", "(?!query).*"] {
            let error = error(text);
            assert!(error.starts_with(&format!("targets: `{text}` is no regular expression: ")), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
