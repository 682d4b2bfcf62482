//! PEFT's `rank_pattern` and `alpha_pattern`: settings of single layers, by parts of their names.

use serde_json::Value;

use crate::error::Result;
use crate::io::json::Object;
use crate::io::peft::expression::matches;

/// The ranks and alphas of these layers, of which the patterns may say something else than `usual`; nothing
/// where there is no pattern.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) for an expression that is not read here, or that another contradicts.
pub(super) fn resolve(
    file: &Object,
    layers: &[String],
    usual: (usize, f64),
) -> Result<Vec<(String, (usize, f64))>> {
    let patterns = |name: &str| match file.get(name) {
        None => Ok(vec![]),
        Some(Value::Object(patterns)) => Ok(patterns.iter().collect()),
        Some(value) => Err(file.error(format!("`{name}` is {value}, not an object"))),
    };
    let (ranks, alphas) = (patterns("rank_pattern")?, patterns("alpha_pattern")?);
    if ranks.is_empty() && alphas.is_empty() {
        return Ok(vec![]);
    }
    let of = |layer: &String| {
        let rank = found(file, "rank_pattern", &ranks, layer)?.unwrap_or(usual.0 as f64);
        if !(rank >= 1.0 && rank.fract() == 0.0 && rank < u32::MAX as f64) {
            return Err(file.error(format!("`rank_pattern` gives `{layer}` the rank {rank}")));
        }
        let alpha = found(file, "alpha_pattern", &alphas, layer)?.unwrap_or(usual.1);
        Ok((layer.clone(), (rank as usize, alpha)))
    };
    layers.iter().map(of).collect()
}

/// What patterns say of a layer. In PEFT the first that matches counts, in the order of the file; another order of
/// keys that mean the same layer would be another adapter, so these must agree.
fn found(file: &Object, name: &str, patterns: &[(&String, &Value)], layer: &str) -> Result<Option<f64>> {
    let mut found: Option<f64> = None;
    for (pattern, value) in patterns {
        let fail = |message: &str| file.error(format!("`{name}`: `{pattern}` {message}"));
        let meant = matches(pattern, layer).ok_or_else(|| {
            fail("is an expression of a kind that is not read here: name the layers one by one")
        })?;
        let value = value.as_f64().ok_or_else(|| fail("has no number"))?;
        match found {
            Some(other) if meant && other != value => {
                return Err(fail(&format!("contradicts another pattern for `{layer}`")));
            }
            _ if meant => found = Some(value),
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_python_matches() {
        let name = "bert.encoder.layer.1.attention.self.query";
        for (pattern, want) in [
            ("query", true),
            ("self.query", true),
            ("uery", false),
            ("layer.1", false),
            ("layer.1.attention.self.query", true),
            ("layer.1.attention_self.query", false),
            (r"layer\.1\.attention.self.query", true),
            ("self_query", false),
            // A dot is any character.
            ("self.quer.", true),
            ("^query", false),
            ("^bert.encoder.layer.1.attention.self.query", true),
            ("bert.encoder.layer.1.attention.self.query", true),
            ("x.bert.encoder.layer.1.attention.self.query", false),
            ("^encoder.layer.1.attention.self.query", false),
        ] {
            assert_eq!(matches(pattern, name), Some(want), "{pattern}");
        }
    }

    #[test]
    fn expressions_are_not_guessed_at() {
        for pattern in [r"(a)\1", "(?i)query", "a++", r"query\"] {
            assert_eq!(matches(pattern, "query"), None, "{pattern}");
        }
    }
}
