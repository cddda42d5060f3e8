"""The trade-off: what each row of a TOML grid does to harmful, borderline and harmless refusals, KL and perplexity.

python -m tests.benchmarks.tradeoff GRID.toml [ROW ...] [--seeds 0 1 2] [--split test] [--prompts FOLDER] [--model FOLDER]

A grid has `[common]` settings and one `[[row]]` each with a `name`, perhaps `strengths` (factors on the trained adapter to
measure besides the one that the run itself would keep), and `set`, the settings it changes. Each measurement is a line of
the results file; rows that it has already are not run again. Rows that share the direction's settings share its run folder, so
only distillation and the measurement are done for each. Adapters and answers stay in the work folder.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from safesteer_lite import config
from safesteer_lite.config import ContextName
from safesteer_lite.evaluation.judges import judge
from safesteer_lite.evaluation.measure import measure
from safesteer_lite.evaluation.scorecard import kinds_of
from safesteer_lite.evaluation.turning import turns_back
from safesteer_lite.events import Event, Metric, Note, Warned, discard
from safesteer_lite.hardware.allocator import keep_freed_memory
from safesteer_lite.method.policies import Batch
from safesteer_lite.models.adapter import adapter_tensors, load_adapter, scale_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reference import reference_answers
from safesteer_lite.prompts.contexts import BEGUN, CONTEXTS, asked_in, contexts
from safesteer_lite.prompts.plan import texts
from safesteer_lite.prompts.sets import Kind
from safesteer_lite.runs import folder as run_folders
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.durable import write_atomically
from safesteer_lite.runs.folder import Checkpoints, RunFolder
from safesteer_lite.runs.manifest import manifest_bytes
from safesteer_lite.shell.commands.shared import DEMO_PRESET
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.demo import demo_model
from safesteer_lite.stages import distill, pipeline
from safesteer_lite.stages.session import ANSWER_BATCH, Session
from tests import REPOSITORY
from tests.benchmarks.common import say

KINDS: tuple[Kind, ...] = ("harmful", "borderline", "harmless")
"""The kinds of prompts that every row was measured on; later rows also have `critical` where their split has such prompts."""
RECORDS = REPOSITORY / "docs" / "research" / "tradeoff.jsonl"
UPSTREAM, SHARED = "tokens", ("baseline", "direction")
TEXT_MODULES = ("argparse", "collections", "csv", "datetime", "json", "random", "string", "textwrap")
"""Modules of the standard library whose documentation is the harmless text that perplexity is taken on."""


@dataclass(frozen=True)
class Row:
    """One line of the grid.

    Attributes:
        name: what the table calls it.
        set: settings by dotted name.
        strengths: factors on the adapter as the last step leaves it, measured besides what the run itself would keep.
    """

    name: str
    set: dict[str, Any]
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
    """A run folder in which everything before distillation is done with these settings.

    Rows that differ in their safety tokens alone share what comes before: a folder that has it is copied.
    """
    base = open_base(model)
    wanted = pipeline.stage_fingerprints(settings, base.fingerprint)
    name = wanted[UPSTREAM][:16]
    places = sorted(work.glob(f"{name}-*"))
    run = run_folders.open_run(places[0]) if places else create_run(work, name)
    if not places:
        for known in map(run_folders.open_run, sorted(path.parent for path in work.glob("*/manifest.json"))):
            shared = {stage: record for stage, record in known.manifest.stages.items() if stage in SHARED}
            if all(stage in shared and shared[stage].fingerprint == wanted[stage] for stage in SHARED):
                for record in shared.values():
                    shutil.copytree(known.path / record.folder, run.path / record.folder)
                manifest = manifest_bytes(replace(run.manifest, stages=shared))
                write_atomically(run.path / "manifest.json", manifest)
                break
    pipeline.run(settings, run, base, say_event, last=UPSTREAM)
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

    def __init__(self, session: Session, split: str, tokens: int, contexts_asked: tuple[ContextName, ...] = ()) -> None:
        """Measure the base, or read what an earlier row measured of it."""
        self.session, self.tokens, self.contexts = session, tokens, contexts_asked
        self.sets = session.prompts.split(split)
        self.text = harmless_text(session.policy)
        policy = session.policy
        with policy.model.adapters_off():
            self.reference = reference_answers(
                policy, texts(self.sets.harmless), session.config.evaluate.kl_tokens, ANSWER_BATCH
            )
            known = session.run.path / f"base-{split}-{tokens}{'-'.join(['', *contexts_asked])}.json"
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
            "contexts": {name: self.in_context(name) for name in self.contexts},
            "nats": log_perplexity(policy, self.text, chunk),
            "openings": {name: openings_mass(policy, sets.texts(name), openings) for name in KINDS},
            "answers": vars(answers),
        }

    def in_context(self, name: ContextName) -> dict[str, list[int]]:
        """Refused and asked of every third harmful and harmless and every other borderline prompt, in test contexts."""
        drawn = contexts(name, "test")
        found: dict[str, list[int]] = {}
        for kind in KINDS:
            prompts = self.sets.texts(kind)[:: 2 if kind == "borderline" else 3]
            answers = self.session.policy.answers(asked_in(prompts, drawn), self.tokens, ANSWER_BATCH)
            read = turns_back if name in BEGUN else judge
            found[kind] = [sum(read(answer).refused for answer in answers), len(answers)]
        return found


@dataclass(frozen=True)
class Place:
    """What a row is trained and measured on.

    Attributes:
        model: the model's folder.
        prompts: a prompt folder; empty for the bundled prompts.
        split: what is measured.
        tokens: longest answer.
        work: where run folders, adapters and answers lie.
        contexts: what some of the prompts are asked in besides.
    """

    model: Path
    prompts: str
    split: str
    tokens: int
    work: Path
    contexts: tuple[ContextName, ...] = ()


def run_row(row: Row, seed: int, place: Place) -> Iterator[dict[str, Any]]:
    """Train one row with one seed; one record a measurement."""
    layers = [
        ("preset", config.preset_values(DEMO_PRESET)),
        ("row", row.set),
        ("command line", {"seed": seed, "prompts.folder": place.prompts}),
    ]
    settings = config.build(layers)
    run = upstream(settings, place.model, place.work)
    session = Session(settings, run, open_base(place.model), say_event, stage="distill")
    bench = Bench(session, place.split, place.tokens, place.contexts)
    with tempfile.TemporaryDirectory() as scratch:
        training = distill.train(session, Checkpoints(Path(scratch) / "steps", row.name))
    loop, history, best = training.loop, training.history, training.best
    with loop.optimizer.averaged():
        last = adapter_tensors(session.policy.model)
    for strength in (None, *row.strengths):
        load_adapter(session.policy.model, best if strength is None else last)
        if strength is not None:
            scale_adapter(session.policy.model, strength)
        found = bench.measure()
        label = "kept" if strength is None else f"x {strength:g}"
        file = place.work / f"{row.name}, {' '.join(map(str, mark(place).values()))}, seed {seed}, {label}"
        save_file(best if strength is None else last, f"{file}.safetensors")
        Path(f"{file}.json").write_text(json.dumps({"base": bench.base, "hardened": found}), encoding="utf-8")
        yield {
            "row": row.name,
            **mark(place),
            "seed": seed,
            "measured": label,
            "step": history.best_step if strength is None else loop.done,
            "strength": history.best_strength if strength is None else strength,
            "set": row.set,
            "steering": {key: session.result("direction")[key] for key in ("position", "layer", "strength")},
            "base": figures(bench.base, bench.base),
            "hardened": figures(found, bench.base),
        }


def mark(place: Place) -> dict[str, Any]:
    """What tells the measurements of one row apart, besides its seed."""
    return {
        "model": place.model.name,
        "prompts": Path(place.prompts).name or "bundled",
        "split": place.split,
        "tokens": place.tokens,
    }


def figures(found: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What a table has of one measurement: refused and asked by kind, nats a token, and the perplexity's change."""
    return {
        **{kind: [found[kind]["refused"], found[kind]["n"]] for kind in kinds_of(found)},
        "kl": round(found["kl_to_base"], 5),
        "perplexity": round(math.exp(found["nats"] - base["nats"]) - 1, 5),
        "openings": [round(found["openings"][kind], 4) for kind in KINDS],
        **({"contexts": found["contexts"]} if found["contexts"] else {}),
    }


def line(record: dict[str, Any], side: str) -> str:
    """One measurement as a line for who waits."""
    found = record[side]
    rates = " / ".join(f"{found[kind][0]:3} of {found[kind][1]}" for kind in KINDS)
    mass = " / ".join(f"{share:.2f}" for share in found["openings"])
    rates += "".join(
        f"; {name} " + " / ".join(str(counts[kind][0]) for kind in KINDS)
        for name, counts in found.get("contexts", {}).items()
    )
    name = "base" if side == "base" else f"{record['measured']} (step {record['step']} x {record['strength']:g})"
    return f"  {name:24} {rates}   KL {found['kl']:.4f}   perplexity {found['perplexity']:+.2%}   openings {mass}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompts", default="", help="a prompt folder; the bundled prompts without it")
    parser.add_argument("--model", type=Path, help="a model folder; the demo's model without it")
    parser.add_argument("--tokens", type=int, default=32, help="tokens an answer")
    parser.add_argument(
        "--contexts", nargs="*", default=[], choices=list(CONTEXTS), help="ask some prompts in these too"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/tradeoff"))
    parser.add_argument("--results", type=Path, default=RECORDS)
    options = parser.parse_args()
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or demo_model(discard)
    place = Place(model, options.prompts, options.split, options.tokens, options.work, tuple(options.contexts))
    known = [json.loads(text) for text in options.results.read_text().splitlines()] if options.results.exists() else []
    done = [{key: entry[key] for key in ("row", "seed", *mark(place))} for entry in known]
    for row in read_grid(options.grid):
        for seed in options.seeds:
            if (options.rows and row.name not in options.rows) or {
                "row": row.name,
                "seed": seed,
                **mark(place),
            } in done:
                continue
            say(f"{row.name}, seed {seed}")
            for record in run_row(row, seed, place):
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                say(line(record, "base"))
                say(line(record, "hardened"))


if __name__ == "__main__":
    main()
