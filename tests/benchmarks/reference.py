"""Ours beside the method as its authors run it, on a CPU: the same results, and how much time and memory each takes.

    python -m tests.benchmarks.reference --model FOLDER [--candidates 12] [--parts direction,tokens,step] [name=value ...]

Each side of each part runs in a process of its own, one after the other: ours first, because the yardstick
(`tests.benchmarks.plain_procedure`) is given our coefficient, our sampled continuations and our rollouts, so that both
compute the same thing. Both sides load the same 16-bit or 32-bit weights (`--dtype`), and both keep freed memory
(`hardware.allocator`), which the authors do not: the ratios do not come from there.

- direction: read all prompts, keep the clear ones, choose a candidate. `--candidates N` sweeps N of all (position, layer)
  pairs, evenly spread, with our choice among them, and scales the sweep's time to all of them; 0 sweeps all. The search
  for the steering strength belongs to neither side.
- tokens: sample continuations from the teacher, read both policies along them, vote. The yardstick samples too, with
  transformers' own generate and its cache, and then reads OUR continuations, so that the votes can be compared.
- step: loss, gradients and AdamW for rollouts that are given; LoRA on both sides, with the same weights, though the
  authors train all weights, which takes far more memory. The yardstick's forwards are `--reference-batch` rollouts wide.

Memory is the peak of the process above what it held once its models were loaded (two copies where the authors load two).
Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.common import say
from tests.benchmarks.reference_sides import SIDES

# The bar: ours at least so many times faster, and with at least so many times less memory.
BARS = {"direction": (8.0, 0.0), "tokens": (1.0, 2.0), "step": (1.0, 3.0)}
# Nats of bypass score: a choice within this of the best survivor counts as one as good.
AS_GOOD = 0.25
# Largest relative difference of loss and of the gradient; bf16 keeps 8 bits, and both sides round differently.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}


def main() -> None:
    """Run every part's two sides, print what agrees, the ratios and the bars; or be one of the sides."""
    options = arguments()
    if options.side:
        part, side = options.side.split("-")
        found = SIDES[part][0 if side == "ours" else 1](options)
        (options.scratch / f"{options.side}.json").write_text(json.dumps(found), encoding="utf-8")
        return
    options.scratch = options.scratch or Path(tempfile.mkdtemp())
    options.scratch.mkdir(parents=True, exist_ok=True)
    say(f"{options.model.name}, {options.dtype}; figures and tensors in {options.scratch}")
    rows = []
    for part in SIDES:
        if part not in options.parts.split(","):
            continue
        ours, theirs = (run_side(f"{part}-{side}", options) for side in ("ours", "theirs"))
        say(f"{part}: {VERDICTS[part](ours, theirs, options)}")
        rows.append(row(part, ours, theirs))
    say("| part | ours | authors' way | faster | less memory | bars met |\n| --- | --- | --- | --- | --- | --- |")
    for line in rows:
        say(line)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument(
        "--parts", default=",".join(SIDES), help="which to run, in this order; later ones need earlier ones"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--candidates", type=int, default=12, help="candidates that the yardstick sweeps; 0 is all")
    parser.add_argument("--rollouts", type=int, default=32, help="rollouts of the training step")
    parser.add_argument("--repeats", type=int, default=8, help="rollouts a prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens a rollout, at most")
    parser.add_argument("--micro-batch", type=int, default=8, help="rollouts a forward, ours")
    parser.add_argument("--reference-batch", type=int, default=0, help="the same of the yardstick; 0 is ours")
    parser.add_argument(
        "--depth-start", type=float, default=0.0, help="share of the blocks below the lowest adapted one"
    )
    parser.add_argument(
        "--checkpointing", choices=("yes", "no"), default="no", help="ours: run blocks again in backward"
    )
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "--scratch", type=Path, default=None, help="folder that a later call with other parts goes on in"
    )
    parser.add_argument("settings", nargs="*", help="settings of ours, name=value")
    return parser.parse_args()


def run_side(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.reference", *sys.argv[1:]]
    subprocess.run([*command, "--side", side, "--scratch", str(options.scratch)], check=True)
    found: dict[str, Any] = json.loads((options.scratch / f"{side}.json").read_text(encoding="utf-8"))
    return found


def row(part: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """One line of the table."""
    faster, less = theirs["seconds"] / ours["seconds"], theirs["peak_bytes"] / ours["peak_bytes"]
    met = faster >= BARS[part][0] and less >= BARS[part][1]
    cells = [f"{side['seconds']:.1f} s, {side['peak_bytes'] / 1e9:.2f} GB" for side in (ours, theirs)]
    return f"| {part} | {cells[0]} | {cells[1]} | {faster:.1f} x | {less:.1f} x | {'yes' if met else 'NO'} |"


def judge_direction(ours: dict[str, Any], theirs: dict[str, Any], options: argparse.Namespace) -> str:
    """Whether both chose the same candidate, or ours is as good by the yardstick's own figures."""
    swept = f"{theirs['swept']} of {theirs['of']} candidates swept"
    if theirs["swept"] < theirs["of"]:
        swept += f" in {theirs['seconds_measured']:.1f} s, scaled to all"
    best, own = theirs["best"], theirs["ours"]
    if best is None:
        return f"NOTHING SURVIVES the authors' sweep at coefficient {ours['coefficient']:g}; ours {own}; {swept}"
    same = (best["position"], best["layer"]) == (ours["position"], ours["layer"])
    good = theirs["ours_survives"] and own["bypass"] - best["bypass"] <= AS_GOOD
    verdict = "the same choice" if same else "as good" if good else "WORSE"
    return f"{verdict}; ours {own}, theirs {best}, coefficient {ours['coefficient']:g}; {swept}"


def judge_tokens(ours: dict[str, Any], theirs: dict[str, Any], options: argparse.Namespace) -> str:
    """How many of the voted tokens are the same."""
    same = len(set(ours["ids"]) & set(theirs["ids"]))
    return f"{same} of {len(theirs['ids'])} tokens are the same; ours begin with {ours['words'][:8]}"


def judge_step(ours: dict[str, Any], theirs: dict[str, Any], options: argparse.Namespace) -> str:
    """Whether loss and gradient agree."""
    loss = abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"])
    limit = TOLERANCE[options.dtype]
    agrees = loss < limit and theirs["gradient_distance"] < limit
    return (
        f"{'agree' if agrees else 'DISAGREE'} (limit {limit:g}): loss {ours['loss']:.6f} and {theirs['loss']:.6f}, relative "
        f"difference {loss:.1e}; gradients' relative distance {theirs['gradient_distance']:.1e}, cosine "
        f"{theirs['gradient_cosine']:.6f}; {ours['tokens']} tokens"
    )


VERDICTS = {"direction": judge_direction, "tokens": judge_tokens, "step": judge_step}


if __name__ == "__main__":
    main()
