//! The part of Python's regular expressions that patterns of layers are written in, matched as Python does.
//!
//! A whole match is a question about a language, not about a search: whether there is one does not depend on which
//! alternative is tried first or how much a repeat takes. So it is answered without backtracking, by the set of
//! places where each part of the expression can end. What is not of that kind, or where Python has corners of its
//! own, is not read: back references, looking around, flags, possessive repeats, repeats of what may be empty.
//!
//! | read | meaning |
//! |---|---|
//! | `a`, `\.` | the character; a backslash before punctuation takes its meaning |
//! | `.` | any character |
//! | `[a-z_]`, `[^.]` | one of these characters, or none of them |
//! | `\d` `\w` `\s` `\D` `\W` `\S` | digits, letters with digits and `_`, spaces, and all else: in ASCII names |
//! | `(…)`, `(?:…)`, `a\|b` | groups and alternatives |
//! | `*` `+` `?` `{m}` `{m,n}` `{m,}` `{,n}`, and these with a `?` | repeats |
//! | `^` `$` | the beginning and the end of the name |

use std::iter::Peekable;
use std::str::Chars;

/// An expression.
#[derive(Debug)]
enum Node {
    One(Set),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    Repeat { of: Box<Node>, least: usize, most: Option<usize> },
    Start,
    End,
}

/// The characters that may stand at a place.
#[derive(Debug)]
struct Set {
    ranges: Vec<(char, char)>,
    /// All others instead.
    negated: bool,
}

/// Work beyond which an expression is not read: that of some thousand usual ones.
const STEPS: usize = 20_000;
/// Groups within groups.
const DEPTH: usize = 20;

/// Whether Python's `re.match(r"(.*\.)?(pattern)$", name)` finds something; None for an expression that is not
/// read here.
pub(super) fn matches(pattern: &str, name: &str) -> Option<bool> {
    let mut parser = Parser { rest: pattern.chars().peekable(), ascii: false };
    let node = parser.alternatives(0)?;
    // Python's classes are Unicode's, and its `.` and `$` know line ends.
    if parser.rest.next().is_some() || parser.ascii && !name.is_ascii() || name.contains('\n') {
        return None;
    }
    let name: Vec<char> = name.chars().collect();
    let starts = (0..=name.len()).map(|i| i == 0 || name[i - 1] == '.').collect();
    let mut matcher = Matcher { name: &name, steps: STEPS };
    matcher.ends(&node, starts)?.last().copied()
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
    /// Whether it is right for ASCII alone.
    ascii: bool,
}

impl Parser<'_> {
    fn next_is(&mut self, c: char) -> bool {
        self.rest.next_if_eq(&c).is_some()
    }

    /// a|b|…, up to the end or a closing bracket.
    fn alternatives(&mut self, depth: usize) -> Option<Node> {
        let mut all = vec![self.sequence(depth)?];
        while self.next_is('|') {
            all.push(self.sequence(depth)?);
        }
        Some(Node::Either(all))
    }

    fn sequence(&mut self, depth: usize) -> Option<Node> {
        let mut parts = Vec::new();
        while let Some(c) = self.rest.next_if(|&c| c != '|' && c != ')') {
            let part = self.part(c, depth)?;
            parts.push(self.repeated(part)?);
        }
        Some(Node::Sequence(parts))
    }

    fn part(&mut self, first: char, depth: usize) -> Option<Node> {
        Some(match first {
            '^' => Node::Start,
            '$' => Node::End,
            '.' => Node::One(Set { ranges: vec![], negated: true }),
            '[' => Node::One(self.set()?),
            '\\' => {
                let (ranges, negated) = self.escaped()?;
                Node::One(Set { ranges, negated })
            }
            '(' if depth < DEPTH => {
                // `(?:`; all others that begin so are more than a group.
                if self.next_is('?') && !self.next_is(':') {
                    return None;
                }
                let inner = self.alternatives(depth + 1)?;
                self.next_is(')').then_some(inner)?
            }
            '(' | '*' | '+' | '?' | '{' | '}' | ']' => return None,
            c => Node::One(Set { ranges: vec![(c, c)], negated: false }),
        })
    }

    /// A part with the repeat that follows it, if one does.
    fn repeated(&mut self, part: Node) -> Option<Node> {
        let (least, most) = match self.rest.peek() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => {
                self.rest.next();
                return self.counted().and_then(|(least, most)| self.repeat(part, least, most));
            }
            _ => return Some(part),
        };
        self.rest.next();
        self.repeat(part, least, most)
    }

    fn repeat(&mut self, part: Node, least: usize, most: Option<usize>) -> Option<Node> {
        // How eager it is makes no difference to a whole match.
        self.next_is('?');
        let again = matches!(self.rest.peek(), Some('*' | '+' | '?' | '{'));
        let empty = may_be_empty(&part) || most.is_some_and(|most| most < least);
        (!again && !empty).then(|| Node::Repeat { of: Box::new(part), least, most })
    }

    /// The rest of {m}, {m,n}, {m,} or {,n}.
    fn counted(&mut self) -> Option<(usize, Option<usize>)> {
        let least = self.number()?;
        if self.next_is('}') {
            return least.map(|count| (count, Some(count)));
        }
        let most = if self.next_is(',') { self.number()? } else { return None };
        let one = least.is_some() || most.is_some();
        (one && self.next_is('}')).then_some((least.unwrap_or(0), most))
    }

    /// A number if one is there; none at all where it is too large.
    fn number(&mut self) -> Option<Option<usize>> {
        let mut digits = String::new();
        while let Some(digit) = self.rest.next_if(char::is_ascii_digit) {
            digits.push(digit);
        }
        if digits.is_empty() { Some(None) } else { digits.parse().ok().filter(|&n| n <= 1000).map(Some) }
    }

    /// What a backslash makes of the next character: ranges, or all but these.
    fn escaped(&mut self) -> Option<(Vec<(char, char)>, bool)> {
        let c = self.rest.next()?;
        if c.is_ascii_punctuation() {
            return Some((vec![(c, c)], false));
        }
        let ranges = match c.to_ascii_lowercase() {
            'd' => vec![('0', '9')],
            'w' => vec![('0', '9'), ('A', 'Z'), ('_', '_'), ('a', 'z')],
            's' => vec![('\t', '\r'), ('\u{1c}', ' ')],
            _ => return None,
        };
        self.ascii = true;
        Some((ranges, c.is_ascii_uppercase()))
    }

    /// The rest of a set, after its bracket.
    fn set(&mut self) -> Option<Set> {
        let negated = self.next_is('^');
        let mut ranges: Vec<(char, char)> = Vec::new();
        loop {
            let from = match self.rest.next()? {
                ']' if !ranges.is_empty() => return Some(Set { ranges, negated }),
                // Python takes these for themselves in some places, and warns of it in others.
                ']' | '[' | '&' | '~' | '|' | '-' => return None,
                '\\' => match self.escaped()? {
                    (one, false) if one.len() == 1 && one[0].0 == one[0].1 => one[0].0,
                    (class, false) => {
                        ranges.extend(class);
                        // `\d-` is an error in Python where a range would begin.
                        if self.rest.peek() == Some(&'-') {
                            return None;
                        }
                        continue;
                    }
                    (_, true) => return None,
                },
                c => c,
            };
            let to = match self.next_is('-') {
                false => from,
                true => match self.rest.next()? {
                    '\\' | '[' | ']' | '-' => return None,
                    to => to,
                },
            };
            if to < from {
                return None;
            }
            ranges.push((from, to));
        }
    }
}

/// Whether it matches nothing at all as well.
fn may_be_empty(node: &Node) -> bool {
    match node {
        Node::One(_) => false,
        Node::Sequence(parts) => parts.iter().all(may_be_empty),
        Node::Either(all) => all.iter().any(may_be_empty),
        Node::Repeat { least, .. } => *least == 0,
        Node::Start | Node::End => true,
    }
}

struct Matcher<'a> {
    name: &'a [char],
    steps: usize,
}

impl Matcher<'_> {
    /// The places where a part can end that begins at one of these; None where that takes too long to find out.
    fn ends(&mut self, node: &Node, starts: Vec<bool>) -> Option<Vec<bool>> {
        self.steps = self.steps.checked_sub(1)?;
        let last = self.name.len();
        Some(match node {
            Node::One(set) => {
                (0..=last).map(|i| i > 0 && starts[i - 1] && set.has(self.name[i - 1])).collect()
            }
            Node::Sequence(parts) => parts.iter().try_fold(starts, |places, part| self.ends(part, places))?,
            Node::Either(all) => {
                let mut ends = vec![false; last + 1];
                for one in all {
                    join(&mut ends, &self.ends(one, starts.clone())?);
                }
                ends
            }
            Node::Repeat { of, least, most } => {
                let mut places = starts;
                for _ in 0..*least {
                    places = self.ends(of, places)?;
                }
                let mut ends = places.clone();
                // Each takes a character at least, so that no more than these can follow.
                for _ in 0..most.map_or(last, |most| (most - least).min(last)) {
                    places = self.ends(of, places)?;
                    if !join(&mut ends, &places) {
                        break;
                    }
                }
                ends
            }
            Node::Start => starts.into_iter().enumerate().map(|(i, here)| here && i == 0).collect(),
            Node::End => starts.into_iter().enumerate().map(|(i, here)| here && i == last).collect(),
        })
    }
}

impl Set {
    fn has(&self, c: char) -> bool {
        self.ranges.iter().any(|&(from, to)| (from..=to).contains(&c)) != self.negated
    }
}

/// Adds places to others, and says whether any is new.
fn join(places: &mut [bool], more: &[bool]) -> bool {
    let mut new = false;
    for (place, &more) in places.iter_mut().zip(more) {
        new |= more && !*place;
        *place |= more;
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Of tests/oracle/patterns.py: patterns with what Python says of each name.
    fn cases() -> (Vec<String>, Value) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle/patterns.json");
        let cases: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let names = cases["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().into());
        (names.collect(), cases)
    }

    fn ours(pattern: &str, names: &[String]) -> Option<String> {
        let one = |name: &String| matches(pattern, name).map(|found| if found { '1' } else { '0' });
        names.iter().map(one).collect()
    }

    #[test]
    fn as_python_matches() {
        let (names, cases) = cases();
        for (pattern, found) in cases["read"].as_object().unwrap() {
            assert_eq!(ours(pattern, &names).as_deref(), found.as_str(), "{pattern}");
        }
        for pattern in cases["refused"].as_array().unwrap() {
            assert_eq!(ours(pattern.as_str().unwrap(), &names), None, "{pattern}");
        }
        let mut read = 0;
        for (pattern, found) in cases["random"].as_object().unwrap() {
            if let Some(ours) = ours(pattern, &names) {
                assert_eq!(Some(ours.as_str()), found.as_str(), "{pattern}");
                read += 1;
            }
        }
        assert!(read > 100, "{read}");
    }

    #[test]
    fn classes_are_those_of_ascii() {
        assert_eq!(matches(r"\w+", "größe"), None);
        assert_eq!(matches("gr.ße", "größe"), Some(true));
        assert_eq!(matches("[a-zß-ö]+", "größe"), Some(true));
        assert_eq!(matches("query", "query\n"), None);
    }

    #[test]
    fn no_expression_takes_long() {
        let name = "a".repeat(500);
        for pattern in [
            "(((((a{30}){30}){30}){30}){30})".to_string(),
            format!("{}a{}", "(".repeat(9999), ")".repeat(9999)),
        ] {
            assert_eq!(matches(&pattern, &name), None);
        }
        // Where backtracking tries 2^500 ways.
        assert_eq!(matches("((a|a)+)+b", &name), Some(false));
    }
}
