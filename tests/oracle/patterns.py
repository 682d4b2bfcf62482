"""What Python's re says of patterns as PEFT matches them: what src/io/peft/expression.rs has to repeat.

usage: patterns.py    (needs nothing beyond Python; writes patterns.json beside itself)

PEFT asks re.match(rf"(.*\\.)?({key})$", name) of every key of rank_pattern and alpha_pattern. patterns.json has
`names`, and in `read` patterns that have to be understood, in `random` some that may be: each with a digit for each
name, 1 where there is a match, or with null where Python finds the pattern malformed.
"""
import json
import random
import re
import warnings
from pathlib import Path

NAMES = [
    "query",
    "bert.encoder.layer.1.attention.self.query",
    "bert.encoder.layer.11.attention.self.key",
    "bert.encoder.layer.0.output.dense",
    "encoder.layers.12.mlp.up_proj",
    "model.layers.3.q_proj",
    "model.layers.30.v_proj",
    "a",
    "aab.abba",
    "x-1.y 2",
    "",
]
READ = [
    "query", "self.query", r"self\.query", "uery", ".uery", "^query", "^bert.*query", "que?ry", "quer[xyz]", "(query|key)",
    "query|key", r"layer\.1\..*", r"layer\.\d\..*query", r"layer\.\d+\..*(query|key)", r"layer\.[01]\.output\.dense",
    r"layers\.([0-9]|1[0-5])\..*proj", r".*\.(q|v)_proj", r"[qv]_proj", r"[^.]+_proj", r"layers\.3\d?\.[qv]_proj",
    r"layers.\d{2}.\w+", r"layers\.\d{1,2}\.mlp\.up_proj", r"layer\.\d{3,}.*", r"layer\.\d{,2}\.output.*", r"(a|b)+\.(ab){1,2}a",
    "a*b.*", "a+b?", "a{2}b.abba", "a{3}b.abba", "aab.ab*a", r"x\-1\.y\s2", r"\w-\d\.\w\s\d", r"\D+\.\S+", r"\W?query", "query$",
    "(?:que)ry", "(que)(ry)", "((q)(u(e)))ry", "q.*?y", "qu+?ery", "", "|query", "query|", "[a-z]+", "[a-z_.]+", "^[a-z]+$",
    "^.*$", ".", "..", "bert.encoder.layer.1.attention.self.query", "^encoder.*", r"self[\.]query", r"[\d.]+\.mlp\.up_proj",
]
REFUSED = [
    r"(a)\1", "(?=query)query", "(?i)QUERY", "(?P<x>query)", "query(?#c)", "a**", "a++b", "(a*)*", "(|a)+", "^*a", "(query", "query)",
    "[query", "query\\", "*query", "a{2,1}", r"[\d-z]", r"\bquery", "?:query", r"\1",
]


def found(pattern):
    try:
        return "".join("1" if re.match(rf"(.*\.)?({pattern})$", name) else "0" for name in NAMES)
    except re.error:
        return None


def main():
    warnings.simplefilter("ignore")
    draw = random.Random(1)
    pieces = list("aabbq.|()*+?[]^$-xy12") + [r"\d", r"\w", r"\.", "{2}", "{1,2}", "[ab]", "[^b]", "(a|b)", ".*", "proj", "layer"]
    made = {"".join(draw.choice(pieces) for _ in range(draw.randint(1, 7))) for _ in range(350)}
    cases = {
        "names": NAMES,
        "read": {pattern: found(pattern) for pattern in READ},
        "refused": REFUSED,
        "random": {pattern: found(pattern) for pattern in sorted(made)},
    }
    text = json.dumps(cases, indent=0, ensure_ascii=True).replace('": "', '":"')
    (Path(__file__).parent / "patterns.json").write_text(text + "\n")


main()
