"""What grouped attention and the roomy cache save while answers are written: the same answers by transformers' own, in one run.

    python -m tests.benchmarks.decoding [--model FOLDER | --preset NAME] [--device cuda] [--tokens 24 150] [--answers 32]

A preset has random 4-bit weights; answers are greedy and as long as allowed. Seconds are the process's own on a CPU, which a
busy machine disturbs less, and the clock's on a card. The first round is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesteer_lite.method.policies import Batch
from safesteer_lite.models import attention, plain
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.sampling import Cache, GrowingCache
from safesteer_lite.sources.base import open_base
from tests.benchmarks.common import say
from tests.benchmarks.random_models import PRESETS, write

_PROMPT = 48


class MovingCache:
    """transformers' own cache, which is copied at every token."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.given = DynamicCache()

    def take(self, output: Any) -> None:
        """Nothing: the decoder has written into it."""

    def repeat(self, times: int) -> None:
        """Make each row `times` rows, copies side by side."""
        self.given.batch_repeat_interleave(times)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.given.batch_select_indices(rows)


class Decoding(PlainModel):
    """A model whose attention and cache can be changed, and whose answers never end by themselves."""

    cache: Callable[[], Cache] = GrowingCache

    def new_cache(self) -> Cache:
        """An empty cache of the kind that is tried."""
        return type(self).cache()

    def seconds(self, prompts: Batch, tokens: int, implementation: str, cache: Callable[[], Cache]) -> float:
        """How long the answers take."""
        self.causal.set_attn_implementation(implementation)
        type(self).cache = cache
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        began = clock()
        self.generate(prompts, tokens, 0.0, None, 1)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began


def padded_prompts(count: int, device: torch.device) -> Batch:
    """Random prompts of unequal length, padded on the left, without a shared beginning."""
    ids = torch.randint(5, 300, (count, _PROMPT), generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(_PROMPT // 2, _PROMPT, count).long()
    mask = (torch.arange(_PROMPT) >= _PROMPT - lengths[:, None]).long()
    return Batch((ids * mask).to(device), mask.to(device))


def main() -> None:
    """Print a table: seconds before and after, and their ratio."""
    options = parser().parse_args()
    folder = options.model
    if folder is None:
        folder = write(options.models / options.preset, options.preset, options.device)
    base = open_base(folder)
    precision = "nf4" if base.is_quantised else "bf16"
    network, tokenizer = plain.load(base, precision=precision, device=options.device, unpack=False)
    model = Decoding(network, tokenizer, None)
    model.end_of_turn = frozenset({base.shape.vocabulary})
    prompts = padded_prompts(options.answers, model.device)
    model.seconds(prompts, 2, attention.GROUPED, GrowingCache)
    say("| tokens | before | grouped attention | with the roomy cache |\n| --- | --- | --- | --- |")
    for tokens in options.tokens:
        before = model.seconds(prompts, tokens, "sdpa", MovingCache)
        grouped = model.seconds(prompts, tokens, attention.GROUPED, MovingCache)
        both = model.seconds(prompts, tokens, attention.GROUPED, GrowingCache)
        cells = [f"{seconds:.2f} s ({before / seconds:.2f} times as fast)" for seconds in (grouped, both)]
        say(f"| {tokens} | {before:.2f} s | {cells[0]} | {cells[1]} |")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, default=None, help="a folder; otherwise random weights")
    made.add_argument("--preset", default="qwen2.5-7b", choices=list(PRESETS))
    made.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "safesteer-random-models")
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    made.add_argument("--tokens", type=int, nargs="+", default=[24, 150])
    made.add_argument("--answers", type=int, default=32)
    return made


if __name__ == "__main__":
    main()
