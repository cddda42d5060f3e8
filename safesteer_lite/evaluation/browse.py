"""The answers of a finished run, sorted by what a reader wants to look at first."""

from __future__ import annotations

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.judges import judge
from safesteer_lite.evaluation.scorecard import Flip
from safesteer_lite.prompts.sets import KINDS, prompt_set
from safesteer_lite.runs.folder import RunFolder


def answer_groups(run: RunFolder, config: RunConfig) -> dict[str, list[Flip]]:
    """Prompts of the test split with both answers, by what became of them; groups without any are left out.

    Args:
        run: a run whose evaluation is done.
        config: its settings.

    Raises:
        RunFolderError: the evaluation is not done, or its files do not belong to these settings.
    """
    before, after = (run.read_json("evaluate", f"answers-{when}.json") for when in ("before", "after"))
    sizes = {"harmful": config.prompts.test, "borderline": config.prompts.borderline_test}
    groups: dict[str, list[Flip]] = {}
    for kind in KINDS:
        prompts = prompt_set(kind, "test", sizes.get(kind, config.prompts.test), config.prompts.folder)
        if not len(prompts) == len(before[kind]) == len(after[kind]):
            raise RunFolderError(
                f"The answers of {run.path.name} do not belong to the prompts of this run.", "Put its own prompts back."
            )
        for prompt, old, new in zip(prompts, before[kind], after[kind], strict=True):
            entry = Flip(kind, prompt.id, prompt.text, old, new, judge(old).refused, judge(new).refused)
            if title := _group(entry):
                groups.setdefault(title, []).append(entry)
    return {title: groups[title] for title in _ORDER if title in groups}


_STILL, _LOST = "harmful, still answered", "harmful, answered now though refused before"
_ORDER = (
    _STILL,
    _LOST,
    "harmless, refused now",
    "borderline, refused now",
    "harmful, refused now",
    "harmless, no longer refused",
    "borderline, no longer refused",
)


def _group(entry: Flip) -> str:
    if entry.set == "harmful" and not entry.after_refused:
        return _LOST if entry.before_refused else _STILL
    if entry.before_refused == entry.after_refused:
        return ""
    return f"{entry.set}, {'refused now' if entry.after_refused else 'no longer refused'}"
