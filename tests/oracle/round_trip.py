"""From PEFT to here and back, and from here to PEFT and back: every tensor stays what it was, bit for bit.

usage: round_trip.py [RANDLORA]    (the command as built; default: ../../target/debug/randlora)
(needs torch, transformers, peft, safetensors; writes beside itself, no network)

Every adapter of peft_adapters/ and peft_methods/ is written anew by `randlora convert --to peft`, and PEFT loads both: fails unless all
tensors of the two models and the logits are the same. (Bases that one of them draws and the other reads among them.)
What PEFT then saves of some of ours becomes the fixture round_trip/<case>/, which tests/library/peft.rs reads back.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft_adapters import HERE as ADAPTERS
from peft_adapters import base, logits
from peft_training import save_adapter
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import logging

HERE = Path(__file__).resolve().parent
METHODS = ADAPTERS.parent / "peft_methods"
KEPT = ["randlora", "randlora-seed-sparse", "randlora-bias-only", "lora-patterns", "lora-bias-all", "lora-rslora",
        "dora", "dora-patterns", "pissa", "pissa-rslora", "vera", "vera-drawn", "vera-bias", "adalora", "adalora-pruned"]


def load(folder):
    model = PeftModel.from_pretrained(base(), folder).eval()
    # Bases that are not stored are no part of PEFT's state.
    bases = {name: buffer for name, buffer in model.named_buffers() if "randlora_" in name or "vera_" in name}
    return model, get_peft_model_state_dict(model) | bases


def main():
    command = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "../../target/debug/randlora").resolve()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(HERE / "round_trip", ignore_errors=True)
    inputs = load_file(ADAPTERS / "inputs.safetensors")
    expected = inputs.pop("logits")
    os.chdir(ADAPTERS)
    folders = [path.parent for root in (ADAPTERS, METHODS) for path in sorted(root.glob("*/expected.safetensors"))]
    for folder in folders:
        case = folder.name
        if case == "adalora-training":
            continue
        with tempfile.TemporaryDirectory() as scratch:
            ours = Path(scratch, "ours")
            run = [command, "convert", folder, "--to", "peft", "--out", ours, "--model", "model"]
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            (theirs, before), (back, after) = load(folder), load(ours)
            missing = sorted(set(before) - set(after))
            assert not missing, f"{case}: {missing}"
            changed = sorted(k for k in before if before[k].dtype != after[k].dtype or not torch.equal(before[k], after[k]))
            assert not changed, f"{case}: {changed}"
            assert torch.equal(logits(theirs, inputs), logits(back, inputs)), case
            assert not torch.equal(logits(back, inputs).double(), expected), case
            if case in KEPT:
                save_adapter(back, HERE / "round_trip" / case)
        print(f"{case}: {len(before)} tensors are the same")


if __name__ == "__main__":
    main()
