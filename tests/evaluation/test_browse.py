"""The answers of a run as its reader finds them: what was asked in contexts, with the context that it was asked in."""

from __future__ import annotations

import json
from pathlib import Path

from safesteer_lite.evaluation.browse import context_groups
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from tests.runs.run_files import publish


def record(kind: str, place: int, before: bool, after: bool, begun: str = "") -> dict[str, object]:
    """One question and what became of it, as the evaluation keeps it."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Ask {place}"}]
    return {
        "context": "system",
        "set": kind,
        "id": f"{kind}-{place}",
        "messages": messages,
        "beginning": begun,
        "before": "old\u2028answer",
        "after": "new answer",
        "before_refused": before,
        "after_refused": after,
    }


def test_questions_in_contexts_are_grouped_as_plain_ones_and_shown_with_their_context(tmp_path: Path) -> None:
    run = create_run(tmp_path, "tiny")
    asked = [
        record("harmless", 0, False, True),
        record("harmless", 1, False, False),
        record("harmful", 2, True, True),
        record("harmful", 3, False, False, begun="Sure, here is"),
        record("harmful", 4, True, False),
    ]
    with run.publish("evaluate", 5, "asked") as publication:
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in asked)
        (publication.path / "contexts.jsonl").write_text("".join(lines), encoding="utf-8")
    groups = context_groups(run)
    assert {title: [entry.id for entry in entries] for title, entries in groups.items()} == {
        "in contexts: harmful, still answered": ["harmful-3"],
        "in contexts: harmful, answered now though refused before": ["harmful-4"],
        "in contexts: harmless, refused now": ["harmless-0"],
    }
    assert next(iter(groups)).endswith("still answered"), "what is looked for first comes first"
    [entry] = groups["in contexts: harmful, still answered"]
    assert entry.prompt == "system: Be brief.\nuser: Ask 3\nassistant, begun: Sure, here is"
    assert (entry.before, entry.after) == ("old\u2028answer", "new answer")


def test_a_run_that_asked_in_no_context_has_no_such_groups(tmp_path: Path) -> None:
    run = create_run(tmp_path, "tiny")
    publish(run, "evaluate", 5, "without contexts")
    assert context_groups(RunFolder(run.path)) == {}
