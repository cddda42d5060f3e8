"""GGUF files of 4 to 6 bits from 16-bit ones: llama.cpp's mix of types for dense models, and ggml's own kernel for the blocks."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy
from gguf import GGMLQuantizationType as Kind

from safesteer_lite.errors import ExportError
from safesteer_lite.export.gguf import INSTALL

MIXES = {"Q6_K": Kind.Q6_K, "Q5_K_M": Kind.Q5_K, "Q4_K_M": Kind.Q4_K}
"""What is written here, with the type of most matrices in it."""

_BLOCK_COLUMNS = 256
# Types of 256 columns a block, and what llama.cpp takes in their place where the columns do not divide by 256.
_NARROW = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
_FINER = {Kind.Q4_K: Kind.Q5_K, Kind.Q5_K: Kind.Q6_K}
_ROWS_AT_ONCE = 8192
_LARGE_LLAMA_LAYERS = 80


def check_quantisable(config: Mapping[str, Any]) -> None:
    """Refuse models for which llama.cpp mixes types in another way than is written here.

    Args:
        config: the model's config.json.

    Raises:
        ExportError: a mixture of experts, or a Llama of 80 layers.
    """
    kind = str(config.get("model_type", ""))
    if "moe" in kind or any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise _refused("a mixture of experts")
    if kind == "llama" and config.get("num_hidden_layers") == _LARGE_LLAMA_LAYERS:
        raise _refused(f"a Llama of {_LARGE_LLAMA_LAYERS} layers")


def mix(tensors: Mapping[str, tuple[int, int]], layers: int, quant: str) -> dict[str, Kind]:
    """The type of each matrix in a file of a dense model.

    Output weights and, in some layers, the value and down projections keep 6 bits, because errors there cost most; where
    queries, keys and values are one matrix, all of it keeps one bit more.

    Args:
        tensors: (rows, columns) of each matrix, by its GGUF name; vectors stay in float32 and are not asked about.
        layers: how many blocks the model has.
        quant: a key of `MIXES`.

    Raises:
        ExportError: the model is of a kind that llama.cpp mixes in another way.
    """
    if any("_exps" in name for name in tensors):
        raise _refused("a mixture of experts")
    tied = "output.weight" not in tensors
    return {name: _kind_of(name, columns, layers, tied, MIXES[quant]) for name, (_, columns) in tensors.items()}


def quantise_file(
    source: Path, target: Path, quant: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write a 16-bit GGUF file in fewer bits; every setting but the file's type is kept.

    Args:
        source: a GGUF file in 16 or 32 bits.
        target: the file to write.
        quant: a key of `MIXES`.
        progress: called with bytes read and bytes in all, after each tensor.

    Raises:
        ExportError: ggml is not installed, or the model cannot be quantised in this way.
    """
    library = load_ggml()
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    matrices = {t.name: (int(t.shape[1]), int(t.shape[0])) for t in reader.tensors if len(t.shape) > 1}
    kinds = mix(matrices, layers, quant)
    writer = gguf.GGUFWriter(target, architecture)
    try:
        _copy_settings(reader.fields.values(), writer, quant)
        for tensor in reader.tensors:
            if tensor.name not in kinds:
                writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes)
                continue
            rows, columns = matrices[tensor.name]
            block, size = gguf.GGML_QUANT_SIZES[kinds[tensor.name]]
            shape = (rows, columns // block * size)
            writer.add_tensor_info(
                tensor.name, shape, numpy.dtype(numpy.uint8), rows * shape[1], raw_dtype=kinds[tensor.name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(int(tensor.n_bytes) for tensor in reader.tensors)
        for tensor in reader.tensors:
            kind = kinds.get(tensor.name)
            data = tensor.data if kind is None else _quantise(library, tensor.data, tensor.tensor_type, kind)
            writer.write_tensor_data(data)
            done += int(tensor.n_bytes)
            progress(done, total)
    finally:
        writer.close()


def load_ggml() -> Any:
    """ggml's shared library, with the two functions that quantise.

    Raises:
        ExportError: it is not installed, or cannot be loaded on this machine.
    """
    spec = find_spec("libggml")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(sys.platform, "libggml-base.so")
    found = next((path for folder in folders for path in sorted(folder.rglob(name))), None)
    if found is None:
        raise ExportError("Quantising to 4, 5 or 6 bits needs ggml.", INSTALL)
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        raise ExportError(f"ggml cannot be loaded: {error}.", "Choose --quant Q8_0, which needs no ggml.") from error
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def _kind_of(name: str, columns: int, layers: int, tied: bool, kind: Kind) -> Kind:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = Kind.Q6_K
    elif ".attn_v." in name or ".ffn_down." in name:
        layer, eighth = int(name.split(".")[1]), layers // 8
        # The first and the last eighth of the layers, and every third one between them.
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            kind = Kind.Q6_K
    elif ".attn_qkv." in name:
        kind = _FINER.get(kind, kind)
    return _NARROW[kind] if columns % _BLOCK_COLUMNS else kind


def _quantise(library: Any, data: Any, source: Kind, kind: Kind) -> Any:
    """One matrix as blocks of `kind`, (rows, bytes a row) uint8; some rows at a time, so that few are held in float32."""
    columns = data.shape[-1] // 2 if source == Kind.BF16 else data.shape[-1]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = numpy.empty((data.shape[0], columns // block * size), numpy.uint8)
    library.ggml_quantize_init(int(kind))
    for start in range(0, data.shape[0], _ROWS_AT_ONCE):
        values = gguf.dequantize(data[start : start + _ROWS_AT_ONCE], source)
        rows = numpy.ascontiguousarray(values, dtype=numpy.float32)
        part = out[start : start + len(rows)]
        written = library.ggml_quantize_chunk(
            int(kind), rows.ctypes.data, part.ctypes.data, 0, len(rows), columns, None
        )
        if written != part.nbytes:
            raise ExportError(f"ggml wrote {written} bytes where {part.nbytes} were asked for.", "Choose --quant Q8_0.")
    return out


def _copy_settings(fields: Iterable[Any], writer: gguf.GGUFWriter, quant: str) -> None:
    """Every key of the source but those that the writer sets itself."""
    for field in fields:
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant}"])


def _refused(what: str) -> ExportError:
    return ExportError(
        f"No file of 4 to 6 bits is written for {what}: llama.cpp mixes its types in a way that is not built here.",
        "Choose --quant Q8_0 or F16, and quantise the F16 file with llama.cpp's own llama-quantize.",
    )
