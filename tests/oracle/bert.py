"""Odd BERT configurations with random weights, saved by transformers itself, and what transformers
computes with them in f64: the fixtures behind the tests of the BERT models.

usage: bert.py         (needs torch, transformers, safetensors; writes beside itself, needs no network)

Writes bert/<case>/: config.json and model.safetensors (or shards with an index) by save_pretrained,
and expected.safetensors with

  input_ids, attention_mask, token_type_ids   i64, (batch, length), padded on the right
  labels                                      i64 (classes) or f64 (regression, several labels)
  logits, loss                                f64; the loss is the one transformers picks
  grad.<parameter>                            f64, of the loss, for every parameter

Everything is computed in f64 from the stored (possibly f16 or bf16) weights, with dropout off and
eager attention. Parameters carry the names of the wrapped class, with `bert.` also where the file
lacks it. The case `plain_f16` is a BertModel without a head: instead of logits and labels it has
last_hidden_state and pooler_output with their weights w.last_hidden_state (0 where the mask is 0)
and w.pooler_output; the loss is the sum of the two weighted sums.

Padding rows: torch gives row `pad_token_id` of the word embeddings no gradient, whatever it should
have. No unmasked token here is that id, and no loss depends on a masked position, so the right
gradient of that row is zero as well. The gradient of attention.self.key.bias is zero by softmax's
invariance and about 1e-17 here: compare with a tolerance relative to the model's largest gradients.
"""
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, set_seed

HERE = Path(__file__).resolve().parent

# case: (configuration, stored type, largest shard)
CASES = {
    "single_label": (dict(
        hidden_size=36, num_attention_heads=3, num_hidden_layers=2, intermediate_size=50, vocab_size=31,
        max_position_embeddings=17, hidden_act="gelu", num_labels=3), torch.float32, None),
    "regression": (dict(
        hidden_size=16, num_attention_heads=1, num_hidden_layers=1, intermediate_size=23, vocab_size=19,
        max_position_embeddings=11, type_vocab_size=1, hidden_act="gelu_new", layer_norm_eps=1e-5,
        num_labels=1), torch.float32, None),
    "multi_label_sharded": (dict(
        hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=33, vocab_size=27,
        max_position_embeddings=12, type_vocab_size=3, hidden_act="relu", pad_token_id=2,
        problem_type="multi_label_classification", num_labels=4), torch.float32, "12KB"),
    "bf16": (dict(
        hidden_size=20, num_attention_heads=5, num_hidden_layers=2, intermediate_size=37, vocab_size=29,
        max_position_embeddings=13, hidden_act="gelu", num_labels=2), torch.bfloat16, None),
    "plain_f16": (dict(
        hidden_size=18, num_attention_heads=2, num_hidden_layers=1, intermediate_size=12, vocab_size=21,
        max_position_embeddings=10, hidden_act="gelu"), torch.float16, None),
}


def randomise(model, scale=0.3):
    """Gives every parameter noise of its own; LayerNorm weights stay around one."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = noise + 1 if name.endswith("LayerNorm.weight") else noise


def batch(config, lengths, generator):
    """Token ids, mask and token types of pairs with these lengths; never the padding id unmasked."""
    shape = (len(lengths), max(lengths))
    ids = torch.randint(0, config.vocab_size - 1, shape, generator=generator)
    ids += ids >= config.pad_token_id
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids[mask == 0] = config.pad_token_id
    # The last type takes the second part of each row: pairs, where there are types to tell them apart.
    second = torch.arange(shape[1]) >= torch.tensor(lengths)[:, None] // 2
    types = second.long() * mask * (config.type_vocab_size - 1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def random_labels(config, rows, generator):
    if config.problem_type == "multi_label_classification":
        return torch.randint(0, 2, (rows, config.num_labels), generator=generator).double()
    if config.num_labels == 1:
        return torch.randn(rows, generator=generator, dtype=torch.float64)
    return torch.randint(0, config.num_labels, (rows,), generator=generator)


def classify(model, inputs, generator):
    labels = random_labels(model.config, len(inputs["input_ids"]), generator)
    result = model(**inputs, labels=labels)
    return result.loss, {"labels": labels, "logits": result.logits}


def encode(model, inputs, generator):
    result, loss, tensors = model(**inputs), 0.0, {}
    for name in ("last_hidden_state", "pooler_output"):
        value = result[name]
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name == "last_hidden_state":
            weights *= inputs["attention_mask"][..., None]
        loss = loss + (value * weights).sum()
        tensors |= {name: value, f"w.{name}": weights}
    return loss, tensors


def write(case, folder):
    settings, dtype, shard = CASES[case]
    plain = "num_labels" not in settings
    family = BertModel if plain else BertForSequenceClassification
    model = family(BertConfig(**settings))
    randomise(model)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))

    model = family.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(11)
    inputs = batch(model.config, [9, 4, 7, 2], generator)
    loss, tensors = (encode if plain else classify)(model, inputs, generator)
    assert loss.dtype == torch.float64
    loss.backward()
    prefix = "grad.bert." if plain else "grad."
    tensors |= {prefix + name: p.grad for name, p in model.named_parameters()}
    tensors |= inputs | {"loss": loss}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    shown = tensors["pooler_output" if plain else "logits"].detach()
    smallest = min((v.abs().max().item(), k) for k, v in tensors.items() if k.startswith("grad."))
    print(f"{case}: loss {loss.item():.6f}, outputs' std {shown.std():.3f}, smallest largest gradient {smallest}")


def main():
    torch.set_num_threads(1)
    set_seed(0)
    for case in CASES:
        write(case, HERE / "bert" / case)


if __name__ == "__main__":
    main()
