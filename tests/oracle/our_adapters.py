"""Adapters that the `randlora` command trains, and PEFT's logits with them: what evaluating them here
has to repeat.

usage: our_adapters.py [RANDLORA [NAME ...]]    (the command as built; default: ../../target/debug/randlora;
                                                the adapters to make; default: all)
(needs torch, transformers, peft, safetensors; writes beside itself, no network)

Writes our_adapters/:
  rows.jsonl               24 rows of 3 to 12 tokens: input_ids, some with attention_mask, some with
                           token_type_ids; the label says whether the token 9 occurs
  randlora/, block/, …     as `finetune` saves them, trained on these rows from the model of
                           peft_training.py, with a new classifier and dropout:
                           adapter_config.json, adapter_model.safetensors, randlora.json
    expected.safetensors   logits (24, 2) F64 by PEFT; written by check_adapter.py, which fails
                           unless those of `eval --logits` are within 1e-4
"""
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "our_adapters"
MODEL = "peft_training/model"
TARGETS = ["--targets", "query,value,intermediate.dense,output.dense"]
ADAPTERS = {
    "randlora": ["--method", "randlora", "--rank", "5", "--lr", "1e-2", *TARGETS],
    # What of its bases is zero in PEFT's file is not there in training.
    "block": ["--method", "randlora", "--bases", "block", "--rank", "5", "--lr", "1e-2", *TARGETS],
    "lora": ["--method", "lora", "--rank", "3", "--lr", "3e-2", "--targets", "all-linear"],
    "dora": ["--method", "dora", "--rank", "3", "--lr", "1e-2", *TARGETS],
    "pissa": ["--method", "pissa", "--rank", "3", "--scale", "0.7", "--lr", "1e-2", *TARGETS],
    "vera": ["--method", "vera", "--rank", "7", "--lr", "3e-2", *TARGETS],
    # A budget of 2 for each layer, of 3 to start with.
    "adalora": ["--method", "adalora", "--rank", "2", "--lr", "1e-2", *TARGETS],
}


def rows(count):
    numbers = random.Random(7)
    for i in range(count):
        ids = [2] + [numbers.randrange(10, 50) for _ in range(numbers.randrange(1, 11))] + [3]
        if i % 2:
            ids[numbers.randrange(1, len(ids) - 1)] = 9
        row = {"input_ids": ids, "label": "yes" if i % 2 else "no"}
        if i % 3 == 0:
            row["token_type_ids"] = [int(2 * place >= len(ids)) for place in range(len(ids))]
        if i % 4 == 0:
            row["attention_mask"] = [1] * (len(ids) - 1) + [0]
        yield row


def main():
    command = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "../../target/debug/randlora").resolve()

    def run(*args):
        # adapter_config.json keeps the model's path as it was given: relative.
        subprocess.run([str(arg) for arg in args], cwd=HERE, check=True)

    names = sys.argv[2:] or list(ADAPTERS)
    FOLDER.mkdir(exist_ok=True)
    data = FOLDER / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    for name in names:
        saved, options = FOLDER / name, ADAPTERS[name]
        shutil.rmtree(saved, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            out, logits = Path(scratch, "out"), Path(scratch, "logits.safetensors")
            run(command, "finetune", "--model", MODEL, "--train", data, "--out", out,
                "--dropout", "0.1", "--batch-size", "8", "--epochs", "8", "--max-length", "16", *options)
            shutil.copytree(out / "last", saved)
            run(command, "eval", "--model", MODEL, "--adapter", saved, "--data", data, "--logits", logits)
            run(sys.executable, "check_adapter.py", MODEL, saved, data, logits, "--dtype", "float64", "--write", saved)


if __name__ == "__main__":
    main()
