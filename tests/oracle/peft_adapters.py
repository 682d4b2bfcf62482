"""Adapters of many kinds, saved by PEFT for one tiny BERT, and the logits that PEFT gets with them.

usage: peft_adapters.py    (needs torch, transformers, peft, safetensors; writes beside itself, no network)

Writes peft_adapters/: model/, inputs.safetensors (input_ids, attention_mask, token_type_ids, and the
plain model's `logits`), <case>/ with the two files of an adapter and expected.safetensors (`logits`,
in f64 from the stored values), and refused/<case>/: a configuration alone, or an adapter whose
tensors contradict each other, which this crate does not accept.
"""
# What PEFT 0.21.2 does, found by running it and reading tuners/randlora and utils/save_and_load.py:
# * RandLoRA's bases are written at the model, base_model.randlora_A (r, 1, MIN) and base_model.randlora_B
#   (MAX, ceil(MIN/r), r), AND once more below every layer, base_model.model.<layer>.randlora_A and _B.
#   (MAX, MIN) are the larger and the smaller of (largest `out` of the adapted layers, largest `in`).
#   Loading needs these very sizes. It takes the model's pair where there is one, else the layers'; with
#   the model's pair alone it warns of missing keys and loads the right values all the same.
# * A layer has randlora_lambda (r, n), zeros at first, and randlora_gamma (n, min(in, out)), at first
#   1/max(n, min); n = ceil(min(in, out)/r). Every tensor is F32 for an f32 model; the bases, drawn in
#   bf16, hold bf16 values. The file's metadata is {"format": "pt"}; loading does not look at it.
# * save_projection=false: no bases in the file; any that are there are ignored and drawn from
#   projection_prng_key again. With save_projection=true and none in the file: drawn too, with a warning.
# * task_type SEQ_CLS adds "classifier" and "score" to modules_to_save. Their tensors are
#   base_model.model.classifier.weight and .bias; loading fails with a KeyError if one is not there,
#   while a missing lambda or gamma is only a warning, and unknown tensors are passed over in silence.
# * "output.dense" in a list of targets also takes attention.output.dense: whole dotted parts at the end
#   count. A string is a regular expression that has to match the whole name. "all-linear" is saved as
#   the list of full names (with the pooler, without the classifier); lists are saved in any order.
# * Loading needs of adapter_config.json only peft_type and what differs from the defaults (RandLoRA:
#   r 32, randlora_alpha 640); base_model_name_or_path may be null; unknown keys are a warning.
import os
import re
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from bert import batch, randomise
from peft import IA3Config, LoraConfig, PeftModel, RandLoraConfig, get_peft_model
from peft_training import save_adapter
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification,
                          logging, set_seed)

HERE = Path(__file__).resolve().parent / "peft_adapters"
WEIGHTS = "adapter_model.safetensors"
EVERYWHERE = ["query", "key", "value", "intermediate.dense", "output.dense", "pooler.dense"]


def randlora(targets, **settings):
    settings = {"r": 5, "randlora_alpha": 100, "task_type": "SEQ_CLS"} | settings
    return RandLoraConfig(target_modules=targets, **settings)


def lora(targets, **settings):
    return LoraConfig(target_modules=targets, **({"r": 3, "lora_alpha": 12, "task_type": "SEQ_CLS"} | settings))


ADAPTERS = {
    "randlora": randlora(EVERYWHERE),
    "randlora-attention": randlora(["query", "value"], r=4, randlora_alpha=80),  # r divides the width
    "randlora-wide": randlora(["layer.1.intermediate.dense"]),
    "randlora-regex": randlora(r".*layer\.[01]\.(attention\.self\.key|output\.dense)"),
    "randlora-all-linear": randlora("all-linear", r=7),
    "randlora-sparse": randlora(["query", "intermediate.dense"], sparse=True),
    "randlora-very-sparse": randlora(["query", "intermediate.dense"], very_sparse=True),
    "randlora-seed-only": randlora(["key", "output.dense"], save_projection=False, projection_prng_key=11),
    "randlora-seed-sparse": randlora(["query", "intermediate.dense"], sparse=True, save_projection=False),
    "randlora-bias-all": randlora(["query", "output.dense"], bias="all"),
    "randlora-bias-only": randlora(["query"], bias="randlora_only"),
    "randlora-layers": randlora(["query", "value"], layers_to_transform=[1], layers_pattern="layer"),
    "lora": lora(["query", "value"]),
    "lora-all-linear": lora("all-linear", r=2),
    "lora-no-task": lora(["key", "output.dense"], r=5, task_type=None, modules_to_save=["classifier"]),
    "lora-no-classifier": lora(["query"], task_type=None),
    "lora-pooler-saved": lora(["query"], modules_to_save=["pooler"]),
    "lora-rslora": lora(["query", "value"], use_rslora=True),
    "lora-patterns": lora(["query", "value", "output.dense"], rank_pattern={
        "layer.1.attention.self.query": 2, "^bert.encoder.layer.0.output.dense": 5, r"layer\.1\.output\.dense": 4,
    }, alpha_pattern={"value": 7, "layer.1.attention.self.query": 5}),
    "lora-patterns-rslora": lora(["query", "value"], use_rslora=True, rank_pattern={"value": 5}),
    "lora-bias-all": lora(["query"], bias="all"),
    "lora-bias-only": lora(["key", "output.dense"], bias="lora_only", task_type=None),
    "lora-excluded": lora("all-linear", exclude_modules=["pooler.dense", "key"]),
    "lora-f16": lora(["query", "output.dense"]),
    "lora-bf16": lora(["query", "output.dense"]),
    "randlora-bf16": randlora(["query", "output.dense"]),
}

REFUSED = {
    "ia3": IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS"),
    "rank-pattern": lora(["query"], rank_pattern={r"(?i)layer\.\d\.attention.self.query": 2}),
    "alpha-pattern": lora(["query"], alpha_pattern={r"(que)ry(?=$)": 2}),
}


def base(dtype=torch.float32):
    return AutoModelForSequenceClassification.from_pretrained("model", dtype=dtype, attn_implementation="eager")


def write_model():
    model = BertForSequenceClassification(BertConfig(
        hidden_size=12, num_attention_heads=3, num_hidden_layers=2, intermediate_size=20, vocab_size=20,
        max_position_embeddings=12, num_labels=3))
    randomise(model)
    model.save_pretrained("model")
    inputs = batch(model.config, [8, 3, 6, 2, 7], torch.Generator().manual_seed(17))
    save_file(inputs | {"logits": logits(base(torch.float64), inputs)}, "inputs.safetensors")
    return inputs


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def randomise_adapter(model):
    """Noise in everything that is trained, of a size that changes the weights by about a tenth."""
    scales = {"randlora_lambda": 0.05, "randlora_gamma": 0.03, "lora_A": 0.2, "lora_B": 0.1}
    generator = torch.Generator().manual_seed(23)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((s for part, s in scales.items() if part in name), 0.3)
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def write_expected(case, inputs):
    """PEFT's logits with the files in the folder, which it reads in f64."""
    model = PeftModel.from_pretrained(base(torch.float64), case)
    assert all(t.dtype == torch.float64 for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())
    result = logits(model, inputs)
    save_file({"logits": result}, Path(case, "expected.safetensors"))
    return result


def write_adapter(case, inputs):
    set_seed(1)
    model = get_peft_model(base(), ADAPTERS[case])
    randomise_adapter(model)
    narrow = {"f16": torch.float16, "bf16": torch.bfloat16}.get(case.rsplit("-", 1)[1] if "-" in case else "")
    save_adapter(model.to(narrow) if narrow else model, case)
    change = write_expected(case, inputs) - load_file("inputs.safetensors")["logits"]
    print(f"{case}: logits change by up to {change.abs().max():.3f}")


def rewrite(source, case, change):
    """A copy of an adapter whose tensors are changed."""
    Path(case).mkdir(parents=True)
    shutil.copy(Path(source, "adapter_config.json"), case)
    save_file(change(load_file(Path(source, WEIGHTS))), Path(case, WEIGHTS), metadata={"format": "pt"})


def of_a_layer(name):
    return re.fullmatch(r"base_model\.model\..*\.randlora_[AB]", name)


def of_the_model(name):
    return name.startswith("base_model.randlora_")


def write_layouts(inputs):
    """The bases only below the layers, as PEFT once wrote them, and only at the model, as we do."""
    rewrite("randlora", "randlora-per-layer", lambda t: {k: v for k, v in t.items() if not of_the_model(k)})
    rewrite("randlora", "randlora-shared", lambda t: {k: v for k, v in t.items() if not of_a_layer(k)})
    expected = load_file("randlora/expected.safetensors")["logits"]
    for case in ("randlora-per-layer", "randlora-shared"):
        assert torch.equal(write_expected(case, inputs), expected)


def write_refused():
    for case, config in REFUSED.items():
        config.save_pretrained(f"refused/{case}")
    last = "base_model.model.bert.encoder.layer.1.attention.self.value.randlora_"
    rewrite("randlora", "refused/bases-differ", lambda t: t | {last + "A": t[last + "A"] + 1})
    rewrite("randlora", "refused/no-lambda", lambda t: {k: v for k, v in t.items() if k != last + "lambda"})
    rewrite("randlora", "refused/no-classifier-bias",
            lambda t: {k: v for k, v in t.items() if not k.endswith("classifier.bias")})
    rewrite("randlora", "refused/small-bases",
            lambda t: {k: v[:-1].clone() if k.endswith("randlora_B") else v for k, v in t.items()})


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    os.chdir(HERE)  # adapter_config.json keeps the model's path as it was given: relative
    inputs = write_model()
    for case in ADAPTERS:
        write_adapter(case, inputs)
    write_layouts(inputs)
    write_refused()


if __name__ == "__main__":
    main()
