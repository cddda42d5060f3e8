"""The weights of a model's folder: where each tensor lies, whether they are those that config.json describes, and finite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ModelError
from safesteer_lite.hardware.shape import ModelShape
from safesteer_lite.runs import durable
from safesteer_lite.sources.folder import AGAIN, INDEX, WEIGHTS, Findings, brief, few, read_json, weight_files

_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
"""The types of numbers that weights may be, as safetensors names them."""
LARGEST_HEADER = 100_000_000
_CHUNK = 1 << 25

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
# What bitsandbytes stores beside a 4-bit weight.
_STATISTIC = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")
# Computed by every version of the libraries, and stored by old ones.
_COMPUTED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
_COMPILED = "_orig_mod."


@dataclass(frozen=True)
class Stored:
    """One tensor where it lies.

    Attributes:
        dtype: as safetensors writes it, such as `BF16`.
        shape: its sizes.
        file: the weight file.
        start: where its first byte lies in the file.
        size: bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


Tensors = Mapping[str, Stored]


def read_tensors(folder: Path, findings: Findings) -> Tensors:
    """Where each tensor of a model's folder lies, from the headers alone; empty where that cannot be known.

    Args:
        folder: where the model lies.
        findings: takes what is wrong with its weight files.
    """
    before = len(findings.problems)
    _check_strangers(folder, findings)
    names = weight_files(folder, findings)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        findings.add(f"it lacks weights: {few(missing)}", AGAIN)
    if not names and len(findings.problems) == before:
        _tell_no_weights(folder, findings)
    tensors: dict[str, Stored] = {}
    whole = bool(names) and not missing
    for name in names:
        if name in missing:
            continue
        try:
            found = read_header(folder / name)
        except (OSError, MemoryError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "out of memory"
            findings.add(f"{name} cannot be read ({why})", AGAIN)
            whole = False
        except ValueError as error:
            why = f": {error}" if str(error) else ""
            findings.add(f"{name} is damaged or was not copied to its end{why}", AGAIN)
            whole = False
        else:
            twice = sorted(tensors.keys() & found.keys())
            if twice:
                findings.add(f"{few(twice)} is stored twice, in {name} and in {tensors[twice[0]].file.name}", AGAIN)
            tensors.update(found)
    if not whole:
        return {}
    _check_index(folder, tensors, findings)
    return tensors


def _check_strangers(folder: Path, findings: Findings) -> None:
    """Weights that would be loaded besides, or in place of, those that are meant."""
    if (folder / "adapter_config.json").exists():
        findings.add(
            "adapter_config.json lies in it, and libraries would load that adapter along with the model",
            "Merge that adapter into the weights first, or move its files out of the folder.",
        )
    if (folder / INDEX).exists() and (folder / WEIGHTS).exists():
        index = read_json(folder, INDEX, Findings(folder))
        places = (index or {}).get("weight_map")
        if isinstance(places, dict) and set(map(str, places.values())) != {WEIGHTS}:
            findings.add(
                f"it has both {WEIGHTS} and an index of other files, and tools differ in which they load",
                "Move the older of the two out of the folder.",
            )


def _tell_no_weights(folder: Path, findings: Findings) -> None:
    if any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")):
        findings.add(
            "it has only pickled weights, and opening those can run code that somebody hid in them",
            "Convert them to safetensors on a machine where you trust them, or take a copy that has safetensors.",
        )
        return
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    there = f"; {few(others)} is there, which libraries do not look for" if others else ""
    findings.add(f"it lacks weights: {WEIGHTS}, or its parts with {INDEX}{there}", AGAIN)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name, from its header alone.

    Raises:
        OSError, MemoryError: it cannot be read, or is no regular file.
        ValueError: it is no whole safetensors file; the message says why, or is empty.
    """
    with durable.open_regular(path) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        # The file opens with the length of its header, 8 bytes little-endian; the header is JSON.
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise ValueError("it has no safetensors header")
        header = durable.parse_json(stream.read(length))
    try:
        header.pop("__metadata__", None)
        tensors = {name: _stored(entry, path, 8 + length) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError):
        raise ValueError from None
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.size)):
        if stored.start != end:
            raise ValueError("its tensors do not follow each other")
        end += stored.size
    if end != size:
        raise ValueError(f"it has {size:,} bytes instead of {end:,}")
    return tensors


def _stored(entry: Any, path: Path, base: int) -> Stored:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)) or not isinstance(
        dtype, str
    ):
        raise TypeError
    if dtype in _BYTES and end - begin != math.prod(shape) * _BYTES[dtype]:
        raise ValueError("a tensor has another size than its shape")
    return Stored(dtype, shape, path, base + begin, end - begin)


def _check_index(folder: Path, tensors: Tensors, findings: Findings) -> None:
    """What the index names must be stored: what is not would be made up at random."""
    index = read_json(folder, INDEX, Findings(folder))
    if index is None:
        return
    places: dict[str, str] = index["weight_map"]
    lost = sorted(name for name, file in places.items() if name not in tensors or tensors[name].file.name != file)
    if lost:
        findings.add(f"{INDEX} names {few(lost)}, and the file that should hold it does not", AGAIN)
    unlisted = sorted(tensors.keys() - places.keys())
    if unlisted:
        findings.add(f"{INDEX} does not name {few(unlisted)}, which its files hold", AGAIN)


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model of one of the supported families, with its shape."""
    found = {"model.embed_tokens.weight": (shape.vocabulary, shape.width), "model.norm.weight": (shape.width,)}
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocabulary, shape.width)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if shape.block_norms == 4:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        for name, (inputs, outputs) in shape.linears.items():
            found[f"{block}{name}.weight"] = (outputs, inputs)
            if shape.has_bias(name):
                found[f"{block}{name}.bias"] = (outputs,)
        for name in norms:
            found[f"{block}{name}.weight"] = (shape.width,)
        for name in ("q_norm", "k_norm") if shape.head_norms else ():
            found[f"{block}self_attn.{name}.weight"] = (shape.head_dim,)
    return found


def check_tensors(tensors: Tensors, shape: ModelShape, quantised: bool, findings: Findings) -> None:
    """Compare what is stored with what config.json describes, before anything is built from it.

    A library would make up what is missing at random, and leave out without a word what it does not expect.

    Args:
        tensors: what is stored.
        shape: what config.json describes.
        quantised: whether config.json says that the weights are in 4 bits.
        findings: takes what differs.
    """
    if any(name.startswith(_COMPILED) for name in tensors):
        findings.add(
            f"the names of its tensors begin with {_COMPILED}, which torch.compile puts there",
            "Save the model again from before it was compiled.",
        )
        return
    packed = {match[1] for match in map(_STATISTIC.fullmatch, tensors) if match and match[1] in tensors}
    if quantised != bool(packed):
        says, are = ("4 bits", "in full") if quantised else ("16 bits", "in 4 bits")
        findings.add(
            f"config.json says that its weights are stored in {says}, and they are stored {are}",
            "Remove quantization_config from config.json, if the weights are the right ones."
            if quantised
            else "Take config.json from where the weights come from.",
        )
        return
    stored_layers = 1 + max((int(match[1]) for match in map(_LAYER.match, tensors) if match), default=-1)
    if stored_layers != shape.layers:
        findings.add(f"config.json says that it has {shape.layers} layers, and its weights have {stored_layers}", AGAIN)
        return
    expected = expected_tensors(shape)
    if missing := sorted(expected.keys() - tensors.keys()):
        findings.add(f"its weights lack {few(missing)}", AGAIN)
    # A shared matrix may be stored under both of its names.
    known = (_STATISTIC, _COMPUTED, re.compile(r"lm_head\.weight" if shape.tied else "(?!)"))
    others = tensors.keys() - expected.keys()
    if unknown := sorted(name for name in others if not any(pattern.fullmatch(name) for pattern in known)):
        findings.add(f"its weights hold {few(unknown)}, which config.json has no place for", AGAIN)
    both = sorted(expected.keys() & tensors.keys())
    differing = [name for name in both if not _fits(tensors[name], expected[name], name in packed)]
    if differing:
        name, stored = differing[0], tensors[differing[0]]
        has = f"holds {2 * stored.size} values in 4 bits" if name in packed else f"has the shape {_sizes(stored.shape)}"
        more = f", and so {len(differing) - 1} more" if len(differing) > 1 else ""
        findings.add(f"{name} {has}, and config.json asks for {_sizes(expected[name])}{more}", AGAIN)
    odd = sorted({tensors[name].dtype for name in both if name not in packed and tensors[name].dtype not in FLOATS})
    if odd:
        findings.add(
            f"its weights are stored as {few(odd)}, and only those of 16 and 32 bits and of bitsandbytes 4-bit can be trained",
            "Use the 16-bit model that it was made from.",
        )


def _fits(stored: Stored, shape: tuple[int, ...], packed: bool) -> bool:
    # Two 4-bit numbers share a byte, whatever type bitsandbytes calls the bytes.
    return stored.size == (math.prod(shape) + 1) // 2 if packed else stored.shape == shape


def _sizes(shape: tuple[int, ...]) -> str:
    return brief(" x ".join(map(str, shape)))


def check_values(tensors: Tensors, findings: Findings) -> None:
    """Read every tensor once, and note values that are not finite.

    One in a row that nobody reads shows late, in the merged weights; one that somebody reads makes every answer nonsense.
    """
    in_order = sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].start))
    broken = [
        name
        for name, stored in in_order
        if stored.dtype in FLOATS and not all(_is_finite(chunk, stored.dtype) for chunk in _chunks(stored))
    ]
    if broken:
        findings.add(f"values of {few(broken)} are not finite", AGAIN)


def _chunks(stored: Stored) -> Iterator[bytearray]:
    try:
        with durable.open_regular(stored.file) as stream:
            stream.seek(stored.start)
            left = stored.size
            while left:
                chunk = bytearray(min(left, _CHUNK))
                if stream.readinto(chunk) != len(chunk):
                    raise ModelError(f"{stored.file} was cut short while it was read.", AGAIN)
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise ModelError(f"{stored.file} cannot be read ({error.strerror}).", AGAIN) from error


def _is_finite(chunk: bytearray, dtype: str) -> bool:
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    lowest, highest = torch.aminmax(torch.frombuffer(chunk, dtype=kinds[dtype]))
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))
