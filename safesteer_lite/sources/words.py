"""The words of a model: its tokenizer and its chat template, or another template that the user gives."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from safesteer_lite.errors import ModelError
from safesteer_lite.runs import durable
from safesteer_lite.sources.download import cache_folder
from safesteer_lite.sources.folder import matches

WORDS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""The small files of a model's folder, without its chat template."""

TEMPLATE = "chat_template.jinja"
"""What a chat template is called in a model's folder, and in that of a run that was given one."""

# The longest template of a model has some tens of kilobytes.
_LARGEST_TEMPLATE = 1_000_000
_ANOTHER = "Name a file that holds a chat template in Jinja, such as a model's chat_template.jinja."


def read_template(path: Path) -> str:
    """A chat template that the user gives.

    Raises:
        ModelError: the file cannot be read, or holds no text.
    """
    try:
        template = durable.read_bytes(path, _LARGEST_TEMPLATE).decode("utf-8-sig")
    except (OSError, MemoryError, ValueError) as error:
        why = getattr(error, "strerror", None) or ("it is no text" if isinstance(error, UnicodeError) else str(error))
        raise ModelError(f"The chat template {path} cannot be read ({why}).", _ANOTHER) from error
    if not template.strip():
        raise ModelError(f"The chat template {path} is empty.", _ANOTHER)
    return template


def words_of(folder: Path, template: str) -> Path:
    """The folder with a model's tokenizer and chat template: its own, or a copy of the small files with another template.

    Args:
        folder: where the model lies, which stays as it is.
        template: the chat template to take in place of the model's own; empty for that one.

    Raises:
        ModelError: the copy cannot be written.
    """
    if not template:
        return folder
    places = cache_folder() / "words"
    draft = places / f".{uuid.uuid4().hex}"
    try:
        files = sorted(path for path in folder.iterdir() if matches(path.name, WORDS) and path.is_file())
        digest = hashlib.sha256(template.encode())
        for path in files:
            digest.update(f"{path.name} {durable.sha256_of(path)}\n".encode())
        place = places / digest.hexdigest()[:32]
        if (place / TEMPLATE).is_file():
            return place
        draft.mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, draft / path.name)
        _forget_own(draft / "tokenizer_config.json")
        (draft / TEMPLATE).write_bytes(template.encode())
        # Whoever was faster has written the same.
        with suppress(OSError):
            draft.rename(place)
        if not (place / TEMPLATE).is_file():
            raise OSError(f"{place} is there and holds something else")
    except OSError as error:
        raise ModelError(
            f"The tokenizer of {folder} cannot be copied to {places} ({error.strerror or error}).",
            "Free some space, or point SAFESTEER_LITE_CACHE at another disk.",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def _forget_own(path: Path) -> None:
    """Take a template of the model's own out of its tokenizer's settings: readers differ in which of two they take."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        settings = durable.parse_json(path.read_bytes())
        if settings.pop("chat_template", None):
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
