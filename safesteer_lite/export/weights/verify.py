"""Prove that written weights are whole: what a converter silently accepts and a user meets as a broken model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ExportError
from safesteer_lite.export import drafts
from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.base import empty_model
from safesteer_lite.export.weights.shards import DTYPES, Checkpoint, NewTensor, StoredTensor
from safesteer_lite.runs.durable import read_bytes, sha256_of
from safesteer_lite.sources.folder import few
from safesteer_lite.sources.headers import FLOATS
from safesteer_lite.sources.settings import PICTURE, is_picture

SUMS = "SHA256SUMS"
_LARGEST_SUMS = 1 << 24
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class FailedCheck(ExportError):
    """What was written is not what it should be. The files may be kept to look at, and must not be used."""


@dataclass(frozen=True)
class FileReport:
    """What `check_files` found; every check passed.

    Attributes:
        architecture: the transformers class that loads the folder.
        files: how many weight files there are.
        tensors: how many tensors they hold.
        parameters: how many numbers those hold.
        size: bytes of weights.
        dtype: the type of the weight matrices, as safetensors writes it.
        vocabulary_rows: rows of the input embedding.
        tokenizer_length: the highest token id plus one.
    """

    architecture: str
    files: int
    tensors: int
    parameters: int
    size: int
    dtype: str
    vocabulary_rows: int
    tokenizer_length: int


def check_files(
    folder: Path,
    base_folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FileReport:
    """Check a merged model folder, one tensor at a time.

    Args:
        folder: what was written.
        base_folder: where its tokenizer and chat template come from; they must be the same bytes.
        progress: called with bytes read and bytes in all, after each tensor.

    Raises:
        FailedCheck: something is wrong; the message lists everything that is.
    """
    weights = shards.read_checkpoint(folder)
    config = shards.read_json(folder / "config.json")
    form = check_form(config, weights.tensors, folder, base_folder)
    problems = [*form.problems, *_broken_values(weights, progress)]
    if problems:
        raise FailedCheck(
            f"{folder} failed {len(problems)} of its checks: {'; '.join(problems)}.",
            "Do not use these weights; export again from a complete base model.",
        )
    parameters = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
    size = sum(tensor.size for tensor in weights.tensors.values())
    return FileReport(
        form.architecture,
        len(weights.shards),
        len(weights.tensors),
        parameters,
        size,
        form.dtype,
        form.vocabulary_rows,
        form.tokenizer_length,
    )


@dataclass(frozen=True)
class Form:
    """What a model folder is, or will be, but for the values of its weights.

    Attributes:
        architecture: the transformers class that loads it; empty if there is none.
        dtype: the type of the weight matrices, as safetensors writes it.
        vocabulary_rows: rows of the input embedding.
        tokenizer_length: the highest token id plus one.
        problems: what is wrong, a clause each.
    """

    architecture: str
    dtype: str
    vocabulary_rows: int
    tokenizer_length: int
    problems: tuple[str, ...]


def check_form(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor] | Mapping[str, NewTensor],
    words: Path,
    base_folder: Path | None = None,
) -> Form:
    """Check everything about a model folder that can be known without reading its weights.

    Args:
        config: its config.json.
        tensors: its tensors by name: those that lie there, or those that a merge will write.
        words: the folder with its tokenizer and chat template.
        base_folder: where those were copied from; they must be the same bytes.
    """
    problems: list[str] = []
    if "quantization_config" in config:
        problems.append("config.json still has a quantization_config")
    architecture = _check_architecture(config, problems)
    dtype = _check_dtype(tensors, config, problems)
    length, faults = check_words(words, base_folder)
    rows = _check_vocabulary(tensors, config, length, problems) if architecture else 0
    return Form(architecture, dtype, rows, length, (*problems, *faults))


def check_words(folder: Path, base_folder: Path | None = None) -> tuple[int, list[str]]:
    """Check a folder's tokenizer and chat template; arguments as in `check_form`.

    Returns:
        The highest token id plus one, and what is wrong, a clause each.
    """
    problems: list[str] = []
    length = _check_tokenizer(folder, base_folder, problems)
    _check_template(folder, base_folder, problems)
    return length, problems


def write_sums(folder: Path) -> Path:
    """Write SHA256SUMS for all files of a folder, as `sha256sum --check` reads it.

    Returns:
        The file written.
    """
    lines = [f"{value}  {name}\n" for name, value in sums_of(folder).items()]
    path = folder / SUMS
    drafts.write_text(path, "".join(lines))
    return path


def sums_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder but the sums, by its name with forward slashes."""
    return {name: sha256_of(folder / name) for name in _names(folder)}


def check_sums(folder: Path) -> int:
    """Check every file of a folder against its SHA256SUMS.

    Returns:
        How many files there are.

    Raises:
        ExportError: files were changed, are missing, or are not listed; the message names them all.
    """
    try:
        text = read_bytes(folder / SUMS, _LARGEST_SUMS).decode()
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder / SUMS} cannot be read: {error}.", "Name a folder that `export` wrote.") from error
    # Only line feeds end a line: names may hold what else Python would split at.
    matches = [_LINE.fullmatch(line.removesuffix("\r")) for line in text.split("\n") if line.strip()]
    if not matches or not all(matches):
        raise ExportError(f"{folder / SUMS} is not a list of SHA-256 sums.", "Export again.")
    counts = Counter(match[2] for match in matches if match)
    listed = {match[2]: match[1] for match in matches if match}
    present, odd = set(_names(folder)), _odd_entries(folder)
    problems = [f"{name} is listed {count} times" for name, count in sorted(counts.items()) if count > 1]
    # What a link leads to may change, or be another's, without a change in the folder.
    problems += [f"{name} is a link, or no file at all" for name in odd]
    problems += [f"{name} is missing" for name in sorted(listed.keys() - present - set(odd))]
    problems += [f"{name} is not listed" for name in sorted(present - listed.keys())]
    problems += [
        f"{name} has changed" for name in sorted(present & listed.keys()) if sha256_of(folder / name) != listed[name]
    ]
    if problems:
        raise ExportError(f"{folder} is not as it was written: {'; '.join(problems)}.", "Export again.")
    return len(listed)


def _check_architecture(config: Mapping[str, Any], problems: list[str]) -> str:
    """The architecture's name, or an empty string if transformers has no such class."""
    import transformers

    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    found = getattr(transformers, name, None) if name else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return name
    problems.append(f"config.json names the architecture {name!r}, which transformers does not have")
    return ""


def _broken_values(weights: Checkpoint, progress: Callable[[int, int], None]) -> list[str]:
    problems, done, total = [], 0, sum(tensor.size for tensor in weights.tensors.values())
    for tensor in weights.tensors.values():
        if tensor.dtype in FLOATS and not shards.is_finite(tensor.load()):
            problems.append(f"{tensor.name} holds NaN or infinite values")
        done += tensor.size
        progress(done, total)
    return problems


def _check_dtype(
    tensors: Mapping[str, StoredTensor] | Mapping[str, NewTensor], config: Mapping[str, Any], problems: list[str]
) -> str:
    """Matrices must have 16 bits and the configuration must say so; vectors may be wider, as some norms are."""
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) >= 2]
    counts: Counter[str] = Counter()
    odd: dict[str, list[str]] = {}
    for tensor in matrices:
        counts[tensor.dtype] += tensor.size
        if tensor.dtype not in ("BF16", "F16"):
            odd.setdefault(tensor.dtype, []).append(tensor.name)
    problems += [
        f"{few(sorted(names))} {'is' if len(names) == 1 else 'are'} stored as {dtype}" for dtype, names in odd.items()
    ]
    dtype = counts.most_common(1)[0][0] if counts else ""
    actual = str(DTYPES.get(dtype, "")).removeprefix("torch.")
    problems += [
        f"config.json says {key} = {config[key]}, and the weights are {actual or 'missing'}"
        for key in ("dtype", "torch_dtype")
        if key in config and config[key] != actual
    ]
    return dtype


def _check_tokenizer(folder: Path, base_folder: Path | None, problems: list[str]) -> int:
    """The highest token id plus one, over the vocabulary and all added tokens; 0 if there is no tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        problems.append("tokenizer.json is missing")
        return 0
    if base_folder is not None and not _same_bytes(path, base_folder / "tokenizer.json"):
        problems.append("tokenizer.json differs from the base model's")
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        ids = [index for token, index in found.items() if token != PICTURE]
    except Exception as error:  # The tokenizers library raises bare Exception for a malformed file.
        problems.append(f"tokenizer.json cannot be loaded ({error})")
        return 0
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        added = shards.read_json(settings).get("added_tokens_decoder", {})
        ids += [int(index) for index, token in added.items() if not is_picture(token)]
    return max(ids, default=-1) + 1


def _check_vocabulary(
    tensors: Mapping[str, StoredTensor] | Mapping[str, NewTensor],
    config: Mapping[str, Any],
    length: int,
    problems: list[str],
) -> int:
    """All parameters of the architecture present in their shapes, and one embedding row for each token."""
    try:
        model = empty_model(config)
    except ExportError as error:
        problems.append(error.message.rstrip("."))
        return 0
    # named_parameters lists a parameter that the model shares (a tied LM head) once, and once is how it is stored.
    expected = dict(model.named_parameters())
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"tensors are missing: {few(missing)}")
    for name, parameter in expected.items():
        stored = tensors.get(name)
        if stored is not None and stored.shape != tuple(parameter.shape):
            problems.append(f"{name} has shape {stored.shape}, and config.json asks for {tuple(parameter.shape)}")
    embedding = model.get_input_embeddings().weight
    name = next(name for name, parameter in expected.items() if parameter is embedding)
    rows = tensors[name].shape[0] if name in tensors else 0
    if 0 < rows < length:
        problems.append(f"{name} has {rows} rows for {length} tokens")
    return rows


def _check_template(folder: Path, base_folder: Path | None, problems: list[str]) -> None:
    template = chat_template(folder)
    if not template:
        problems.append("there is no chat template")
    elif base_folder is not None and template != chat_template(base_folder):
        problems.append("the chat template differs from the base model's")


def chat_template(folder: Path) -> bytes | None:
    """The template's bytes from where transformers would find it: its own file, then the tokenizer's configuration.

    Where a model has several by name, the one for plain conversations is called default.
    """
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_bytes()
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = shards.read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        elif isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template:
            return template.encode()
    return None


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _names(folder: Path) -> Iterator[str]:
    """All files below a folder but the sums, sorted, with forward slashes on every system; no links."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_plain_file(path))
    yield from sorted(name for name in files if name != SUMS)


def _odd_entries(folder: Path) -> list[str]:
    """Whatever lies below a folder and is neither a file nor a folder: links, pipes, devices."""
    odd = (path for path in folder.rglob("*") if path.is_symlink() or not (path.is_dir() or path.is_file()))
    return sorted(path.relative_to(folder).as_posix() for path in odd)


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
