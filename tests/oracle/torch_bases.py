"""RandLoRA's bases as PEFT draws them from a seed: what src/adapters/torch.rs has to repeat.

usage: torch_bases.py    (needs torch, transformers, peft; writes beside itself, no network)

Writes torch_bases.json: for each case its key, draw, rank and the sizes (largest output, largest input) of the
adapted layers; of A (r, 1, MIN) and of B (MAX, N, r), both widened to f32, the 64-bit FNV-1a hash over the
little-endian bytes and some samples (index, value). `draw` is bf16, f16, sparse or very_sparse; PEFT takes bf16
where accelerate's is_bf16_available() says so, which is replaced here to see both.
"""
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy
import torch
from peft import RandLoraConfig, get_peft_model
from peft.tuners.randlora import model as randlora

HERE = Path(__file__).resolve().parent
CASES = [
    # key, rank, (out, in) of the layers
    (0, 4, [(12, 12)]),
    (1, 5, [(20, 12), (12, 20)]),  # MIN is 20, larger than any layer's smaller side
    (11, 7, [(30, 11), (9, 11)]),
    (2**32 - 1, 16, [(384, 384)]),
    (2**40 + 3, 1, [(40, 64)]),
    (-5, 16, [(384, 384), (1536, 384), (384, 1536)]),
    (123456789, 33, [(100, 200)]),
    (7, 32, [(768, 768), (3072, 768)]),
    (2024, 64, [(48, 48)]),  # one basis, larger than needed
]


def fnv(values):
    """The 64-bit FNV-1a hash over the bytes."""
    state = 0xCBF29CE484222325
    for byte in values.astype("<f4").tobytes():
        state = ((state ^ byte) * 0x100000001B3) & (2**64 - 1)
    return f"{state:016x}"


def described(tensor):
    values = tensor.detach().float().numpy().ravel()
    places = numpy.linspace(0, values.size - 1, num=min(values.size, 6)).astype(int)
    return {
        "shape": list(tensor.shape),
        "hash": fnv(values),
        "samples": [[int(place), float(values[place])] for place in places],
    }


def bases(key, rank, layers, draw):
    randlora.is_bf16_available = lambda: draw == "bf16"
    model = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(n, m) for i, (m, n) in enumerate(layers)})
    config = RandLoraConfig(r=rank, target_modules=list(model), projection_prng_key=key,
                            sparse=draw == "sparse", very_sparse=draw == "very_sparse")
    # Before the model's type is taken over: the draw's own.
    seen = {}

    def keep(self, config, name):
        original(self, config, name)
        seen.update(a=self.randlora_A[name].clone(), b=self.randlora_B[name].clone())

    name = "_init_randlora_A_randlora_B"
    original = getattr(randlora.RandLoraModel, name)
    setattr(randlora.RandLoraModel, name, keep)
    try:
        peft = get_peft_model(model, config)
    finally:
        setattr(randlora.RandLoraModel, name, original)
    a, b = peft.base_model.randlora_A["default"], peft.base_model.randlora_B["default"]
    if seen:
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[draw]
        assert seen["a"].dtype == dtype and torch.equal(seen["a"].float(), a.float())
    return a, b


def main():
    torch.set_num_threads(1)
    cases = []
    for key, rank, layers in CASES:
        for draw in ("bf16", "f16", "sparse", "very_sparse"):
            a, b = bases(key, rank, layers, draw)
            sizes = [max(m for m, _ in layers), max(n for _, n in layers)]
            cases.append({"key": key, "rank": rank, "sizes": sizes, "draw": draw,
                          "a": described(a), "b": described(b)})
            print(key, rank, sizes, draw, list(b.shape))
    text = ",\n".join(json.dumps(case) for case in cases)
    Path(HERE, "torch_bases.json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
