"""Python's side of the comparison: torch and PEFT on the CPU or a card (in f32 without TF32), in a process of its own, one JSON object in a
line of standard output. compare.py calls it; the same is measured as by `randlora bench` and `finetune`.

usage: peft_side.py --threads N [--bf16] [--device cuda] layers    (for each line `TOKENS IN OUT RANK` of standard input)
                                         step MODEL METHOD RANK TARGETS BATCH LENGTH STEPS
                                         sst2 MODEL DATA METHOD RANK RATE EPOCHS
                                         versions
"""
import argparse
import csv
import json
import os
import resource
import statistics
import sys
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
import peft
import torch
import transformers
from peft import LoraConfig, RandLoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# A short function is repeated for about so many seconds, and timed as a whole.
AT_LEAST, ROUNDS, WARM_UP = 0.01, 7, 2


def settle():
    """Waits for a card: a clock must not stop before the work does."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(repeats, run):
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    settle()
    return (time.perf_counter() - start) / repeats


def medians(runs):
    """The median time of each function in milliseconds, over rounds in which each has its turn."""
    for run in runs.values():
        run()
    repeats = {name: max(1, round(AT_LEAST / seconds(1, run))) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(seconds(repeats[name], run))
    return {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()}


class Layer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.linear(x)


def layers(args):
    """Importing takes longer than measuring: one process for all shapes, which waits in between."""
    for line in sys.stdin:
        print(json.dumps(layer(args, *map(int, line.split()))), flush=True)
    return {}


def layer(args, tokens, inputs, outputs, rank):
    x = torch.randn(tokens, inputs, device=args.device, requires_grad=True)
    dy = torch.randn(tokens, outputs, device=args.device)

    def new():
        torch.manual_seed(0)
        return Layer(inputs, outputs).to(args.device)

    def run(model):
        def both_ways():
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
                y = model(x)
            y.backward(dy.to(y.dtype))
            x.grad = None
            for parameter in model.parameters():
                parameter.grad = None
        return both_ways

    targets = ["linear"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    randlora = RandLoraConfig(r=rank, randlora_alpha=20 * rank, target_modules=targets)
    return medians({
        "frozen": run(new().requires_grad_(False)),
        "full": run(new()),
        "lora": run(get_peft_model(new(), lora).to(args.device)),
        "randlora": run(get_peft_model(new(), randlora).to(args.device)),
    })


def adapted(args):
    """The model with its adapter, and what is trained of it."""
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    about = {"r": args.rank, "target_modules": args.targets.split(","), "task_type": "SEQ_CLS"}
    if args.method == "randlora":
        model = get_peft_model(model, RandLoraConfig(randlora_alpha=20 * args.rank, **about))
    elif args.method == "lora":
        model = get_peft_model(model, LoraConfig(lora_alpha=2 * args.rank, **about))
    elif args.method == "head":
        model.bert.requires_grad_(False)
    model.to(args.device).train()
    return model, [p for p in model.parameters() if p.requires_grad]


def make_step(args, model, trained, optimizer, batch):
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step(args):
    torch.manual_seed(0)
    model, trained = adapted(args)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.length), device=args.device)
    labels = torch.arange(args.batch, device=args.device) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    times = [seconds(1, lambda: make_step(args, model, trained, optimizer, batch).item())
             for _ in range(WARM_UP + args.steps)]
    return {"step_ms": 1e3 * statistics.median(times[WARM_UP:]), "trained_parameters": sum(p.numel() for p in trained)}


def rows(path):
    with open(path, encoding="utf-8") as file:
        read = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"].strip(), int(row["label"])) for row in read]


def sst2(args):
    """What `randlora finetune` does with the settings that compare.py gives it."""
    torch.manual_seed(0)
    args.targets = "query,key,value"
    train, validation = rows(f"{args.data}/train.tsv"), rows(f"{args.data}/validation.tsv")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model, trained = adapted(args)
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
    steps = args.epochs * -(-len(train) // 32)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)

    def batch(examples):
        texts, labels = [text for text, _ in examples], torch.tensor([label for _, label in examples])
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {name: tensor.to(args.device) for name, tensor in [*tokens.items(), ("labels", labels)]}

    def accuracy():
        model.eval()
        right = 0
        with torch.no_grad():
            for i in range(0, len(validation), 64):
                examples = batch(validation[i:i + 64])
                right += (model(**examples).logits.argmax(-1) == examples["labels"]).sum().item()
        model.train()
        return right / len(validation)

    accuracies, tokens, start = [], 0, time.perf_counter()
    for _ in range(args.epochs):
        order = torch.randperm(len(train)).tolist()
        for i in range(0, len(order), 32):
            examples = batch([train[j] for j in order[i:i + 32]])
            make_step(args, model, trained, optimizer, examples)
            schedule.step()
            tokens += examples["input_ids"].numel()
        accuracies.append(accuracy())
    spent = time.perf_counter() - start
    return {"seconds": spent, "tokens_per_s": tokens / spent, "accuracy": accuracies[-1], "best_accuracy": max(accuracies)}


def versions(args):
    card = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {"card": card, "torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    commands = parser.add_subparsers(required=True)
    for function, arguments in [(layers, ""), (sst2, "model data method rank rate epochs"),
                                (step, "model method rank targets batch length steps"), (versions, "")]:
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        for argument in arguments.split():
            words = ("model", "method", "targets", "data")
            command.add_argument(argument, type=str if argument in words else float if argument == "rate" else int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result = args.function(args)
    if args.device == "cuda":
        result["card_peak_bytes"] = torch.cuda.max_memory_allocated()
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


main()
