"""Loads what `randlora merge` wrote with transformers and compares the logits with those of the adapter by PEFT.
Exit code 1 if they differ by more than the tolerance, or if a tensor of the model is missing or left over.

usage: check_merged.py MODEL_DIR ADAPTER_DIR MERGED_DIR ROWS.jsonl [--tolerance 1e-5]
(needs torch, transformers, peft, safetensors; no network)

The tolerance is in units of the largest logit, for a model merged in f32.
"""
import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from check_adapter import load, peft_logits, read_rows
from transformers import AutoModelForSequenceClassification, logging


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "adapter", "merged", "rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()
    args.dtype, args.text, args.pair, args.max_length = "float32", "text", "text_pair", 64
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    merged, report = AutoModelForSequenceClassification.from_pretrained(
        args.merged, output_loading_info=True, attn_implementation="eager")
    if any(report.values()):
        sys.exit(f"{args.merged}: {report}")
    rows = read_rows(args)
    want, got = peft_logits(load(args), rows), peft_logits(merged.float().eval(), rows)
    apart = ((got - want).abs().max() / want.abs().max()).item()
    print(f"{merged.dtype}, {len(rows)} rows: {apart:.1e} apart (tolerance {args.tolerance:g}); "
          f"labels {merged.config.id2label}")
    sys.exit(0 if apart <= args.tolerance else 1)


if __name__ == "__main__":
    main()
