"""Adapters of PEFT's other methods on one tiny BERT: their logits, and the gradients of what they train.

usage: peft_methods.py    (needs torch, transformers, peft, safetensors; writes beside itself, no network)

Reads peft_adapters/model and peft_adapters/inputs.safetensors. Writes peft_methods/<case>/: the two files of
the adapter as PEFT saves it, and expected.safetensors, all computed in f64 from the stored values by the model that
PEFT loads: `logits`, and for every trained tensor `grad.<its name in the file>` of the loss
sum(logits * cos(0, 1, 2, ...)). adalora-training has the adapter at its start, `losses` of a training with PEFT's
rank allocation and each lora_E at its end by its name in the file; adalora-pruned is what PEFT saves after such a
training. The three adapted layers are square, wide and tall; no rank divides a side. Cases that end in -f16 or -bf16
are saved in that type, which PEFT loads into f32 (and the gradients of these in f32). vera_draws.json has, for some keys and sizes, the first and last
numbers of the matrices that VeRA draws and a sum over the bits of all.
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
# * PiSSA subtracts its start from the model's weight, computed in f32 and refused for an f64 model, when an adapter
#   is made AND when one is loaded: the file has A and B alone, and init_lora_weights says "pissa". Its model is
#   loaded in f32 here and then widened, so that it is 1e-7 off. pissa_niter_N draws random numbers for that anew
#   whenever it is loaded. save_pretrained(path_initial_model_for_weight_conversion=...) writes plain LoRA of rank
#   2 r instead, init_lora_weights true, if the start was saved too, with init_lora_weights set to true.
# * VeRA with save_projection=false draws A and B from projection_prng_key with torch's CPU generator, in f32.
# * After an allocation AdaLoRA's rank_pattern has, under <layer>.lora_E, true for every triplet of init_r that
#   stays; the file holds those rows and columns alone. The scale stays that of init_r. use_rslora does nothing,
#   and a lora_alpha of 0 or less is replaced by the rank. Training on such a file fails in PEFT where no new
#   allocation comes first (mask_using_rank_pattern has init_r entries, the parameters fewer).
# * AdaLoRA's ranknum, the r of its scale, has requires_grad after loading, and would be trained.
# * rank_pattern and alpha_pattern are regular expressions for the ends of names.
import json
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

PATTERNS = {"rank_pattern": {"layer.1.output.dense": 3}, "alpha_pattern": {"query": 2}}
VERA = {"r": 7, "target_modules": TARGETS}
METHODS = {
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "pissa": lambda: LoraConfig(**LORA, init_lora_weights="pissa"),
    "vera": lambda: VeraConfig(**VERA),
    "adalora": lambda: AdaLoraConfig(**ADALORA),
}
CASES = {name: make() for name, make in METHODS.items()} | {
    f"{name}-{dtype}": make() for name, make in METHODS.items() for dtype in ["f16", "bf16"]
} | {
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "patterns": LoraConfig(**LORA, **PATTERNS),
    "dora-rslora": LoraConfig(**LORA, use_dora=True, use_rslora=True, bias="lora_only", task_type="SEQ_CLS"),
    "dora-patterns": LoraConfig(**LORA, **PATTERNS, use_dora=True),
    "pissa-rslora": LoraConfig(**LORA, init_lora_weights="pissa", use_rslora=True),
    "pissa-patterns": LoraConfig(**LORA, **PATTERNS, init_lora_weights="pissa", bias="all"),
    "vera-drawn": VeraConfig(**VERA, save_projection=False, projection_prng_key=13),
    "vera-bias": VeraConfig(**VERA, d_initial=0.3, bias="vera_only", task_type="SEQ_CLS"),
    "adalora-rslora": AdaLoraConfig(**ADALORA, use_rslora=True, task_type="SEQ_CLS"),
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
    name = name.replace(".modules_to_save.default", "").replace(".default.weight", ".weight").replace(".default", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def narrow(case):
    return {"f16": torch.float16, "bf16": torch.bfloat16}.get(case.rsplit("-", 1)[-1])


def write_expected(case):
    """Logits and gradients of the adapter in the folder, in f64."""
    start = json.loads(Path(case, "adapter_config.json").read_text()).get("init_lora_weights")
    dtype = torch.float32 if start == "pissa" else torch.float64
    wide = PeftModel.from_pretrained(base(dtype), case, is_trainable=True).double().eval()
    logits = wide(**inputs()).logits
    weights = torch.cos(torch.arange(logits.numel(), dtype=torch.float64)).reshape(logits.shape)
    (logits * weights).sum().backward()
    expected = {"logits": logits.detach()}
    held = load_file(f"{case}/adapter_model.safetensors")
    for name, parameter in wide.named_parameters():
        if parameter.grad is not None and "ranknum" not in name:
            name = stored_name(name)
            if name not in held:  # a bias of the model, with bias="all"
                assert name.endswith(".bias"), name
            else:
                assert torch.equal(parameter.detach(), held[name].double()), name
            expected[f"grad.{name}"] = parameter.grad.float() if narrow(case) else parameter.grad
    plain = base(torch.float64).eval()(**inputs()).logits
    print(f"{case}: {len(expected) - 1} gradients, logits change by {(logits - plain).abs().max():.2f}")
    save_file(expected, f"{case}/expected.safetensors")


def adapter(case, config):
    set_seed(1)
    model = get_peft_model(base(), config)
    randomise(model)
    save_adapter(model.to(narrow(case)) if narrow(case) else model, case)
    write_expected(case)


def pissa_converted():
    """PiSSA as PEFT converts it to plain LoRA, for which it needs the start."""
    set_seed(1)
    model = get_peft_model(base(), METHODS["pissa"]())
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained("pissa-start")
    model.peft_config["default"].init_lora_weights = "pissa"
    randomise(model)
    save_adapter(model, "pissa-converted", path_initial_model_for_weight_conversion="pissa-start")
    shutil.rmtree("pissa-start")
    write_expected("pissa-converted")


def allocated(model, optimizer):
    """A step of training by PEFT's rank allocation, for each step; yields its loss."""
    config = model.peft_config["default"]
    labels = torch.tensor([0, 2, 1, 1, 0])
    for step in range(config.total_step):
        loss = model.base_model(**inputs(), labels=labels).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        yield loss.item()


def optimizer_of(model):
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    return torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)


def adalora_pruned():
    set_seed(3)
    model = get_peft_model(base(), AdaLoraConfig(**ADALORA, tinit=2, tfinal=4, deltaT=2)).eval()
    for _ in allocated(model, optimizer_of(model)):
        pass
    save_adapter(model, "adalora-pruned")
    pattern = json.loads(Path("adalora-pruned/adapter_config.json").read_text())["rank_pattern"]
    print("adalora-pruned: ranks", {name: sum(kept) for name, kept in pattern.items()})
    write_expected("adalora-pruned")


def adalora_training():
    case = "adalora-training"
    set_seed(2)
    config = AdaLoraConfig(**ADALORA, tinit=2, tfinal=4, deltaT=2)
    save_adapter(get_peft_model(base(), config), case)
    model = PeftModel.from_pretrained(base(torch.float64), case, is_trainable=True).eval()
    losses = list(allocated(model, optimizer_of(model)))
    left = {stored_name(n): p.detach() for n, p in model.named_parameters() if "lora_E" in n}
    print(f"{case}: losses {losses[0]:.4f} to {losses[-1]:.4f}, ranks {[int((e != 0).sum()) for e in left.values()]}")
    save_file({"losses": torch.tensor(losses, dtype=torch.float64)} | left, f"{case}/expected.safetensors")


def vera_draws():
    """Some of what VeRA draws: as PEFT does, without a model."""
    from peft.tuners.vera.model import _kaiming_init

    cases = []
    for key, rank, inputs, outputs in [(0, 256, 384, 1536), (13, 7, 20, 20), (-1, 3, 5, 64), (2**40 + 7, 1, 1, 1)]:
        generator = torch.Generator(device="cpu").manual_seed(key)
        a = _kaiming_init((rank, inputs), generator=generator)
        b = _kaiming_init((outputs, rank), generator=generator)
        ends = [float(x) for m in (a, b) for x in (m.flatten()[0], m.flatten()[-1])]
        # Of all bits, each times its place, modulo 2^64.
        sums = [str((m.flatten().view(torch.int32).long() * torch.arange(1, m.numel() + 1)).sum().item()) for m in (a, b)]
        cases.append({"key": str(key), "rank": rank, "inputs": inputs, "outputs": outputs, "ends": ends, "sums": sums})
    Path("vera_draws.json").write_text(json.dumps(cases, indent=1) + "\n")


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    os.chdir(ORACLE / "peft_adapters")  # where `base` finds the model; the adapters go beside it
    for case, config in CASES.items():
        adapter(case, config)
    pissa_converted()
    adalora_pruned()
    adalora_training()
    vera_draws()
    for case in [*CASES, "pissa-converted", "adalora-pruned", "adalora-training", "vera_draws.json"]:
        shutil.move(case, HERE / case)


if __name__ == "__main__":
    main()
