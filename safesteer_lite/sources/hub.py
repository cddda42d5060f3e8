"""The model hub: what it knows about a model, what it refuses, and the local copy of what it offers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Emit, Note
from safesteer_lite.sources.download import readable_size, require_space
from safesteer_lite.sources.folder import UNWANTED, matches, missing_weights
from safesteer_lite.sources.settings import check_settings
from safesteer_lite.sources.transfer import CONNECT_SECONDS, Download, hub_store, offered_files

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

SOCKS = 'pip install "httpx[socks]"'
"""What makes a SOCKS proxy usable; the package for it does not come with the hub's client."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
_WEIGHTS = ("*.safetensors",)


def is_hub_id(name: str) -> bool:
    """Whether `name` is written as the hub writes its models: `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def fetch_model(
    name: str, revision: str | None, emit: Emit, stage: str, check: Callable[[Path], object] = check_settings
) -> Path:
    """The folder of a hub model: first the small files come and are checked, and only then the weights.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for the main branch.
        emit: takes one Note before a download, then its Progress in bytes.
        stage: the name that the events carry.
        check: raises a ModelError where the small files are not those of a model that can be used.

    Raises:
        ModelError: the model is not there, may not be fetched, or cannot be used.
        DiskSpaceError: the download does not fit.
    """
    import httpx

    try:
        info = ask_hub(name, revision)
    except ConnectionError as error:
        if (folder := cached_model(name, revision)) is not None:
            emit(Note(stage, f"Using the copy of {name} on this machine: the model hub cannot be reached ({error})."))
            return folder
        raise ModelError(
            f"{name} is not a folder, not on this machine, and the model hub cannot be reached ({error}).",
            "Check the path, or connect and try again; with HF_HUB_OFFLINE set, nothing is fetched.",
        ) from error
    if (folder := cached_model(name, info.sha)) is not None:
        _remember(name, revision, info.sha)
        return folder
    wanted = [file for file in offered_files(info).values() if matches(file.name, (*_SETTINGS, *_WEIGHTS))]
    if not any(matches(file.name, _WEIGHTS) for file in wanted):
        raise ModelError(
            f"{name} offers no safetensors, and pickled or GGUF weights are not read.",
            "Choose a repository that has *.safetensors.",
        )
    download = Download(name, info.sha, wanted, emit, stage)
    require_space(download.folder, download.missing, f"the download of {name}")
    size = readable_size(download.total)
    emit(Note(stage, f"Fetching {name} from the model hub: {size}, licence {licence_of(info)}."))
    try:
        with hub_refusals(name, revision):
            download.fetch([file.name for file in wanted if matches(file.name, _SETTINGS)])
            check(download.folder)
            download.fetch()
    except (OSError, httpx.HTTPError) as error:
        raise ModelError(
            f"The download of {name} broke off: {first_line(error)}.",
            "Run the same command again: it goes on from there.",
        ) from error
    _remember(name, revision, info.sha)
    return download.folder


def _remember(name: str, revision: str | None, commit: str) -> None:
    """Note which commit a branch or tag is now, so that its copy is found when the hub cannot be reached."""
    if revision == commit:
        return
    note = hub_store(name) / "refs" / (revision or "main")
    # Only a convenience: a cache that cannot be written to says so where a file is written.
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit)


def commit_of(folder: Path) -> str:
    """The commit of the hub that a folder of its cache holds; empty for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else ""


def cached_model(name: str, revision: str | None) -> Path | None:
    """The whole copy of a hub model that is on this machine, or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=[*_SETTINGS, *_WEIGHTS],
                ignore_patterns=list(UNWANTED),
            )
        )
    except OSError:
        return None
    whole = (folder / "config.json").is_file() and not missing_weights(folder)
    return folder if whole else None


def ask_hub(name: str, revision: str | None) -> Any:
    """What the model hub knows about a model; also the check that the hub can be reached.

    Raises:
        ModelError: the model is not there, or may not be seen.
        ConnectionError: the hub cannot be reached, or must not be (`HF_HUB_OFFLINE`).
    """
    import httpx
    from huggingface_hub import HfApi

    try:
        with hub_refusals(name, revision):
            info = HfApi().model_info(name, revision=revision, timeout=CONNECT_SECONDS, files_metadata=True)
    except ImportError as error:
        # Only a SOCKS proxy needs a package that is not there.
        raise ConnectionError(f"a SOCKS proxy is set, which needs one more package: {SOCKS}") from error
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionError(first_line(error).rstrip(".")) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConnectionError(
            "what answered in its place is no model hub, such as the log-in page of a network or a proxy"
        ) from error
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ConnectionError("it does not say which commit it offers")
    return info


def first_line(error: BaseException) -> str:
    """What an error says, without the pages of advice that some add."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def licence_of(info: ModelInfo) -> str:
    """The licence that a model's page on the hub states."""
    tags = (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:"))
    return next(tags, "not stated")


@contextmanager
def hub_refusals(name: str, revision: str | None) -> Iterator[None]:
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
