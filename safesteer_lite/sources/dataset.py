"""One public file at a fixed commit, of GitHub or the model hub: fetched when asked for, kept, and known by its checksum."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safesteer_lite.errors import PromptError
from safesteer_lite.events import Emit, Note, Progress
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.sources.download import alone, cache_folder, quiet_hub, readable_size, require_space
from safesteer_lite.sources.hub import first_line
from safesteer_lite.sources.transfer import CONNECT_SECONDS, check_no_page

GITHUB = "https://raw.githubusercontent.com"
"""Where GitHub hands out single files."""

LARGEST = 256 << 20
"""Bytes of a file of prompts, far beyond any that is known."""

_SILENT_SECONDS = 60.0
_PIECE = 1 << 20
"""Bytes of a download between two reports of its progress."""


@dataclass(frozen=True)
class PinnedFile:
    """A file that never changes.

    Attributes:
        host: `github`, or `hub` for a data set of the model hub.
        repository: `owner/name`.
        commit: 40 hexadecimal digits.
        path: in the repository.
        sha256: of its content, in hexadecimal; empty where it is not known, and the commit alone vouches for it.
        licence: what its owner states.
        given_by: the option with which a user names the file that he has.
    """

    host: Literal["github", "hub"]
    repository: str
    commit: str
    path: str
    sha256: str
    licence: str
    given_by: str = "--suite-file"

    @property
    def address(self) -> str:
        """The page of its repository."""
        home = "github.com" if self.host == "github" else "huggingface.co/datasets"
        return f"https://{home}/{self.repository}"

    @property
    def have_it(self) -> str:
        """What to do without a download."""
        return f"If you have the file, name it with {self.given_by}."

    def __str__(self) -> str:
        where = "" if self.host == "github" else " on the model hub"
        return f"{self.repository}{where} at {self.commit[:7]}"


def fetch_pinned(file: PinnedFile, emit: Emit, stage: str) -> Path:
    """The file on this machine, fetched once.

    Args:
        file: which one.
        emit: takes one Note with size and licence before the content is fetched, and the progress of a large one.
        stage: the name that the events carry.

    Raises:
        PromptError: it cannot be had, or what came is not the file.
        DiskSpaceError: there is no room for it.
    """
    home = cache_folder() / "suites"
    place = home / file.repository.replace("/", "--") / file.commit / Path(file.path).name
    if place.is_file() and (not file.sha256 or sha256_of(place) == file.sha256):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with alone(home / "lock", emit, stage, "Another process is fetching such a file; waiting for it."):
            draft = place.with_name(f"{place.name}.part")
            draft.write_bytes(_fetch(file, place.parent, emit, stage))
            draft.replace(place)
    except OSError as error:
        raise PromptError(
            f"{place} cannot be written: {error.strerror or error}.", "Point SAFESTEER_LITE_CACHE elsewhere."
        ) from error
    return place


def _fetch(file: PinnedFile, folder: Path, emit: Emit, stage: str) -> bytes:
    """The content, compared with its checksum."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise PromptError(
            f"{file} is not on this machine, and with HF_HUB_OFFLINE set nothing is fetched.", file.have_it
        )
    address, headers = _request(file)
    waits = httpx.Timeout(_SILENT_SECONDS, connect=CONNECT_SECONDS)
    try:
        with httpx.stream("GET", address, headers=headers, timeout=waits, follow_redirects=True) as answer:
            _check_answer(file, answer)
            size = int(answer.headers.get("Content-Length", 0))
            require_space(folder, size, f"the file of {file}")
            told = readable_size(size) if size >= 1e6 else f"{size / 1e3:.0f} kB" if size else "size not stated"
            emit(Note(stage, f"Fetching {Path(file.path).name} of {file}: {told}, licence {file.licence}."))
            content, reported = bytearray(), 0
            for block in answer.iter_bytes():
                content += block
                if len(content) > LARGEST:
                    raise PromptError(f"What comes in place of {file} does not end.", file.have_it)
                if len(content) - reported >= _PIECE:
                    reported = len(content)
                    emit(Progress(stage, "bytes fetched", reported, max(size, reported)))
    except (httpx.HTTPError, httpx.InvalidURL, ImportError) as error:
        raise PromptError(
            f"{file} cannot be fetched: {first_line(error).rstrip('.')}.", f"Connect and try again. {file.have_it}"
        ) from error
    if file.sha256 and hashlib.sha256(content).hexdigest() != file.sha256:
        raise PromptError(
            f"What came in place of {file} is not the file that is meant: its checksum differs.",
            "Try again; if it happens again, something on the way changes what is sent.",
        )
    return bytes(content)


def _request(file: PinnedFile) -> tuple[str, dict[str, str]]:
    """Where a file lies, and what is sent along; the hub's log-in goes to the hub alone."""
    if file.host == "github":
        return f"{GITHUB}/{file.repository}/{file.commit}/{file.path}", {}
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    with quiet_hub():
        address = hf_hub_url(file.repository, file.path, repo_type="dataset", revision=file.commit)
        return address, build_hf_headers()


def _check_answer(file: PinnedFile, answer: Any) -> None:
    """Refuse what is no file.

    Raises:
        PromptError: the server refused, or a web page came.
    """
    if answer.status_code in (401, 403):
        raise PromptError(
            f"{file} is handed out only to those who accept its licence.",
            f"Accept it on the data set's page, then log in with `hf auth login` or set HF_TOKEN. {file.have_it}",
        )
    if answer.is_error:
        raise PromptError(
            f"{file} cannot be fetched: the server answers {answer.status_code} {answer.reason_phrase}.", file.have_it
        )
    check_no_page(answer, str(file))
