//! PEFT's `rank_pattern` and `alpha_pattern`: settings of single layers, by parts of their names.

pub(super) use crate::io::peft::expression::matches;

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
