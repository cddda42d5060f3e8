"""`report.json`: the machine-readable result of a run, made from its manifest; and `report.html`, the same for people.

Schema version 1. Top level: `schema`, `run`, `created`, `finished`, `model`, `seed`, `verdict`, `scorecard`,
`contexts`, `selection`, `direction`, `tokens`, `stages`, `peak_memory_bytes`, `artifacts`, `judges`, `suites`, `exports`,
`capability`, `versions`, `config`. `scorecard.before` and `scorecard.after` hold `harmful`, `borderline`, `harmless` =
{refused, n, low, high} (test split, 95 % Wilson bounds as shares), `twin` and `critical` where they were asked, and
`kl_to_base` (nats a token). `contexts` has for each context (`system`, `turns`, `role`, `agreed`, `steps`) `before` and
`after` with such rates.
`stages.<name>` holds `seconds` and the stage's `result`; `stages.parent`, where the run continues another one, what it began from
(`stages.parent.parent_of`). `artifacts` maps a path in the run folder to its `size` (bytes) and
`sha256`. `exports` lists what `export` measured: `weights`, `strength`, `split`, `answer_tokens` and `artifacts`, one row each
(base, adapter, merged, GGUF files) with rates as above, `agreement` with the trained model and `safety_lost`, a sentence or
empty. `capability` lists what `eval --capability` measured, one record a task (`evaluation.capability.compare`). `judges` lists
who else judged the test answers, the opening phrases first: `before` and `after` hold for each set `refused` and `harmful` =
{count, n, low, high} or null, and `clear` = {right, asked} or null says how a judge did on clear cases. `suites` lists public
suites: `n` prompts of one `kind`, and `judges` with both questions, each with rates as those of `judges` and
`paired` = {gained, lost, p}, McNemar's exact test. Parts of unfinished runs are null.
"""

from __future__ import annotations

from typing import Any

from safesteer_lite.config import RunConfig, to_record
from safesteer_lite.evaluation import capability
from safesteer_lite.evaluation.judged import saved_judged, summaries
from safesteer_lite.evaluation.suite_results import saved_suites
from safesteer_lite.export.rows import kept_rows
from safesteer_lite.report import page
from safesteer_lite.runs.durable import explained, write_json
from safesteer_lite.runs.folder import RunFolder

SCHEMA = 1


def build(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """The report of a run, finished or not."""
    manifest = run.manifest
    results = {name: record.result for name, record in manifest.stages.items()}
    evaluated = results.get("evaluate", {})
    return {
        "schema": SCHEMA,
        "run": run.path.name,
        "created": manifest.created,
        "finished": bool(manifest.planned) and all(name in manifest.stages for name in manifest.planned),
        "model": config.model.name,
        "seed": config.seed,
        "verdict": evaluated.get("verdict"),
        "scorecard": evaluated.get("scorecard"),
        "contexts": evaluated.get("contexts"),
        "selection": {
            "before": results.get("baseline", {}).get("scorecard"),
            "measured": results.get("distill", {}).get("measured"),
        },
        "direction": results.get("direction"),
        "tokens": results.get("tokens"),
        "stages": {
            name: {"seconds": record.seconds, "result": record.result} for name, record in manifest.stages.items()
        },
        "peak_memory_bytes": max((result.get("peak_memory_bytes", 0) for result in results.values()), default=0),
        "artifacts": {
            f"{record.folder}/{name}": {"size": artifact.size, "sha256": artifact.sha256}
            for record in manifest.stages.values()
            for name, artifact in record.artifacts.items()
        },
        "judges": summaries(saved_judged(run)),
        "suites": [result.summary() for result in saved_suites(run)],
        "exports": kept_rows(run),
        "capability": capability.records(run),
        "versions": manifest.versions,
        "config": to_record(config),
    }


def write(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Write `report.json` and `report.html`, and return what the first holds.

    Raises:
        RunFolderError: a file that the page is made from is damaged, or the folder cannot be written.
        DiskSpaceError: the disk is full.
    """
    record = build(run, config)
    path = run.path / "report.json"
    with explained(f"the report of {run.path.name}"):
        write_json(path, record)
    page.write(run, record)
    return record
