"""Merged weights read back block by block, along answers that are known: no more of the model is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from safesteer_lite.export.weights import shards
from safesteer_lite.export.weights.shards import Checkpoint
from safesteer_lite.method.policies import Batch, Completions
from safesteer_lite.models import plain
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.reference import Reference, kl_of_states
from safesteer_lite.sources.base import open_base


@torch.no_grad()
def compare_reloaded(folder: Path, reference: Reference, chunk: int) -> tuple[float, int]:
    """Compare the weights of a folder with a policy, on the CPU, along that policy's own greedy answers.

    The embedding, each block and the LM head are read one after the other, and all answers pass through each before the next
    one is read. The figures are those of the model loaded as a whole: it would write an answer as the policy did where, at each
    place of it, both find the same token likeliest.

    Args:
        folder: a model folder of transformers, in 16 or 32 bits.
        reference: what the policy answers, greedily, on any device; its hidden states must be of the same width.
        chunk: positions whose logits exist at a time.

    Returns:
        KL(policy || weights) in nats a token, and along how many answers the likeliest tokens are the same everywhere.

    Raises:
        ModelError, ExportError: the folder cannot be read.
    """
    base, weights = open_base(folder), shards.read_checkpoint(folder)
    answers = [
        (
            Batch(batch.input_ids.cpu(), batch.attention_mask.cpu(), batch.prefix),
            Completions(rows.tokens.cpu(), rows.mask.cpu()),
        )
        for batch, rows in reference.batches
    ]
    known = [states.cpu() for states in reference.hidden]
    # The head must be able to read the policy's hidden states, so both compute in the same type.
    dtype = next((states.dtype for states in known), torch.bfloat16)
    model = PlainModel(plain.skeleton(base, dtype), plain.load_tokenizer(folder, base.config), None)
    decoder, head, embedding = model.decoder, model.causal.lm_head, model.decoder.embed_tokens
    names = {module: name for name, module in model.network.named_modules()}
    if f"{names[head]}.weight" not in weights.tensors:
        names[head] = names[embedding]  # Where the two are one table, the files hold it once.

    def present(module: nn.Module) -> AbstractContextManager[None]:
        return _present(module, names[module], weights, dtype)

    with present(embedding):
        residuals = [model.start(rows.after(batch)) for batch, rows in answers]
    for layer, block in enumerate(model.layers, 1):
        with present(block):
            residuals = [model.advance(residual, layer) for residual in residuals]
    with present(decoder.norm):
        states = [
            model.final(residual)[:, -rows.tokens.shape[1] - 1 : -1][rows.mask]
            for residual, (_, rows) in zip(residuals, answers, strict=True)
        ]
    total, same = 0.0, 0
    with present(head):
        for before, now, (_, rows) in zip(known, states, answers, strict=True):
            total += kl_of_states(before, now, model.logits, chunk)
            alike = torch.ones_like(rows.mask)
            alike[rows.mask] = _likeliest(model, before, chunk) == _likeliest(model, now, chunk)
            same += int(alike.all(-1).sum())
    return max(total, 0.0) / max(reference.positions, 1), same


def _likeliest(model: PlainModel, states: Tensor, chunk: int) -> Tensor:
    """The likeliest token behind each of (positions, width) final hidden states, (positions,) int64."""
    return torch.cat([model.logits(part).argmax(-1) for part in states.split(chunk)])


@contextmanager
def _present(module: nn.Module, prefix: str, weights: Checkpoint, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a module of an empty model has its weights, read from the disk; behind it, it is empty again."""
    stored = {name: weights.tensors[f"{prefix}.{name}"] for name, _ in module.named_parameters()}
    module.load_state_dict(
        {name: tensor.load().to(dtype) for name, tensor in stored.items()}, strict=False, assign=True
    )
    yield
    empty = {name: torch.empty_like(parameter, device="meta") for name, parameter in module.named_parameters()}
    module.load_state_dict(empty, strict=False, assign=True)
