"""The trade-off: what each row of a TOML grid does to harmful, borderline and harmless refusals, KL and perplexity.

python -m tests.benchmarks.tradeoff GRID.toml [ROW ...] [--seeds 0 1 2] [--split test] [--work FOLDER] [--results FILE]

A grid has `[common]` settings and one `[[row]]` each with a `name`, perhaps a `model` (a folder; the demo's model without
one), perhaps `strengths` (factors on the trained adapter to measure besides 1), and `set`, the settings it changes. Rows that
the results file has already are not run again. Rows that share the direction's settings share its run folder, so only
distillation and the measurement are done for each.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from safesteer_lite import config, pipeline, rundir
from safesteer_lite.commands.shared import DEMO_PRESET
from safesteer_lite.evaluation.measure import measure
from safesteer_lite.events import Event, Metric, Note, Warned, discard
from safesteer_lite.hardware.allocator import keep_freed_memory
from safesteer_lite.method.model import Batch
from safesteer_lite.models import source
from safesteer_lite.models.demo_download import demo_model
from safesteer_lite.models.plain import scale_adapter
from safesteer_lite.models.policy import Policy, reference_answers
from safesteer_lite.rundir import Checkpoints, RunFolder
from safesteer_lite.stages import distill
from safesteer_lite.stages.session import ANSWER_BATCH, Session, texts
from tests.benchmarks.common import say

UPSTREAM = "tokens"
TEXT_MODULES = ("argparse", "collections", "csv", "datetime", "json", "random", "string", "textwrap")
"""Modules of the standard library whose documentation is the harmless text that perplexity is taken on."""


@dataclass(frozen=True)
class Row:
    """One line of the grid.

    Attributes:
        name: what the table calls it.
        set: settings by dotted name.
        model: a model folder; empty for the demo's model.
        strengths: factors on the adapter, measured besides 1.
    """

    name: str
    set: dict[str, Any]
    model: str = ""
    strengths: list[float] = field(default_factory=list)


def read_grid(path: Path) -> list[Row]:
    """The rows, each with the grid's common settings below its own."""
    grid = tomllib.loads(path.read_text(encoding="utf-8"))
    common = grid.get("common", {})
    return [Row(**{**entry, "set": {**common, **entry.get("set", {})}}) for entry in grid["row"]]


def say_event(event: Event) -> None:
    """A sink for what a person watching wants to see."""
    if isinstance(event, Note | Warned):
        say(f"    {event.message}")
    if isinstance(event, Metric):
        say(f"    {event.name} {event.value:.4f} (n {event.n}, step {event.step})")


def upstream(settings: config.RunConfig, model: Path, work: Path) -> RunFolder:
    """A run folder in which everything before distillation is done with these settings."""
    name = pipeline.stage_fingerprints(settings, source.model_fingerprint(model))[UPSTREAM][:16]
    places = sorted(work.glob(f"{name}-*"))
    run = rundir.open_run(places[0]) if places else rundir.create(work, name)
    pipeline.run(settings, run, model, say_event, last=UPSTREAM)
    return run


def harmless_text(policy: Policy, tokens: int = 4096, length: int = 256) -> Batch:
    """Documentation of the standard library as (tokens / length, length) token ids."""
    pages = []
    for name in TEXT_MODULES:
        module = __import__(name)
        members = [member for _, member in inspect.getmembers(module) if inspect.isclass(member) or callable(member)]
        pages += [inspect.getdoc(module) or "", *(inspect.getdoc(member) or "" for member in members)]
    ids: list[int] = policy.tokenizer("\n\n".join(dict.fromkeys(pages)), add_special_tokens=False).input_ids
    tensor = torch.tensor(ids[: tokens - tokens % length]).view(-1, length)
    return Batch(tensor, torch.ones_like(tensor))


def log_perplexity(policy: Policy, text: Batch, chunk: int) -> float:
    """Mean negative log-likelihood, nats a token."""
    total, model = 0.0, policy.model
    with torch.no_grad():
        for start in range(0, len(text), 8):
            batch = text.rows(start, start + 8)
            hidden = model.final(model.start(batch))[:, :-1].flatten(0, 1)
            targets = batch.input_ids[:, 1:].flatten()
            for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
                total += float(torch.nn.functional.cross_entropy(model.logits(part).float(), wanted, reduction="sum"))
    return total / (len(text) * (text.input_ids.shape[1] - 1))


def openings_mass(policy: Policy, prompts: list[str], openings: tuple[str, ...]) -> float:
    """Mean probability of the refusal openings as first token: a smoother look at what the refusal rate counts."""
    ids, masses = policy.token_ids(openings), []
    with torch.no_grad():
        for _, batch in policy.batches(prompts, ANSWER_BATCH):
            hidden = policy.model.final(policy.model.start(batch))[:, -1]
            masses.append(policy.model.logits(hidden).float().softmax(-1)[:, ids].sum(-1))
    return float(torch.cat(masses).mean())


class Bench:
    """Measures one loaded policy against its base."""

    def __init__(self, session: Session, split: str, tokens: int) -> None:
        """Measure the base, or read what an earlier row measured of it."""
        self.session, self.tokens = session, tokens
        self.sets = session.prompt_sets(split)
        self.text = harmless_text(session.policy)
        policy = session.policy
        with policy.model.adapters_off():
            self.reference = reference_answers(
                policy, texts(self.sets.harmless), session.config.evaluate.kl_tokens, ANSWER_BATCH
            )
            known = session.run.path / f"base-{split}-{tokens}.json"
            if not known.is_file():
                known.write_text(json.dumps(self.measure()), encoding="utf-8")
        self.base: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))

    def measure(self) -> dict[str, Any]:
        """Everything the table has, of whichever policy is on."""
        policy, sets, chunk = self.session.policy, self.sets, self.session.config.distill.chunk
        card, answers = measure(policy, sets, self.tokens, ANSWER_BATCH, self.reference, chunk)
        openings = self.session.config.direction.refusal_openings
        return {
            **card.to_record(),
            "nats": log_perplexity(policy, self.text, chunk),
            "openings": {name: openings_mass(policy, sets.texts(name), openings) for name in vars(sets)},
            "answers": vars(answers),
        }


def run_row(row: Row, seed: int, split: str, tokens: int, work: Path) -> dict[str, Any]:
    """Train and measure one row with one seed."""
    layers = [("preset", config.preset_values(DEMO_PRESET)), ("row", row.set), ("seed", {"seed": seed})]
    settings = config.build(layers)
    model = Path(row.model) if row.model else demo_model(discard)
    run = upstream(settings, model, work)
    session = Session(settings, run, model, say_event, stage="distill")
    bench = Bench(session, split, tokens)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        training, history, best = distill.train(session, Checkpoints(Path(scratch) / "steps", row.name))
    seconds = time.monotonic() - began
    kept = {f"step {history.best_step}": best}
    with training.optimizer.averaged():
        kept[f"step {training.done}"] = distill.adapter_tensors(session.policy.model)
    found = {}
    for label, tensors in kept.items():
        # Kept for a closer look at a row; rows can always be run again.
        save_file(tensors, work / f"{row.name}, seed {seed}, {label}.safetensors")
        for strength in (1.0, *row.strengths):
            distill.load_adapter(session.policy.model, tensors)
            scale_adapter(session.policy.model, strength)
            found[label if strength == 1 else f"{label} x {strength:g}"] = bench.measure()
    return {
        "row": row.name,
        "seed": seed,
        "split": split,
        "tokens": tokens,
        "set": row.set,
        "model": row.model,
        "seconds": round(seconds),
        "steering": {key: session.result("direction")[key] for key in ("position", "layer", "strength")},
        "base": bench.base,
        "measured": found,
        "history": asdict(history),
    }


def line(name: str, found: dict[str, Any], base: dict[str, Any]) -> str:
    """One measurement as a line of the table."""
    rates = " / ".join(
        f"{found[key]['refused']:3} of {found[key]['n']}" for key in ("harmful", "borderline", "harmless")
    )
    mass = " / ".join(f"{found['openings'][key]:.2f}" for key in ("harmful", "borderline", "harmless"))
    perplexity = 100 * (math.exp(found["nats"] - base["nats"]) - 1)
    return f"  {name:18} {rates}   KL {found['kl_to_base']:.4f}   perplexity {perplexity:+.2f} %   openings {mass}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--tokens", type=int, default=32, help="tokens an answer")
    parser.add_argument("--work", type=Path, default=Path("runs/tradeoff"))
    parser.add_argument("--results", type=Path, default=Path("runs/tradeoff/results.jsonl"))
    options = parser.parse_args()
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    known = [json.loads(text) for text in options.results.read_text().splitlines()] if options.results.exists() else []
    for row in read_grid(options.grid):
        for seed in options.seeds:
            mark = (row.name, seed, options.split)
            if (options.rows and row.name not in options.rows) or mark in {
                (entry["row"], entry["seed"], entry["split"]) for entry in known
            }:
                continue
            say(f"{row.name}, seed {seed}")
            result = run_row(row, seed, options.split, options.tokens, options.work)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            say(line("base", result["base"], result["base"]))
            for label, found in result["measured"].items():
                say(line(label, found, result["base"]))


if __name__ == "__main__":
    main()
