"""The four presets on one consumer card: peak VRAM and seconds of each stage, as a table, from one call.

    python -m tests.benchmarks.gpu [--presets NAME ...] [--backends plain unsloth] [--objectives chunked naive]
                                   [--caps 0 6 8 12] [--seconds 540] [--rows FILE]
    python -m tests.benchmarks.gpu --all [--model FOLDER] [--out FOLDER] [--minutes 20] [--dry-run]

The second form answers everything that the documentation waits for a card to tell: see `tests.benchmarks.first_card`.

Models have the presets' shapes and random NF4 weights, written once to `--models`. Each case runs in a process of its own, in
the order in which they matter; when `--seconds` are nearly over no further case begins, and what was left out is said. With
`--rows` finished cases are kept, and a later call goes on with the others.

A cap of 8 means: torch may take what a card of 8 GB (2^30 bytes each) has left after CUDA's own context, 0.5 GB. 0 is no cap.
Prompts are 512 tokens and rollouts 512, as in the paper; a step has 4 prompts with 8 rollouts. `chunked` is our objective;
`naive` gives all logits of all completion positions at once, for both policies, in float32.

Floors, both measured in the same process: a decoding step reads all weights and the key-value cache once, at the speed at
which the card copies memory; training multiplies every linear weight with every token in each of teacher, student,
recomputation and backward, at the speed of a large bf16 product. With `--presets tiny --device cpu` it is a smoke test.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesteer_lite.hardware import pace
from safesteer_lite.hardware.backend import Decision
from safesteer_lite.hardware.machine import free_cuda_memory
from safesteer_lite.hardware.need import estimate, largest_micro_batch, weights_bytes
from safesteer_lite.hardware.peaks import Demand, adapter_bytes, cache_bytes, training_bytes
from safesteer_lite.hardware.shape import linear_parameters
from safesteer_lite.method import directions, objective, policies, tokens
from safesteer_lite.method.distill import Distillation, Part, Recipe
from safesteer_lite.method.memory import fitting, release
from safesteer_lite.method.policies import Batch, Completions, Steering
from safesteer_lite.models import plain, unsloth
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.sources.base import open_base
from tests.benchmarks import first_card
from tests.benchmarks.common import say
from tests.benchmarks.random_models import PRESETS, write
from tests.recipe import RECIPE

_CONTEXT = 500_000_000
_RANK = 16


@dataclass(frozen=True)
class Sizes:
    """How much work a case is: tokens of a prompt and of a rollout, prompts a step, rollouts a prompt, prompts read at once."""

    prompt: int = 512
    completion: int = 512
    prompts: int = 4
    rollouts: int = 8
    read: int = 32


SMALL = Sizes(12, 6, 2, 2, 3)
"""For the smoke test."""


@dataclass
class Stages:
    """Seconds and peak bytes of each stage."""

    device: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work` as the stage `name`."""
        release()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        found = work()
        peak = {}
        if self.device == "cuda":
            torch.cuda.synchronize()
            peak = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        self.rows[name] = {"seconds": time.monotonic() - began, **peak}
        return found


class Naive(Distillation):
    """All logits of a micro-batch at once, for both policies, and autograd through them."""

    def _losses(
        self, prompts: Batch, rollouts: Completions, kind: Part, taught: Batch | None, count: int
    ) -> tuple[Tensor, Tensor | float]:
        model, length = self.model, rollouts.tokens.shape[1]
        whole = rollouts.after(prompts)
        with torch.no_grad(), policies.teacher(model, self.steer):
            known = model.logits(policies.completion_hidden(model, model.start(whole), length)).float()
        found = model.logits(policies.completion_hidden(model, model.start(whole), length)).float()
        each = objective.divergence(
            found[rollouts.mask], known[rollouts.mask], self.recipe.objective, self.safety_tokens, self.recipe.top_k
        )
        return (each * objective.position_weights(rollouts.mask, count)).sum(), 0.0


def recipe_for(sizes: Sizes, micro_batch: int) -> Recipe:
    """The general defaults, without anchors: the paper's step."""
    return replace(
        RECIPE,
        top_k=50,
        steps=25,
        prompts=sizes.prompts,
        rollouts=sizes.rollouts,
        completion_tokens=sizes.completion,
        learning_rate=2e-4,
        micro_batch=micro_batch,
        chunk=64,
        seed=0,
    )


def random_prompts(count: int, sizes: Sizes, device: torch.device) -> Batch:
    """Prompts of full length, without a shared beginning: the most that a run may meet."""
    ids = torch.randint(5, 300, (count, sizes.prompt), generator=torch.Generator().manual_seed(count)).to(device)
    return Batch(ids, torch.ones_like(ids))


def load(folder: Path, backend: str, device: str) -> PlainModel:
    """The model with a fresh adapter, as a run loads it."""
    adapter = Adapter(_RANK, 2 * _RANK)
    if backend == "unsloth":
        return unsloth.load(open_base(folder), "nf4", adapter, 0, device)
    network, tokenizer = plain.load(open_base(folder), precision="nf4", device=device, unpack=False)
    return with_adapter(network, tokenizer, adapter, 0)


def run_case(name: str, backend: str, naive: bool, cap: int, folder: Path, device: str, sizes: Sizes) -> dict[str, Any]:
    """All stages of one case.

    Args:
        name: a key of `PRESETS`.
        backend: `plain` or `unsloth`.
        naive: whether the objective is the naive one.
        cap: gigabytes of the card that is imitated; 0 is none.
        folder: of the model.
        device: `cuda` or `cpu`.
        sizes: how much work.
    """
    if cap and device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, ((cap << 30) - _CONTEXT) / total))
    shape, stages = PRESETS[name][1], Stages(device)
    model = stages.measure("load", lambda: load(folder, backend, device))
    model.checkpointing = True
    width = shape.width
    steer = Steering(shape.layers // 2, torch.ones(width) * 0.01)
    refusal = torch.tensor([40, 41], device=model.device)
    read = random_prompts(sizes.read, sizes, model.device)

    def score(size: int) -> Any:
        batches = [read.rows(start, start + size) for start in range(0, len(read), size)]
        directions.read_prompts(model, batches, 4, refusal, lambda done: None)
        candidate = directions.Candidate(-1, steer.layer, 0.0)
        vectors = torch.ones(1, shape.layers, width)
        return directions.ablation_scores(model, vectors, [candidate], batches, batches, refusal, lambda done: None)

    def vote(size: int) -> Any:
        found, generator = [], torch.Generator().manual_seed(0)
        for start in range(0, min(8, len(read)), size):
            part = read.rows(start, min(start + size, 8))
            found.append(tokens.collect(model, steer, part, samples=8, horizon=7, chance=generator))
        return tokens.vote(
            found,
            model.logits,
            by="ratio",
            excluded=model.special_ids,
            minimum_probability=0.0,
            ballots=200,
            count=50,
            chunk=64,
        )

    stages.measure("direction", lambda: fitting(sizes.read, score))
    safety = stages.measure("tokens", lambda: fitting(8, vote))[0].ids
    return {
        **step(name, model, naive, steer, safety, stages, sizes),
        "stages": stages.rows,
        "case": [name, backend, "naive" if naive else "chunked", cap],
    }


def step(
    name: str, model: PlainModel, naive: bool, steer: Steering, safety: Tensor, stages: Stages, sizes: Sizes
) -> dict[str, Any]:
    """Rollouts and one update, with what they reach of their floors."""
    shape, length = PRESETS[name][1], sizes.prompt + sizes.completion
    whole = random_prompts(sizes.prompts, sizes, model.device)
    demand = Demand(
        rank=_RANK,
        depth_start=0.0,
        reading=False,
        averaging=False,
        full_loss=True,
        rollouts=sizes.rollouts,
        completion_tokens=sizes.completion,
    )

    def need(rollouts: int) -> int:
        return training_bytes(
            shape,
            demand,
            micro_batch=rollouts,
            tokens=length,
            completion_tokens=sizes.completion,
            element=2,
            checkpointing=True,
        )

    first = 2
    if stages.device == "cuda":
        first = largest_micro_batch(16, free_cuda_memory() - adapter_bytes(shape, demand, 2), need)
    loop = (Naive if naive else Distillation)(
        model,
        steer,
        safety,
        [whole.rows(place, place + 1) for place in range(sizes.prompts)],
        [],
        recipe_for(sizes, first),
        None,
    )
    rollouts = stages.measure("sampling", lambda: loop.sample(whole, sizes.rollouts, stream=0))
    repeated, count = whole.repeat(sizes.rollouts), int(rollouts.mask.sum())

    def train() -> float:
        loss = loop.backward(repeated, rollouts, "harmful")
        loop.optimizer.step(1e-4, 1.0)
        return loss

    loss = stages.measure("training", train)
    sampled, trained = stages.rows["sampling"]["seconds"], stages.rows["training"]["seconds"]
    held = weights_bytes(shape, "nf4", False) + cache_bytes(shape, len(rollouts.mask), length, 2)
    bandwidth, flops = copy_speed(stages.device), product_speed(stages.device)
    passes = 4 * 2 * linear_parameters(shape) * len(rollouts.mask) * length
    estimated = estimate(
        shape,
        precision="nf4",
        unpacked=False,
        demand=demand,
        sequences=sizes.rollouts * loop.sampled_at_once,
        prompt_tokens=sizes.prompt,
        micro_batch=loop.micro_batch,
        checkpointing=True,
    )
    return {
        "loss": loss,
        "finite": math.isfinite(loss),
        "tokens": count,
        "micro_batch": [first, loop.micro_batch],
        "sampled_at_once": loop.sampled_at_once,
        "tokens_a_second": count / sampled,
        "share_of_bandwidth": rollouts.tokens.shape[1] * held / bandwidth / sampled,
        "share_of_products": passes / flops / trained,
        "estimate": estimated.memory_bytes["distill"],
    }


def copy_speed(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 1 << (29 if device == "cuda" else 24)
    one = torch.ones(size, dtype=torch.uint8, device=device)
    two = torch.empty_like(one)
    return 2 * size / fastest(lambda: two.copy_(one), device)


def product_speed(device: str) -> float:
    """Floating-point operations a second of a large bf16 product."""
    return pace.probe(Decision(device, "nf4", False, "bf16", "fits", ""), 0.2)


def fastest(work: Callable[[], object], device: str, times: int = 5) -> float:
    """Seconds of the fastest of several tries."""
    found = math.inf
    for _ in range(times):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found = min(found, time.perf_counter() - began)
    return found


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Preset, backend, objective and cap: first what a user runs, in the smallest card it must fit, then the rest."""
    every = [
        (name, backend, kind, cap)
        for kind in options.objectives
        for backend in options.backends
        for cap in options.caps
        for name in options.presets
    ]
    smallest = {name: 6 if PRESETS[name][1].width < 3500 else 8 for name in options.presets}
    yield from sorted(every, key=lambda case: (case[2] != "chunked", case[3] != smallest[case[0]], case[3] == 0))


def main() -> None:
    """Run the cases and print the table; or answer everything; or be one case, or write one model."""
    options = parser().parse_args()
    if options.all:
        first_card.run(options.out, options.models, options.model, options.minutes, dry=options.dry_run)
        return
    if options.write:
        write(options.models / options.write, options.write, options.device)
        return
    if options.case:
        name, backend, kind, cap = json.loads(options.case)
        sizes = SMALL if options.device == "cpu" else Sizes()
        found = run_case(name, backend, kind == "naive", cap, options.models / name, options.device, sizes)
        say(json.dumps(found))
        return
    began, rows = time.monotonic(), kept_rows(options.rows)
    longest, left = 0.0, []
    for case in cases(options):
        if list(case) in [row["case"] for row in rows]:
            continue
        if time.monotonic() - began + longest > options.seconds:
            left.append(case)
            continue
        started = time.monotonic()
        row = in_own_process(case, options)
        longest = max(longest, time.monotonic() - started)
        rows.append(row)
        if options.rows:
            with options.rows.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    say(table(rows))
    if left:
        say(f"Left out for lack of time: {left}")


def in_own_process(case: tuple[str, str, str, int], options: argparse.Namespace) -> dict[str, Any]:
    """One case's row; where it fails, with the last line of what it said.

    The model is written by a process before it: Unsloth must find transformers not imported yet.
    """
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.gpu",
        "--device",
        options.device,
        "--models",
        str(options.models),
    ]
    subprocess.run([*command, "--write", case[0]], check=True)
    done = subprocess.run([*command, "--case", json.dumps(case)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return {"case": list(case), "failed": lines[-1]}


def kept_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of earlier calls that did not fail."""
    if path is None or not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "failed" not in row]


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    names = ("load", "direction", "tokens", "sampling", "training")
    head = ["model", "backend", "objective", "cap", *(f"{name}: peak, time" for name in names)]
    head += ["estimate", "rollouts a forward", "tokens a second", "of bandwidth", "training of products"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in rows:
        cells = [str(cell) for cell in row["case"][:3]] + [f"{row['case'][3]} GB" if row["case"][3] else "none"]
        if "failed" in row:
            lines.append("| " + " | ".join([*cells, f"FAILED: {row['failed']}"]) + " |")
            continue
        for name in names:
            stage = row["stages"][name]
            cells.append(f"{stage.get('peak', 0) / 1e9:.2f} GB, {stage['seconds']:.1f} s")
        cells += [f"{row['estimate'] / 1e9:.2f} GB", f"{row['micro_batch'][0]} -> {row['micro_batch'][1]}"]
        cells += [
            f"{row['tokens_a_second']:.0f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['share_of_products']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in PRESETS if name != "tiny"]
    made.add_argument("--presets", nargs="+", default=real, choices=list(PRESETS))
    made.add_argument("--backends", nargs="+", default=["plain", "unsloth"], choices=["plain", "unsloth"])
    made.add_argument("--objectives", nargs="+", default=["chunked", "naive"], choices=["chunked", "naive"])
    made.add_argument("--caps", nargs="+", type=int, default=[0, 6, 8, 12], help="gigabytes; 0 is none")
    made.add_argument("--seconds", type=float, default=540, help="no case begins that would end later")
    made.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "safesteer-random-models")
    made.add_argument("--rows", type=Path, default=None, help="JSON Lines of finished cases")
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    made.add_argument("--all", action="store_true", help="everything that the documentation waits for")
    made.add_argument("--model", type=Path, default=None, help="with --all: the folder of a small instruct model")
    made.add_argument("--out", type=Path, default=Path("card"), help="with --all: where the page goes (card)")
    made.add_argument("--minutes", type=float, default=20, help="with --all: for everything (20)")
    made.add_argument("--dry-run", action="store_true", help="with --all: on the CPU, with a tiny shape")
    made.add_argument("--case", default="", help=argparse.SUPPRESS)
    made.add_argument("--write", default="", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
