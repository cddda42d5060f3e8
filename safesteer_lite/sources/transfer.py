"""Files from the model hub to its cache on this machine: a break costs nothing, and what stays is what the hub vouches for.

The hub's own client begins every broken file anew, under a new name each time. Here a file's beginning is kept under one
name, and the next attempt asks for the rest only. A file joins the cache, in the client's own layout, once its hash is the
one that the hub states.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safesteer_lite.errors import DiskSpaceError, ModelError
from safesteer_lite.events import Emit, Progress
from safesteer_lite.runs.durable import sha256_of
from safesteer_lite.sources.download import alone

if TYPE_CHECKING:
    import httpx
    from huggingface_hub import ModelInfo

CONNECT_SECONDS = 10.0
"""How long the model hub may take to answer before it counts as out of reach."""

PAUSE_SECONDS = 1.0
"""How long to wait before a broken connection is tried again."""

_SILENT_SECONDS = 60.0
_TRIES = 5
_ABANDONED_SECONDS = 600.0
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class HubFile:
    """A file that the model hub offers.

    Attributes:
        name: its name in the repository.
        size: bytes.
        digest: in hexadecimal, the SHA-256 of a large file, or the SHA-1 that git has for a small one, by which the cache
            calls it too; empty where the hub states neither.
    """

    name: str
    size: int
    digest: str


def offered_files(info: ModelInfo) -> dict[str, HubFile]:
    """Every file of a repository by its name, as the hub's answer lists them."""
    files = {}
    for entry in info.siblings or ():
        digest = (entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""
        known = digest if entry.size is not None and _HASH.fullmatch(digest) else ""
        files[entry.rfilename] = HubFile(entry.rfilename, entry.size or 0, known)
    return files


def hub_store(repository: str) -> Path:
    """Where the hub's client keeps a repository on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def partial_file(repository: str, digest: str) -> Path:
    """Where the beginning of a file is kept until the rest has come."""
    return hub_store(repository) / "blobs" / f"{digest}.incomplete"


class Download:
    """Some files of one commit of a repository, on their way to the cache.

    Args:
        repository: `owner/name`.
        commit: 40 hexadecimal digits.
        files: what to fetch.
        emit: takes Progress in bytes, at most twice a second: what is here already counts, and nothing else does.
        stage: the name that the events carry.
    """

    def __init__(self, repository: str, commit: str, files: Sequence[HubFile], emit: Emit, stage: str) -> None:
        self.repository, self.commit, self.files = repository, commit, files
        self._emit, self._stage, self._told = emit, stage, 0.0
        self.folder = hub_store(repository) / "snapshots" / commit
        self._here = {file.name: self._bytes_here(file) for file in files}
        self.total = sum(file.size for file in files)

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return self.total - sum(self._here.values())

    def fetch(self, names: Sequence[str] | None = None) -> None:
        """Fetch all files, or those of these names.

        Raises:
            ModelError: what came is not what the hub states, or cannot be written.
            DiskSpaceError: the disk ran full.
            OSError, httpx.HTTPError: the hub refused, or the connection broke and could not be had again; what has come
                is kept, and the next call goes on from there.
        """
        for file in self.files:
            if names is None or file.name in names:
                self._fetch(file)
                self._count(file, file.size)
        self._tell()

    def _bytes_here(self, file: HubFile) -> int:
        if (self.folder / file.name).is_file():
            return file.size
        partial = partial_file(self.repository, file.digest)
        return min(max(_size(partial.with_suffix("")), _size(partial)), file.size) if file.digest else 0

    def _count(self, file: HubFile, size: int) -> None:
        self._here[file.name] = size
        if time.monotonic() - self._told >= 0.5:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._emit(Progress(self._stage, "bytes fetched", self.total - self.missing, self.total))

    def _fetch(self, file: HubFile) -> None:
        from huggingface_hub import hf_hub_download

        place = self.folder / file.name
        if place.is_file():
            return
        if not file.digest:
            hf_hub_download(self.repository, file.name, revision=self.commit, etag_timeout=CONNECT_SECONDS)
            return
        partial = partial_file(self.repository, file.digest)
        blob = partial.with_suffix("")
        store = hub_store(self.repository)
        # The lock of the hub's own client, so that neither fetches what the other is fetching.
        lock = store.parent / ".locks" / store.name / f"{file.digest}.lock"
        with _writing(blob):
            for folder in (lock.parent, blob.parent, place.parent):
                folder.mkdir(parents=True, exist_ok=True)
        with alone(lock, self._emit, self._stage, f"Another process is fetching {file.name}; waiting for it."):
            if place.is_file():
                return
            _remove_abandoned(blob)
            if _size(blob) != file.size or not blob.exists():
                self._fetch_whole(file, partial)
                with _writing(blob):
                    partial.replace(blob)
            with _writing(place):
                _give_name(blob, place)

    def _fetch_whole(self, file: HubFile, partial: Path) -> None:
        """Bring a file to its end, and see that it is the right one.

        Where it is not and its beginning is of an earlier attempt, that may be at fault, and the file is fetched anew.
        """
        earlier = min(_size(partial), file.size)
        while True:
            self._fetch_rest(file, partial)
            if _digest(partial, file) == file.digest:
                return
            with _writing(partial):
                partial.unlink()
            self._count(file, 0)
            if not earlier:
                raise ModelError(
                    f"{file.name} of {self.repository} arrived damaged: its hash is not the one that the model hub states.",
                    "Try again; if it happens again, something on the way changes what is sent.",
                )
            earlier = 0

    def _fetch_rest(self, file: HubFile, partial: Path) -> None:
        import httpx

        with _writing(partial), partial.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
        failures = 0
        while (before := _size(partial)) < file.size:
            try:
                self._receive(file, partial, before)
            except httpx.TransportError:
                failures = 1 if _size(partial) > before else failures + 1
                if failures == _TRIES:
                    raise
                time.sleep(PAUSE_SECONDS)
        with _writing(partial), partial.open("r+b") as out:
            os.fsync(out.fileno())

    def _receive(self, file: HubFile, partial: Path, before: int) -> None:
        """Ask once for what is missing, and keep what comes.

        Raises:
            httpx.TransportError: the connection broke, or the answer ended too early.
        """
        import httpx
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        # Only uncompressed content can be continued at a place.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if before:
            headers["Range"] = f"bytes={before}-"
        address = hf_hub_url(self.repository, file.name, revision=self.commit)
        waits = httpx.Timeout(_SILENT_SECONDS, connect=CONNECT_SECONDS)
        with get_session().stream("GET", address, headers=headers, timeout=waits, follow_redirects=True) as answer:
            if answer.status_code in (408, 429) or answer.status_code >= 500:
                raise httpx.ReadError(f"the model hub answered {answer.status_code} {answer.reason_phrase}".rstrip())
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            check_no_page(answer, file.name)
            goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {before}-")
            with _writing(partial):
                out = partial.open("ab" if answer.status_code == 206 and goes_on else "wb")
            with out:
                for block in answer.iter_bytes():
                    with _writing(partial):
                        out.write(block)
                        out.flush()
                    self._count(file, min(out.tell(), file.size))
                    if out.tell() > file.size:
                        return  # Its hash will tell that it is not the file.
                if out.tell() <= before:
                    raise httpx.ReadError("the model hub sent nothing more")


def check_no_page(answer: httpx.Response, wanted: str) -> None:
    """Refuse a web page in place of what was asked for: the log-in page of a network, or a proxy's message.

    Args:
        answer: of which only the headers are read.
        wanted: what was asked for.

    Raises:
        ModelError: it is one.
    """
    if answer.headers.get("Content-Type", "").lower().startswith(("text/html", "application/xhtml")):
        raise ModelError(
            f"A web page came in place of {wanted}: something between this machine and the model hub answers for it.",
            "Open a page in a browser to see whether this network wants a log-in, and check HF_ENDPOINT and the proxy.",
        )


def _digest(path: Path, file: HubFile) -> str:
    """The hash of what lies at `path`, of the kind that is stated for `file`."""
    if len(file.digest) == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove_abandoned(blob: Path) -> None:
    """Remove what killed processes of the hub's client left of a file; each has a name of its own, and none goes on."""
    for path in blob.parent.glob(f"{blob.name}.*.incomplete"):
        # Some file systems give everybody the lock; what still grows is somebody's.
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            path.unlink(missing_ok=True)


def _give_name(blob: Path, place: Path) -> None:
    """Give a file of the cache its name in a snapshot, by a link where the system makes links."""
    place.unlink(missing_ok=True)  # A link to a file that is gone.
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:
        blob.replace(place)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the file system, told apart from those of the network, which are OSErrors too."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskSpaceError(
                f"The disk ran full while {path} was written.",
                "Free some space, or point HF_HOME at another disk, then run the same command again: it goes on from there.",
            ) from error
        raise ModelError(
            f"{path} cannot be written: {error.strerror or error}.",
            "Make its folder one that you may write to, or point HF_HOME at another.",
        ) from error
