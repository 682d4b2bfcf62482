//! PEFT's `rank_pattern` and `alpha_pattern`: settings of single layers, by parts of their names.

/// Whether PEFT's pattern means a layer of this name, as Python's `re.match(r"(.*\.)?(pattern)$", name)` says;
/// None for an expression with more than names, dots, `\.` and a leading `^` in it.
pub(super) fn matches(pattern: &str, name: &str) -> Option<bool> {
    let (whole, pattern) = match pattern.strip_prefix('^') {
        Some(rest) => (true, rest),
        None => (false, pattern),
    };
    // A dot stands for any character.
    let mut wanted: Vec<Option<char>> = Vec::new();
    let mut characters = pattern.chars();
    while let Some(c) = characters.next() {
        wanted.push(match c {
            '.' => None,
            '\\' => Some(characters.next().filter(|c| c.is_ascii_punctuation())?),
            '^' | '$' | '*' | '+' | '?' | '{' | '}' | '[' | ']' | '(' | ')' | '|' => return None,
            c => Some(c),
        });
    }
    let name: Vec<char> = name.chars().collect();
    let Some(before) = name.len().checked_sub(wanted.len()) else { return Some(false) };
    let same = wanted.iter().zip(&name[before..]).all(|(wanted, c)| wanted.is_none_or(|wanted| wanted == *c));
    Some(same && (before == 0 || !whole && name[before - 1] == '.'))
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
        for pattern in [r"layer\.\d.*query", "(query|key)", "layer.[01].query", "que?ry", r"query\"] {
            assert_eq!(matches(pattern, "query"), None, "{pattern}");
        }
    }
}
