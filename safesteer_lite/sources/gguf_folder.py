"""Make a GGUF file the folder of 16-bit safetensors that transformers expects, and mend what GGUF readers lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Emit, Progress

if TYPE_CHECKING:
    from torch import Tensor


def write_folder(gguf: Path, out: Path, name: str, emit: Emit, stage: str) -> None:
    """Write a Qwen2 GGUF as the folder transformers expects.

    Tensors are dequantised one at a time straight to bf16, which takes less memory than loading the model would.

    Args:
        gguf: the file to read.
        out: an empty folder.
        name: the model's name for its config.json.
        emit: takes Progress in tensors.

    Raises:
        ModelError: the GGUF holds another architecture, or lacks a tensor.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoConfig, GenerationConfig

    reader = GGUFReader(gguf)
    if (architecture := reader.get_field("general.architecture").contents()) != "qwen2":
        # Llama files keep attention rows in another order, which would have to be undone.
        raise ModelError(f"{gguf.name} holds the architecture {architecture}, and only qwen2 is read.")
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config.tie_word_embeddings = _share_embeddings(stored)
    tensors = _read_tensors(stored, config, emit, stage)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    config.__dict__.pop("_model_name_or_path", None)
    config._name_or_path = name
    config.save_pretrained(out)
    # Greedy by default, like every measurement here; a chat ends at the turn's end, a bare text at the text's end.
    ends = list(dict.fromkeys((config.eos_token_id, config.pad_token_id)))
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=config.pad_token_id
    ).save_pretrained(out)
    _write_tokenizer(gguf, reader, config, out)


def _share_embeddings(stored: dict[str, Any]) -> bool:
    """Whether input and output embeddings are one matrix; if so, `stored` keeps its finer quantisation for both.

    Quantisers write a shared matrix twice, at two precisions. Taken for two matrices, it would cost 27 % more memory,
    and the model would differ from the one it was made from.
    """
    output = stored.pop("output.weight", None)
    if output is None:
        return True
    embedding = stored["token_embd.weight"]
    first, second = (_dequantise(tensor, rows=4096) for tensor in (embedding, output))
    # 5-bit rounding errors are about 4 % of a matrix's norm, 4-bit ones 9 %; unrelated matrices differ by over 100 %.
    shared = first.shape == second.shape and bool((first - second).norm() < 0.15 * second.norm())
    if shared:
        stored["token_embd.weight"] = max(embedding, output, key=lambda tensor: int(tensor.n_bytes))
    else:
        stored["output.weight"] = output
    return shared


def _read_tensors(stored: dict[str, Any], config: Any, emit: Emit, stage: str) -> dict[str, Tensor]:
    """All parameters of the model that `config` describes, in bf16, under the names that transformers gives them."""
    import torch
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # Names and shapes without any memory; a shared matrix is listed once.
        expected = dict(AutoModelForCausalLM.from_config(config, trust_remote_code=False).named_parameters())
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for count, (name, parameter) in enumerate(expected.items(), start=1):
        tensor = stored.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            raise ModelError(f"The GGUF file lacks {name}.")
        tensors[name] = _dequantise(tensor).to(torch.bfloat16)
        if tensors[name].shape != parameter.shape:
            raise ModelError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}.")
        emit(Progress(stage, "tensors converted", count, len(expected)))
    return tensors


def _dequantise(tensor: Any, rows: int | None = None) -> Tensor:
    """A GGUF tensor, or its first `rows` rows, as a float32 tensor."""
    import numpy
    import torch
    from gguf import dequantize

    return torch.from_numpy(numpy.require(dequantize(tensor.data[:rows], tensor.tensor_type), requirements="W"))


def _write_tokenizer(gguf: Path, reader: Any, config: Any, out: Path) -> None:
    """Write the tokenizer, and mend what reading it from a GGUF loses.

    transformers takes the end of a text for the end of a turn, and splits every control token that it does not know
    by name, such as `<|fim_prefix|>`; the file marks those tokens by type.
    """
    from gguf import TokenType
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    for kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        special = kind == TokenType.CONTROL
        texts = [tokenizer.convert_ids_to_tokens(index) for index, found in enumerate(types) if found == kind]
        tokenizer.add_tokens(
            [AddedToken(text, special=special, normalized=False) for text in texts], special_tokens=special
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.model_max_length = config.max_position_embeddings
    for leftover in ("model_type", "is_local", "local_files_only", "add_prefix_space"):
        tokenizer.init_kwargs.pop(leftover, None)  # How this file was read, and of no meaning in the folder.
    tokenizer.save_pretrained(out)
