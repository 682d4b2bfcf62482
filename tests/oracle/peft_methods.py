"""Adapters of PEFT's other methods on one tiny BERT: their logits, and the gradients of what they train.

usage: peft_methods.py    (needs torch, transformers, peft, safetensors; writes beside itself, no network)

Reads peft_adapters/model and peft_adapters/inputs.safetensors. Writes peft_methods/<case>/: the two files of
the adapter as PEFT saves it, and expected.safetensors, all in f64 from the stored values: `logits`, and for
every trained tensor `grad.<its name in the file>` of the loss sum(logits * cos(0, 1, 2, ...)). adalora-training
has the adapter at its start, `losses` of a training with PEFT's rank allocation and each lora_E at its end by its name in the file.
The three adapted layers are square, wide and tall; no rank divides a side.
"""
# What PEFT 0.21.2 does, found by running it and reading tuners/lora, tuners/vera and tuners/adalora:
# * DoRA is LORA with use_dora; base_model.model.<layer>.lora_magnitude_vector (out) beside lora_A and lora_B.
#   The lengths of the rows of W0 + s BA are detached.
# * VERA saves vera_lambda_b (out) and vera_lambda_d (r) of every layer, and base_model.vera_A (r, largest in)
#   and base_model.vera_B (largest out, r) once.
# * ADALORA saves lora_A (r, in), lora_B (out, r) and lora_E (r, 1), no `.weight` in their names. Its scale is
#   lora_alpha / (init_r + 1e-5); the loss of a forward with labels has the orthogonality in it, the mean of
#   the Frobenius norms (not squared) of A A' - I and B' B - I over all matrices, times orth_reg_weight.
#   (A PeftModel without task_type calls the inner model past it; `base_model` is what has it.)
#   update_and_allocate(step) comes after the optimiser's step and takes the new values with the old gradients.
# * PiSSA subtracts its start from the model's weight, computed in f32 and refused for an f64 model: its model
#   is made in f32 here and then widened, so that it is 1e-7 off.
# * AdaLoRA's ranknum, the r of its scale, has requires_grad after loading, and would be trained.
# * rank_pattern and alpha_pattern are regular expressions for the ends of names.
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft_adapters import base
from peft_training import save_adapter
from safetensors.torch import load_file, save_file
from transformers import logging, set_seed

ORACLE = Path(__file__).resolve().parent
HERE = ORACLE / "peft_methods"
TARGETS = ["layer.0.attention.self.query", "layer.1.intermediate.dense", "layer.1.output.dense"]
LORA = {"r": 5, "lora_alpha": 7, "target_modules": TARGETS}
ADALORA = {"target_modules": TARGETS, "lora_alpha": 3, "init_r": 5, "target_r": 2, "total_step": 14}

CASES = {
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "patterns": LoraConfig(**LORA, rank_pattern={"layer.1.output.dense": 3}, alpha_pattern={"query": 2}),
    "dora": LoraConfig(**LORA, use_dora=True),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "vera": VeraConfig(r=7, target_modules=TARGETS),
    "adalora": AdaLoraConfig(**ADALORA),
}


def inputs():
    tensors = load_file(ORACLE / "peft_adapters/inputs.safetensors")
    return {name: tensors[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def randomise(model):
    generator = torch.Generator().manual_seed(29)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data += noise


def stored_name(name):
    return name.replace(".default.weight", ".weight").replace(".default", "")


def adapter(case, config):
    set_seed(1)
    model = get_peft_model(base(), config)
    randomise(model)
    save_adapter(model, case)
    if case == "pissa":
        wide = model.double()
    else:
        wide = PeftModel.from_pretrained(base(torch.float64), case, is_trainable=True)
    wide.eval()
    logits = wide(**inputs()).logits
    weights = torch.cos(torch.arange(logits.numel(), dtype=torch.float64)).reshape(logits.shape)
    (logits * weights).sum().backward()
    expected = {"logits": logits.detach()}
    held = load_file(f"{case}/adapter_model.safetensors")
    for name, parameter in wide.named_parameters():
        if parameter.grad is not None and "ranknum" not in name:
            name = stored_name(name)
            if name.endswith("lora_magnitude_vector.weight"):
                name = name.removesuffix(".weight")
            assert name in held, name
            assert torch.equal(parameter.detach().float(), held[name]), name
            expected[f"grad.{name}"] = parameter.grad
    plain = base(torch.float64).eval()(**inputs()).logits
    print(f"{case}: {len(expected) - 1} gradients, logits change by {(logits - plain).abs().max():.2f}")
    save_file(expected, f"{case}/expected.safetensors")


def adalora_training():
    case = "adalora-training"
    set_seed(2)
    config = AdaLoraConfig(**ADALORA, tinit=2, tfinal=4, deltaT=2)
    save_adapter(get_peft_model(base(), config), case)
    model = PeftModel.from_pretrained(base(torch.float64), case, is_trainable=True).eval()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    labels, losses = torch.tensor([0, 2, 1, 1, 0]), []
    for step in range(config.total_step):
        loss = model.base_model(**inputs(), labels=labels).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    left = {stored_name(n): p.detach() for n, p in model.named_parameters() if "lora_E" in n}
    print(f"{case}: losses {losses[0]:.4f} to {losses[-1]:.4f}, ranks {[int((e != 0).sum()) for e in left.values()]}")
    save_file({"losses": torch.tensor(losses, dtype=torch.float64)} | left, f"{case}/expected.safetensors")


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    os.chdir(ORACLE / "peft_adapters")  # where `base` finds the model; the adapters go beside it
    for case, config in CASES.items():
        adapter(case, config)
    adalora_training()
    for case in [*CASES, "adalora-training"]:
        shutil.move(case, HERE / case)


if __name__ == "__main__":
    main()
