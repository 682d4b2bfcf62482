"""Loads an adapter that `randlora finetune` wrote with PEFT and compares PEFT's logits with those of
`randlora eval --logits`. Exit code 1 if they differ by more than the tolerance.

usage: check_adapter.py MODEL_DIR ADAPTER_DIR ROWS.jsonl LOGITS.safetensors [--tolerance 1e-4]
                        [--text text] [--pair text_pair] [--max-length 64] [--dtype float64] [--write DIR]
(needs torch, transformers, peft, safetensors; no network)

Each row has input_ids (with attention_mask and token_type_ids, if any) or texts in the fields named
by --text and --pair, which the tokenizer in MODEL_DIR cuts off at --max-length. With --write DIR,
PEFT's logits become the fixture DIR/expected.safetensors.
"""
import argparse
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

BATCH = 32


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "adapter", "rows", "logits"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--text", default="text")
    parser.add_argument("--pair", default="text_pair")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--write", type=Path)
    return parser.parse_args()


def load(args):
    """The adapted model; fails where the adapter's tensors are not exactly those PEFT knows, except
    that PEFT's copies of RandLoRA's bases below every layer may be missing."""
    tensors = load_file(args.adapter / "adapter_model.safetensors")
    head = tensors.get("base_model.model.classifier.weight")
    size = {} if head is None else {"num_labels": head.shape[0], "ignore_mismatched_sizes": True}
    dtype = getattr(torch, args.dtype)
    # PEFT takes PiSSA's start out of the model's weights as it loads the adapter, in f32 and of no f64 model.
    start = json.loads((args.adapter / "adapter_config.json").read_text()).get("init_lora_weights")
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32 if start == "pissa" else dtype, attn_implementation="eager", **size)
    model = PeftModel.from_pretrained(model, args.adapter).to(dtype).eval()

    known = get_peft_model_state_dict(model)
    copies = {k for k in known if k.startswith("base_model.model.") and k.endswith((".randlora_A", ".randlora_B"))}
    wrong = sorted((set(known) ^ set(tensors)) - copies)
    if wrong:
        sys.exit(f"{args.adapter}: these tensors are only in the file or only in PEFT's model: {wrong}")
    return model


def read_rows(args):
    rows = [json.loads(line) for line in args.rows.read_text().splitlines() if line.strip()]
    if all("input_ids" in row for row in rows):
        return rows
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return [tokenizer(row[args.text], row.get(args.pair), truncation=True, max_length=args.max_length) for row in rows]


def collate(rows, padding):
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values, filler):
        return torch.tensor([list(v) + [filler] * (longest - len(v)) for v in values])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, padding),
        "attention_mask": pad([row.get("attention_mask") or [1] * len(i) for row, i in zip(rows, ids)], 0),
        "token_type_ids": pad([row.get("token_type_ids") or [0] * len(i) for row, i in zip(rows, ids)], 0),
    }


def peft_logits(model, rows):
    padding = model.config.pad_token_id or 0
    with torch.no_grad():
        parts = [model(**collate(rows[i:i + BATCH], padding)).logits for i in range(0, len(rows), BATCH)]
    return torch.cat(parts)


def main():
    args = arguments()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = peft_logits(load(args), read_rows(args))
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        save_file({"logits": theirs}, args.write / "expected.safetensors")
    ours = load_file(args.logits)["logits"]
    if ours.shape != theirs.shape:
        sys.exit(f"{args.logits}: the logits have shape {list(ours.shape)}, PEFT's have {list(theirs.shape)}")
    apart = (ours.double() - theirs.double()).abs().max().item()
    print(f"{len(theirs)} rows: PEFT's logits differ by at most {apart:.3e} (tolerance {args.tolerance:g})")
    sys.exit(0 if apart <= args.tolerance else 1)


if __name__ == "__main__":
    main()
