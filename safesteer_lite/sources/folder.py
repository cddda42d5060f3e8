"""A model's folder: what must lie in it before this method can use it."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
"""Architectures that the method has been made for: dense decoders whose blocks take and return the residual stream."""

UNWANTED = ("*/*", "consolidated*")
"""Files that never count: some repositories hold the same weights twice, or other formats in folders of their own."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that lacks a part this method needs.

    Raises:
        ModelError: names the part that is missing and what to do about it.
    """
    check_architecture(folder)
    check_tokenizer(folder)
    missing = missing_weights(folder)
    if missing == ["*.safetensors"] and any(
        next(folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
    ):
        raise ModelError(
            f"{folder} has only pickled weights, and opening those can run code that somebody hid in them.",
            "Convert them to safetensors on a machine where you trust them, or take a copy that has safetensors.",
        )
    if missing:
        raise ModelError(f"{folder} lacks weights: {', '.join(missing)}.", "Copy or download the model again.")
    check_weights(folder)


def missing_weights(folder: Path) -> list[str]:
    """The weight files that `folder` should hold and does not; `*.safetensors` stands for all of them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(read_json(index).get("weight_map", {}).values()))
        return [name for name in named if not (folder / name).is_file()]
    return [] if next(folder.glob("*.safetensors"), None) else ["*.safetensors"]


def check_weights(folder: Path) -> None:
    """Refuse weight files that are not whole, such as those of a download that broke off; reads their headers only.

    Raises:
        ModelError: names the file.
    """
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        if not matches(path.name, ("*.safetensors",)):
            continue
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged or was not copied to its end ({error}).", "Copy or download the model again."
            ) from error


def check_architecture(folder: Path) -> None:
    """Refuse a model that this method has not been made for.

    Raises:
        ModelError: config.json is missing or damaged, or names another architecture; lists what is supported.
    """
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    if any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        return
    found = ", ".join(architectures) or "no architecture"
    if "auto_map" in config:
        message = f"{folder.name} ({found}) needs Python code from its own repository, and such code is never run here."
    else:
        message = f"{folder.name} has {found}, which is not supported."
    raise ModelError(message, f"Supported are {', '.join(SUPPORTED_ARCHITECTURES)}.")


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a tokenizer or a chat template.

    Raises:
        ModelError: says which of them is missing and where to get it.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt")):
        raise ModelError(
            f"{folder} has no tokenizer.", "Copy tokenizer.json and tokenizer_config.json next to the weights."
        )
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return
    settings = folder / "tokenizer_config.json"
    if not (settings.is_file() and read_json(settings).get("chat_template")):
        raise ModelError(
            f"{folder} has no chat template, so it is a base model or its template was lost.",
            "Use the model's instruct or chat version, or copy its chat_template.jinja into the folder.",
        )


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name fits one of the `patterns` (as in a shell) and none of `UNWANTED`."""
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in UNWANTED)


def read_json(path: Path) -> dict[str, Any]:
    """One of the JSON files of a model's folder.

    Raises:
        ModelError: it is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} has no {path.name}, so it is not a model's folder.", "Check the path."
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON.", "Copy or download the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no settings.", "Copy or download the model again.")
    return content
