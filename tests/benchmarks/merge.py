"""Memory and time of a merge: a synthetic checkpoint in the shape of Llama-3-8B, random weights, rank-16 adapter.

python -m tests.benchmarks.merge FOLDER [name=value ...]

FOLDER is made, holds base, adapter and result (together 33 GB at full size), and is removed again at the end. A value
replaces one figure of the shape: num_hidden_layers=2 is a quick try. Linux only.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from safesteer_lite.export import drafts
from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.shards import DTYPE_NAMES, NewTensor
from tests.benchmarks.common import say

# Llama-3-8B's published config.json, as far as it tells sizes.
SHAPE = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
RANK = 16
# The hub's copy is divided into files of about 5 GB.
SHARD_BYTES = 5_000_000_000
# Run in a process of its own, so that the peak is the merge's alone; the first figure is that of the imports.
# (Linux: `ru_maxrss` would count what the parent held before the fork.)
CHILD = """
import sys
from pathlib import Path
from safesteer_lite.export.weights.merge import merge_adapter
def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
imported = peak()
merge_adapter(*map(Path, sys.argv[1:4]))
print(imported, peak())
"""


def matrices(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The linear layers of all blocks: key without `.weight`, and (outputs, inputs)."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    attention = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, width)}
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    for layer in range(shape["num_hidden_layers"]):
        for part, sizes in (("self_attn", attention), ("mlp", mlp)):
            yield from ((f"model.layers.{layer}.{part}.{name}", size) for name, size in sizes.items())


def random_tensor(name: str, size: tuple[int, ...], dtype: torch.dtype) -> NewTensor:
    """A tensor of random values, made when its turn comes."""

    def produce() -> Iterator[memoryview]:
        yield shards.tensor_bytes((torch.randn(size) * 0.02).to(dtype))

    return NewTensor(name, DTYPE_NAMES[dtype], size, dtype.itemsize * torch.Size(size).numel(), produce)


def write_base(folder: Path, shape: dict[str, int]) -> None:
    """The base, one tensor in memory at a time."""
    folder.mkdir(parents=True)
    width, bf16 = shape["hidden_size"], torch.bfloat16
    ends = (shape["vocab_size"], width)
    tensors = [random_tensor("model.embed_tokens.weight", ends, bf16)]
    tensors += [random_tensor(f"{name}.weight", size, bf16) for name, size in matrices(shape)]
    norms = [f"{part}_layernorm" for part in ("input", "post_attention")]
    names = [f"model.layers.{layer}.{norm}" for layer in range(shape["num_hidden_layers"]) for norm in norms]
    tensors += [random_tensor(f"{name}.weight", (width,), bf16) for name in [*names, "model.norm"]]
    tensors.append(random_tensor("lm_head.weight", ends, bf16))
    divided: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if sum(other.size for other in divided[-1]) + tensor.size > SHARD_BYTES:
            divided.append([])
        divided[-1].append(tensor)
    shards.write_shards(folder, divided, lambda size: None)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    drafts.write_text(folder / "config.json", json.dumps({**config, "dtype": "bfloat16", **shape}))


def write_adapter(folder: Path, shape: dict[str, int]) -> None:
    """An adapter on every linear layer, in float32 as peft saves it."""
    folder.mkdir(parents=True)
    tensors = []
    for name, (outputs, inputs) in matrices(shape):
        key = f"base_model.model.{name}.lora_"
        tensors.append(random_tensor(f"{key}A.weight", (RANK, inputs), torch.float32))
        tensors.append(random_tensor(f"{key}B.weight", (outputs, RANK), torch.float32))
    shards.write_shard(folder / "adapter_model.safetensors", tensors, lambda size: None)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    drafts.write_text(folder / "adapter_config.json", json.dumps(config))


def size_of(folder: Path) -> int:
    """Bytes of weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_some(base: Path, adapter: Path, out: Path, shape: dict[str, int]) -> float:
    """The largest difference of the last matrix to a sum done in float64; half a unit of bfloat16 is what rounding makes."""
    name = list(matrices(shape))[-1][0]
    factors = {tensor.name: tensor for tensor in shards.read_shard(adapter / "adapter_model.safetensors")}
    down, up = (factors[f"base_model.model.{name}.lora_{part}.weight"].load().double() for part in "AB")
    before, after = (shards.read_checkpoint(place).tensors[f"{name}.weight"] for place in (base, out))
    rows = slice(-64, None)
    exact = before.load()[rows].double() + 2 * up[rows] @ down
    return float(((after.load()[rows].double() - exact) / exact.abs().clamp_min(1e-6)).abs().max())


def main() -> None:
    """Write, merge in a process of its own, print, remove."""
    folder = Path(sys.argv[1])
    shape = {**SHAPE, **{name: int(value) for name, _, value in (text.partition("=") for text in sys.argv[2:])}}
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    torch.manual_seed(0)
    try:
        began = time.monotonic()
        write_base(base, shape)
        write_adapter(adapter, shape)
        size = size_of(base)
        say(
            f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, torch {torch.__version__}"
        )
        say(
            f"base {size / 1e9:.2f} GB, adapter {size_of(adapter) / 1e6:.0f} MB: written in {time.monotonic() - began:.0f} s"
        )
        began = time.monotonic()
        command = [sys.executable, "-c", CHILD, str(base), str(adapter), str(out)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.monotonic() - began
        imported, peak = (int(figure) for figure in done.stdout.split())
        largest = max(tensor.size for tensor in shards.read_checkpoint(base).tensors.values())
        say(f"merged in {seconds:.0f} s: {seconds / (size / 1e9):.1f} s a GB")
        more = f"{imported / 1e9:.2f} GB are the imports: {(peak - imported) / 1e6:.0f} MB more"
        say(f"peak RSS {peak / 1e9:.2f} GB, of which {more}")
        say(f"largest tensor {largest / 1e6:.0f} MB, so the bar is {(1.2 * largest + size_of(adapter)) / 1e6:.0f} MB")
        say(f"largest relative difference of 64 rows to a float64 sum: {check_some(base, adapter, out, shape):.5f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
