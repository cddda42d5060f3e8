"""The answers of a finished run, sorted by what a reader wants to look at first."""

from __future__ import annotations

from safesteer_lite.config import RunConfig
from safesteer_lite.errors import RunFolderError
from safesteer_lite.evaluation.judged import MODELS, JudgedAnswer, saved_judged
from safesteer_lite.evaluation.judges import judge
from safesteer_lite.evaluation.scorecard import Flip, kinds_of
from safesteer_lite.prompts.plan import PromptPlan
from safesteer_lite.runs.durable import parse_json_lines
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
    sets = PromptPlan(config.prompts).split("test")
    groups: dict[str, list[Flip]] = {}
    # Runs of earlier versions have no twins, and the first ones no requests for help in danger.
    for kind in kinds_of(before):
        prompts = sets.of(kind)
        if not len(prompts) == len(before[kind]) == len(after[kind]):
            raise RunFolderError(
                f"The answers of {run.path.name} do not belong to the prompts of this run.", "Put its own prompts back."
            )
        for prompt, old, new in zip(prompts, before[kind], after[kind], strict=True):
            entry = Flip(kind, prompt.id, prompt.text, old, new, judge(old).side, judge(new).side)
            if title := _group(entry):
                groups.setdefault(title, []).append(entry)
    return {title: groups[title] for title in _ORDER if title in groups}


def context_groups(run: RunFolder) -> dict[str, list[Flip]]:
    """What was asked in contexts with both answers, grouped as the plain prompts are; none where nothing was.

    Raises:
        RunFolderError: the evaluation is not done, or its file is not what was published.
    """
    if "contexts.jsonl" not in run.record("evaluate").artifacts:  # A run of the first versions.
        return {}
    groups: dict[str, list[Flip]] = {}
    for record in parse_json_lines(run.read("evaluate", "contexts.jsonl")):
        asked = [f"{message['role']}: {message['content']}" for message in record["messages"]]
        if record["beginning"]:
            asked.append(f"assistant, begun: {record['beginning']}")
        refused = (record["before_refused"], record["after_refused"])
        entry = Flip(record["set"], record["id"], "\n".join(asked), record["before"], record["after"], *refused)
        if title := _group(entry):
            groups.setdefault(f"in contexts: {title}", []).append(entry)
    return {title: groups[title] for title in (f"in contexts: {name}" for name in _ORDER) if title in groups}


def disputed_groups(run: RunFolder) -> dict[str, list[Flip]]:
    """The prompts on whose answers another judge contradicts the opening phrases, by judge, and as that judge reads them.

    Raises:
        RunFolderError: what the judges said is damaged.
    """
    groups: dict[str, list[Flip]] = {}
    for judged in saved_judged(run):
        disputed = {(answer.set, answer.id) for answer in judged.disputed}
        title = f"{judged.judge} against opening phrases, as the {judged.judge} reads them"
        both: dict[tuple[str, str], dict[str, JudgedAnswer]] = {}
        for answer in judged.answers:
            both.setdefault((answer.set, answer.id), {})[answer.model] = answer
        for key, answers in both.items():
            if key in disputed:
                before, after = (answers[model] for model in MODELS)
                refused = (bool(before.verdict.refused), bool(after.verdict.refused))
                groups.setdefault(title, []).append(Flip(*key, before.prompt, before.answer, after.answer, *refused))
    return groups


_STILL, _LOST = "harmful, still answered", "harmful, answered now though refused before"
_CUT = "cut inside a thought, neither refused nor answered"
_ORDER = (
    _STILL,
    _LOST,
    "critical, refused now",
    "harmless, refused now",
    "twin, refused now",
    "borderline, refused now",
    "harmful, refused now",
    "harmless, no longer refused",
    "twin, no longer refused",
    "borderline, no longer refused",
    "critical, no longer refused",
    _CUT,
)


def _group(entry: Flip) -> str:
    if None in (entry.before_refused, entry.after_refused):
        return _CUT
    if entry.set == "harmful" and not entry.after_refused:
        return _LOST if entry.before_refused else _STILL
    if entry.before_refused == entry.after_refused:
        return ""
    return f"{entry.set}, {'refused now' if entry.after_refused else 'no longer refused'}"
