"""One hundred training steps by PEFT of a tiny BERT, with RandLoRA and with LoRA: the losses that
training here has to repeat from the same adapter and the same batches.

usage: peft_training.py    (needs torch, transformers, peft, safetensors; writes beside itself, no network)

Writes peft_training/:
  model/                   BERT for 3 classes with random weights and no dropout, by save_pretrained
  rows.safetensors         a pool of 32 rows: input_ids, attention_mask, token_type_ids (32, 12), labels (32);
                           batches (100, 8): the rows of each step; padding stays at length 12
  randlora/, lora/         the adapter before training, as PEFT saves it (f32)
  randlora-trained/, ...   the adapter after the 100 steps in f64, narrowed to f32
  <method>.safetensors     losses_f64 (100) F64, losses_f32 (20) F32: the loss of each step before its update;
                           norms_f64 (100) F64: the gradient norm before clipping;
                           logits_f64 (8, 3) F64: of the first batch after training, before narrowing
  settings.json            what both sides must set alike

The rules of the run, in f64 (all weights widened from the f32 files, PEFT's A and B too) and in f32:
AdamW (betas 0.9, 0.999, eps 1e-8, no weight decay) on the adapter's vectors and the classifier, mean
cross-entropy of the batch, eager attention. torch's clip_grad_norm_ multiplies by
min(1, max_norm / (norm + 1e-6)), with that 1e-6. The linear schedule gives step t (from 0) the rate
lr * t / 6 for t < 6 and lr * (100 - t) / 94 after: the first step changes nothing.
"""
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from bert import batch, randomise
from peft import LoraConfig, PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification,
                          get_linear_schedule_with_warmup, logging, set_seed)

HERE = Path(__file__).resolve().parent / "peft_training"
STEPS, STEPS_F32, BATCH, ROWS = 100, 20, 8, 32
SETTINGS = {"steps": STEPS, "warmup_steps": 6, "schedule": "linear", "clip_grad_norm": 1.0, "weight_decay": 0.0,
            "betas": [0.9, 0.999], "eps": 1e-8, "lr": {"randlora": 1e-3, "lora": 1e-2}}
TARGETS = ["query", "value", "intermediate.dense", "output.dense"]  # square, wide and tall
CONFIGS = {
    "randlora": RandLoraConfig(r=5, randlora_alpha=100, target_modules=TARGETS, task_type="SEQ_CLS"),
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="SEQ_CLS"),
}


def write_model():
    model = BertForSequenceClassification(BertConfig(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=40, vocab_size=50,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    randomise(model)
    model.save_pretrained("model")
    return model.config


def write_rows(config):
    generator = torch.Generator().manual_seed(5)
    lengths = [12] + torch.randint(3, 13, (ROWS - 1,), generator=generator).tolist()
    rows = batch(config, lengths, generator)
    rows["labels"] = torch.randint(0, config.num_labels, (ROWS,), generator=generator)
    order = torch.cat([torch.randperm(ROWS, generator=generator) for _ in range(STEPS * BATCH // ROWS)])
    save_file(rows | {"batches": order.reshape(STEPS, BATCH)}, "rows.safetensors")


def base(dtype=torch.float32):
    return AutoModelForSequenceClassification.from_pretrained("model", dtype=dtype, attn_implementation="eager")


def save_adapter(model, folder, **options):
    """PEFT's own files without its model card, and with the targets in an order that repeats."""
    model.save_pretrained(folder, **options)
    Path(folder, "README.md").unlink(missing_ok=True)
    path = Path(folder, "adapter_config.json")
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def write_initial(method):
    set_seed(3)
    save_adapter(get_peft_model(base(), CONFIGS[method]), method)


def train(method, steps, dtype):
    """The losses and gradient norms of `steps` steps of the run of STEPS steps, and the model after them."""
    model = PeftModel.from_pretrained(base(dtype), method, is_trainable=True).train()
    assert all(t.dtype == dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=SETTINGS["lr"][method], weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimiser, SETTINGS["warmup_steps"], STEPS)
    data, losses, norms = load_file("rows.safetensors"), [], []
    for rows in data.pop("batches")[:steps]:
        loss = model(**{k: v[rows] for k, v in data.items()}).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, SETTINGS["clip_grad_norm"]))
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    assert losses[0].dtype == dtype
    return torch.stack(losses), torch.stack(norms), model


def write_run(method):
    write_initial(method)
    losses_f32, _, _ = train(method, STEPS_F32, torch.float32)
    losses, norms, model = train(method, STEPS, torch.float64)
    data = load_file("rows.safetensors")
    first = data.pop("batches")[0]
    with torch.no_grad():
        logits = model.eval()(**{k: v[first] for k, v in data.items() if k != "labels"}).logits
    save_adapter(model.float(), f"{method}-trained")
    save_file({"losses_f64": losses, "losses_f32": losses_f32, "norms_f64": norms, "logits_f64": logits},
              f"{method}.safetensors")
    apart = ((losses_f32 - losses[:STEPS_F32]) / losses[:STEPS_F32]).abs().max()
    print(f"{method}: losses {[round(x, 4) for x in losses[::11].tolist()]}")
    print(f"{method}: norms {norms.min():.3f} to {norms.max():.3f}, f32 from f64 {apart:.1e}")


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    os.chdir(HERE)  # adapter_config.json keeps the model's path as it was given: relative
    write_rows(write_model())
    Path("settings.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    for method in CONFIGS:
        write_run(method)


if __name__ == "__main__":
    main()
