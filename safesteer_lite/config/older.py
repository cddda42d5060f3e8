"""What older files of settings have: names that changed, settings that are there no longer, and some that they lack."""

from __future__ import annotations

from safesteer_lite.config import constants

RENAMED = {"direction.strengths": "direction.steering_strengths"}
"""Older names, which run folders and people's own files still have."""

FORMER: dict[str, bool | int | float] = {
    "direction.depth_limit": constants.DEPTH_LIMIT,
    "direction.teacher_tokens": constants.TEACHER_TOKENS,
    "distill.top_k": constants.TOP_K,
    "evaluate.stop_on_tax": False,
    "export.check_prompts": constants.CHECK_PROMPTS,
}
"""Settings that became constants, with the value that every run has now. Older files that have it may keep it."""

ADDED: dict[str, str | int | float] = {
    "model.thinking": "auto",
    "model.thinking_tokens": 512,
    "direction.source": "",
    "direction.teacher": "steered",
    "direction.contrast": "requests",
    "distill.twins": 0,
    "distill.reading_unread": 0.0,
}
"""Settings that came later, with the value at which a run does what it did before there were any."""

_GONE = {
    "distill.first_layer": "became distill.depth_start, a share of the depth: divide by the model's number of blocks"
}


def why_not(name: str, value: object) -> str | None:
    """Why a setting of an older file cannot be taken, as the end of a sentence that begins with its name.

    Args:
        name: dotted.
        value: as it was written, in TOML or as text.

    Returns:
        None for a name that was never that of a setting, and empty for a value that every run has now.
    """
    if name in _GONE:
        return _GONE[name]
    if name not in FORMER:
        return None
    if str(value).strip().lower() == str(FORMER[name]).lower():
        return ""
    return (
        f"is {str(FORMER[name]).lower()} in every run now and can no longer be set: leave it out, or go on with the "
        "version that the file was written by"
    )


def former_settings(section: str) -> dict[str, bool | int | float]:
    """The former settings of a section by their names in it; what depended on them depends on their values still."""
    return {name.partition(".")[2]: value for name, value in FORMER.items() if name.startswith(f"{section}.")}


def is_as_before(section: str, key: str, value: object) -> bool:
    """Whether a setting came later, and does nothing at this value: what was done without it would be done again so."""
    return ADDED.get(f"{section}.{key}") == value
