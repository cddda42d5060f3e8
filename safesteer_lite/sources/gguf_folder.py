"""Make a GGUF file the folder of 16-bit safetensors that transformers expects, and mend what GGUF readers lose."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite.errors import ModelError, RunFolderError
from safesteer_lite.events import Emit, Note, Progress, Warned
from safesteer_lite.runs.durable import explained, read_json, write_json
from safesteer_lite.sources.download import alone, cache_folder, quiet_libraries, readable_size, require_space
from safesteer_lite.sources.folder import INDEX, WEIGHTS
from safesteer_lite.sources.gguf_file import GgufFile, dequantised, open_gguf
from safesteer_lite.sources.gguf_header import understood

if TYPE_CHECKING:
    from torch import Tensor

FOLDER_VERSION = 1
"""Raised when folders are written differently, so that those made by an older version are made anew."""

MARKER = "source.json"
"""In such a folder: what it was made from."""

_ENDS = 1 << 20
_PART_BYTES = 1 << 31
# How Llama 3 cuts text into words, as its own tokenizer.json has it.
_LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def folder_of_gguf(gguf: Path, emit: Emit, stage: str, template: str = "") -> Path:
    """The folder of safetensors of a GGUF file, made once and kept in `cache_folder()`: whole, or not there at all.

    Args:
        gguf: the file.
        emit: takes Notes, a warning where the file has lost much of the model, and Progress in tensors.
        stage: the name that the events carry.
        template: the chat template that the user gives; empty where the file has to have one.

    Raises:
        ModelError: the file cannot be read, or holds what cannot be used.
        DiskSpaceError: there is no room for the folder.
    """
    mark, home = _mark(gguf), cache_folder() / "gguf"
    folder = home / f"{gguf.stem}-{mark[:12]}"
    home.mkdir(parents=True, exist_ok=True)
    with alone(home / "lock", emit, stage, "Another process is reading a GGUF file; waiting for it."):
        if not _is_ready(folder, mark):
            file = open_gguf(gguf)
            if not template:
                file.require_template()
            needed = 2 * file.weights
            require_space(home, needed, f"the 16-bit weights of {gguf.name}")
            emit(
                Note(
                    stage,
                    f"Turning {gguf.name} into 16-bit safetensors, once ({readable_size(needed)}, kept in {folder}).",
                )
            )
            about = {
                "file": gguf.name,
                "mark": mark,
                "licence": str(file.field("general.license") or ""),
                "loss": file.loss,
            }
            publish_folder(gguf, folder, str(file.field("general.name") or gguf.stem), about, emit, stage)
    if loss := read_json(folder / MARKER, "the mark of a GGUF file")["loss"]:
        emit(Warned(stage, loss))
    return folder


def publish_folder(gguf: Path, folder: Path, name: str, about: Mapping[str, object], emit: Emit, stage: str) -> None:
    """Write a GGUF file's folder beside its final place, then rename it; what a killed attempt left is cleared away.

    Args:
        gguf: the file to read.
        folder: the final place; what is there is replaced.
        name: the model's name for its config.json.
        about: what to keep of where it comes from.
        emit: takes Progress in tensors.

    Raises:
        ModelError: the file holds what cannot be used.
        DiskSpaceError: the disk ran full.
    """
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        with understood(gguf), quiet_libraries(), explained(f"the 16-bit weights of {gguf.name}"):
            write_folder(gguf, unfinished, name, emit, stage)
        write_json(unfinished / MARKER, {**about, "version": FOLDER_VERSION})
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _mark(gguf: Path) -> str:
    """What tells a file from another without reading all of it: name, size, time, and both of its ends."""
    try:
        found = gguf.stat()
        digest = hashlib.sha256(f"{gguf.name} {found.st_size} {found.st_mtime_ns}".encode())
        with gguf.open("rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(found.st_size - _ENDS, 0))
            digest.update(stream.read(_ENDS))
    except OSError as error:
        raise ModelError(
            f"{gguf} cannot be read: {error.strerror or error}.", "Check the file and its permissions."
        ) from error
    return digest.hexdigest()


def _is_ready(folder: Path, mark: str) -> bool:
    try:
        known = read_json(folder / MARKER, "the mark of a GGUF file")
    except RunFolderError:
        return False
    return (known.get("mark"), known.get("version")) == (mark, FOLDER_VERSION)


def write_folder(gguf: Path, out: Path, name: str, emit: Emit, stage: str) -> None:
    """Write a GGUF file as the folder transformers expects.

    Tensors are dequantised one at a time straight to 16 bits, and written when there are two gigabytes of them, so that a model
    needs no memory of its own size.

    Args:
        gguf: the file to read.
        out: an empty folder.
        name: the model's name for its config.json.
        emit: takes Progress in tensors.

    Raises:
        ModelError: the GGUF holds what cannot be read, or lacks a tensor.
        DiskSpaceError: the disk ran full.
    """
    import torch
    from transformers import GenerationConfig

    file = open_gguf(gguf)
    config, stored = file.config(), file.tensors
    stored.pop("rope_freqs.weight", None)
    config.tie_word_embeddings = _share_embeddings(stored)
    dtype = torch.float16 if file.is_half else torch.bfloat16
    _write_tensors(_read_tensors(file, stored, config, dtype, emit, stage), out)
    config.dtype = str(dtype).removeprefix("torch.")
    config.__dict__.pop("_model_name_or_path", None)
    config._name_or_path = name
    config.save_pretrained(out)
    # Greedy by default, like every measurement here; a chat ends at the turn's end, a bare text at the text's end.
    named = (config.eos_token_id, file.field("tokenizer.ggml.eot_token_id"), config.pad_token_id)
    ends = [index for index in dict.fromkeys(named) if index is not None]
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=config.pad_token_id
    ).save_pretrained(out)
    _write_tokenizer(file, config, out)


def _share_embeddings(stored: dict[str, Any]) -> bool:
    """Whether input and output embeddings are one matrix; if so, `stored` keeps its finer quantisation for both.

    Quantisers write a shared matrix twice, at two precisions. Taken for two matrices, it would cost 27 % more memory,
    and the model would differ from the one it was made from.
    """
    output = stored.pop("output.weight", None)
    if output is None:
        return True
    embedding = stored["token_embd.weight"]
    first, second = (dequantised(tensor, rows=4096) for tensor in (embedding, output))
    # 5-bit rounding errors are about 4 % of a matrix's norm, 4-bit ones 9 %; unrelated matrices differ by over 100 %.
    shared = first.shape == second.shape and bool((first - second).norm() < 0.15 * second.norm())
    if shared:
        stored["token_embd.weight"] = max(embedding, output, key=lambda tensor: int(tensor.n_bytes))
    else:
        stored["output.weight"] = output
    return shared


def _read_tensors(
    file: GgufFile, stored: dict[str, Any], config: Any, dtype: Any, emit: Emit, stage: str
) -> Iterator[tuple[str, Tensor]]:
    """All parameters of the model that `config` describes, in 16 bits, under the names that transformers gives them."""
    import torch
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # Names and shapes without any memory; a shared matrix is listed once.
        expected = dict(AutoModelForCausalLM.from_config(config, trust_remote_code=False).named_parameters())
    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    left = dict(stored)
    for count, (name, parameter) in enumerate(expected.items(), start=1):
        tensor = left.pop(names.get_name(name, try_suffixes=(".weight", ".bias")), None)
        if tensor is None:
            raise ModelError(f"{file.path.name} lacks {name}.", "Copy or download it again.")
        values = dequantised(tensor)
        if values.shape != parameter.shape:
            raise ModelError(
                f"In {file.path.name} {name} has the shape {tuple(values.shape)} instead of {tuple(parameter.shape)}.",
                "Copy or download it again.",
            )
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _halves(values, config.head_dim)
        yield name, values.to(dtype)
        emit(Progress(stage, "tensors converted", count, len(expected)))
    if left:
        raise ModelError(
            f"{file.path.name} holds {min(left)}, which a plain {config.model_type} model has not.",
            "Give the model that it was made from, as safetensors.",
        )


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """A query or key matrix with the two rows of each rotary pair in the two halves of their head, as transformers has them.

    llama.cpp's converter puts the two beside each other in models of this architecture, and in no other that is read here.

    Args:
        weight: (heads * head_dim, width).
        head_dim: rows of a head.
    """
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """Write tensors to one file, or to parts of about two gigabytes with their index."""
    from safetensors.torch import save_file

    part: dict[str, Tensor] = {}
    parts: list[list[str]] = []

    def write() -> None:
        save_file(part, out / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(part))
        part.clear()

    for name, tensor in tensors:
        part[name] = tensor
        if sum(value.nbytes for value in part.values()) >= _PART_BYTES:
            write()
    if part:
        write()
    if len(parts) == 1:
        (out / "part-0").rename(out / WEIGHTS)
        return
    places = {}
    for number, names in enumerate(parts):
        final = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        (out / f"part-{number}").rename(out / final)
        places.update(dict.fromkeys(names, final))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _write_tokenizer(file: GgufFile, config: Any, out: Path) -> None:
    """Write the tokenizer, and mend what reading it from a GGUF loses.

    transformers takes the end of a text for the end of a turn, and splits every control token that it does not know
    by name, such as `<|fim_prefix|>`; the file marks those tokens by type.
    """
    from gguf import TokenType
    from transformers import AddedToken, AutoTokenizer

    if config.model_type == "llama":
        tokenizer = _llama_tokenizer(file, config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name, trust_remote_code=False)
    types = file.field("tokenizer.ggml.token_type")
    for kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        special = kind == TokenType.CONTROL
        texts = [tokenizer.convert_ids_to_tokens(index) for index, found in enumerate(types) if found == kind]
        tokenizer.add_tokens(
            [AddedToken(text, special=special, normalized=False) for text in texts], special_tokens=special
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.model_max_length = config.max_position_embeddings
    for leftover in ("model_type", "is_local", "local_files_only", "add_prefix_space"):
        tokenizer.init_kwargs.pop(leftover, None)  # How this file was read, and of no meaning in the folder.
    tokenizer.save_pretrained(out)


def _llama_tokenizer(file: GgufFile, config: Any) -> Any:
    """Llama 3's tokenizer: transformers would cut numbers into other pieces than it does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = file.field("tokenizer.ggml.tokens")
    pairs = (pair.partition(" ") for pair in file.field("tokenizer.ggml.merges"))
    merges = [(first, second) for first, _, second in pairs]
    own = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges, ignore_merges=True)
    )
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    own.decoder = decoders.ByteLevel()
    begin = words[config.bos_token_id]
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if file.field("tokenizer.ggml.add_bos_token") is not False:
        steps.append(
            processors.TemplateProcessing(f"{begin} $A", f"{begin} $A {begin} $B", [(begin, config.bos_token_id)])
        )
    own.post_processor = processors.Sequence(steps)
    template = file.field("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token=begin, chat_template=template)
