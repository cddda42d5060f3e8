"""Where a model comes from: a local folder or the model hub, checked before anything heavy is loaded or fetched."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safesteer_lite.errors import DiskSpaceError, ModelError
from safesteer_lite.events import Emit, Note, Progress

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
"""Architectures that the method has been made for: dense decoders whose blocks take and return the residual stream."""

CONNECT_SECONDS = 10.0
"""How long the model hub may take to answer before it counts as out of reach."""

_SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
_WEIGHTS = ("*.safetensors",)
# Some repositories hold the same weights twice, or other formats in folders of their own.
_UNWANTED = ("*/*", "consolidated*")
_FINGERPRINTED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "model.safetensors.index.json",
    "*.safetensors",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MIB = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: `SAFESTEER_LITE_CACHE`, else `safesteer-lite` in the platform's cache folder."""
    if chosen := os.environ.get("SAFESTEER_LITE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        platform_cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        platform_cache = Path.home() / "Library" / "Caches"
    else:
        platform_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return platform_cache / "safesteer-lite"


def resolve_model(
    name_or_path: str, revision: str | None, emit: Emit, *, download: bool = True, stage: str = "model"
) -> Path:
    """The folder of a model that this method can use, fetched from the model hub if need be.

    Code that a repository brings along is never fetched or run, and neither are pickled weights.

    Args:
        name_or_path: a local folder, or the id of a model on the hub, `owner/name`.
        revision: branch, tag or commit on the hub; None for its main branch.
        emit: takes one Note before a download, then its Progress in bytes.
        download: False to use only what this machine already has.
        stage: the name that the events carry.

    Raises:
        ModelError: the model is not there, may not be fetched, or cannot be used; the hint says what to do.
        DiskSpaceError: the download does not fit.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        raise ModelError(
            f"{path} is a GGUF file, and those cannot be trained.",
            "Give the model it was made from: its folder of safetensors, or its id on the model hub.",
        )
    if path.is_dir():
        check_folder(path)
        return path
    if path.exists() or not _HUB_ID.fullmatch(name_or_path):
        raise ModelError(
            f"{name_or_path} is neither a folder nor the id of a model.",
            "Give a folder with config.json and *.safetensors, or an id such as Qwen/Qwen2.5-0.5B-Instruct.",
        )
    with quiet_libraries():
        folder = _from_hub(name_or_path, revision, emit, stage) if download else _cached(name_or_path, revision)
    if folder is None:
        raise ModelError(f"{name_or_path} is not on this machine.", "Allow its download, or give a local folder.")
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a folder that lacks a part this method needs.

    Raises:
        ModelError: names the part that is missing and what to do about it.
    """
    check_architecture(folder)
    _check_tokenizer(folder)
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


def missing_weights(folder: Path) -> list[str]:
    """The weight files that `folder` should hold and does not; `*.safetensors` stands for all of them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(_read_json(index).get("weight_map", {}).values()))
        return [name for name in named if not (folder / name).is_file()]
    return [] if next(folder.glob("*.safetensors"), None) else ["*.safetensors"]


def check_architecture(folder: Path) -> None:
    """Refuse a model that this method has not been made for.

    Raises:
        ModelError: config.json is missing or damaged, or names another architecture; lists what is supported.
    """
    config = _read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    if any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        return
    found = ", ".join(architectures) or "no architecture"
    if "auto_map" in config:
        message = f"{folder.name} ({found}) needs Python code from its own repository, and such code is never run here."
    else:
        message = f"{folder.name} has {found}, which is not supported."
    raise ModelError(message, f"Supported are {', '.join(SUPPORTED_ARCHITECTURES)}.")


def model_fingerprint(folder: Path) -> str:
    """A SHA-256 (64 hex digits) that changes when the model does, cheap enough to take at every start.

    It covers the names and sizes of the configuration, tokenizer and weight files, the whole content of the small
    ones, and of each safetensors file the header (names, types, shapes and places of all tensors) and the first and
    last MiB. A change confined to the middle of a weight file goes unseen: this tells models apart, it does not guard
    against forgery. Other files, such as a model card, do not count.

    Raises:
        ModelError: a weight file is too damaged to have a header.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if _matches(path.name, _FINGERPRINTED) and path.is_file()):
        content = _weight_digest(path) if path.suffix == ".safetensors" else _whole_digest(path)
        digest.update(json.dumps([path.name, path.stat().st_size, content]).encode())
    return digest.hexdigest()


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Check the file system of `folder` (which need not exist yet) for `needed` free bytes.

    Raises:
        DiskSpaceError: says how much is there, how much is needed and for what.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskSpaceError(
            f"{purpose} needs {readable_size(needed)}, and {existing} has {readable_size(free)} free.",
            "Free some space, or point SAFESTEER_LITE_CACHE (for models of the hub: HF_HOME) at another disk.",
        )


def readable_size(size: int) -> str:
    """`size` bytes in decimal MB or GB, as download pages state it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers and huggingface_hub from drawing bars and printing advice; errors still raise."""
    from huggingface_hub import utils as hub
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    transformers_bars, transformers_verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub_bars, hub_verbosity = not hub.are_progress_bars_disabled(), hub_logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.disable_progress_bars()
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(transformers_verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if transformers_bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()


@contextmanager
def progress_by_growth(folder: Path, total: int, emit: Emit, stage: str, what: str) -> Iterator[None]:
    """Report a download by how much `folder` holds: it works for every downloader, and counts what a resume finds.

    Args:
        folder: where the download lands, at any depth.
        total: bytes expected in the end.
        what: what the Progress events say is counted.
    """
    finished = threading.Event()

    def report() -> None:
        emit(Progress(stage, what, min(folder_bytes(folder), total), total))

    def watch() -> None:
        while not finished.wait(0.5):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    report()


def folder_bytes(folder: Path) -> int:
    """The size of all files under `folder` in bytes; links do not count, and neither do files that vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total


def ask_hub(name: str, revision: str | None) -> Any:
    """What the model hub knows about a model; also the check that the hub can be reached.

    Raises:
        ModelError: the model is not there, or may not be seen.
        ConnectionError: the hub cannot be reached, or must not be (`HF_HUB_OFFLINE`).
    """
    import httpx
    from huggingface_hub import HfApi

    try:
        with _hub_refusals(name, revision):
            return HfApi().model_info(name, revision=revision, timeout=CONNECT_SECONDS, files_metadata=True)
    except (OSError, httpx.HTTPError) as error:
        raise ConnectionError(first_line(error)) from error


def first_line(error: Exception) -> str:
    """What an error says, without the pages of advice that some add."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def licence_of(info: Any) -> str:
    """The licence that a model's page on the hub states."""
    tags = (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:"))
    return next(tags, "not stated")


def _from_hub(name: str, revision: str | None, emit: Emit, stage: str) -> Path:
    """Fetch the small files, check them, and only then fetch the weights."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        info = ask_hub(name, revision)
    except ConnectionError as error:
        if (folder := _cached(name, revision)) is not None:
            emit(Note(stage, f"Using the copy of {name} on this machine: the model hub cannot be reached ({error})."))
            return folder
        raise ModelError(
            f"{name} is not a folder, not on this machine, and the model hub cannot be reached ({error}).",
            "Check the path, or connect and try again; with HF_HUB_OFFLINE set, nothing is fetched.",
        ) from error
    if (folder := _cached(name, info.sha)) is not None:
        return folder
    files = {entry.rfilename: entry.size or 0 for entry in info.siblings}
    wanted = {file: size for file, size in files.items() if _matches(file, (*_SETTINGS, *_WEIGHTS))}
    if not any(_matches(file, _WEIGHTS) for file in wanted):
        raise ModelError(
            f"{name} offers no safetensors, and pickled or GGUF weights are not read.",
            "Choose a repository that has *.safetensors.",
        )
    total = sum(wanted.values())
    require_space(Path(HF_HUB_CACHE), total, f"The download of {name}")
    emit(Note(stage, f"Fetching {name} from the model hub: {readable_size(total)}, licence {licence_of(info)}."))
    store = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        with _hub_refusals(name, revision), progress_by_growth(store, total, emit, stage, "bytes fetched"):
            settings = [file for file in wanted if _matches(file, _SETTINGS)]
            folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=settings))
            check_architecture(folder)
            _check_tokenizer(folder)
            return Path(snapshot_download(name, revision=info.sha, allow_patterns=list(wanted)))
    except (OSError, httpx.HTTPError) as error:
        raise ModelError(
            f"The download of {name} broke off: {first_line(error)}.",
            "Run the same command again: it goes on from there.",
        ) from error


def _cached(name: str, revision: str | None) -> Path | None:
    """The whole copy of a hub model that is on this machine, or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=[*_SETTINGS, *_WEIGHTS],
                ignore_patterns=list(_UNWANTED),
            )
        )
    except OSError:
        return None
    whole = (folder / "config.json").is_file() and not missing_weights(folder)
    return folder if whole else None


@contextmanager
def _hub_refusals(name: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's refusals into errors that say what to do."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: its owner wants its licence accepted first.",
            "Accept the licence on the model's page, then log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"There is no folder {name}, and no model of this name that the model hub shows you.",
            "Check the spelling; for a private model, log in with `hf auth login` or set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}.", "Name a branch, tag or commit it has.") from error


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt")):
        raise ModelError(
            f"{folder} has no tokenizer.", "Copy tokenizer.json and tokenizer_config.json next to the weights."
        )
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return
    settings = folder / "tokenizer_config.json"
    if not (settings.is_file() and _read_json(settings).get("chat_template")):
        raise ModelError(
            f"{folder} has no chat template, so it is a base model or its template was lost.",
            "Use the model's instruct or chat version, or copy its chat_template.jinja into the folder.",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} has no {path.name}, so it is not a model's folder.", "Check the path."
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON.", "Copy or download the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no settings.", "Copy or download the model again.")
    return content


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _UNWANTED)


def _whole_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _weight_digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        # A safetensors file opens with the length of its header, 8 bytes little-endian, then the header as JSON.
        header = int.from_bytes(stream.read(8), "little")
        if not 2 <= header <= size - 8:
            raise ModelError(f"{path} is damaged: it has no safetensors header.", "Copy or download the model again.")
        digest = hashlib.sha256(stream.read(header))
        digest.update(stream.read(_MIB))
        stream.seek(max(size - _MIB, 0))
        digest.update(stream.read(_MIB))
    return digest.hexdigest()
