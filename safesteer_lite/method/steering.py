"""Record, steer and ablate the residual stream: context managers over decoder blocks.

Blocks are hooked on their first positional argument (the residual stream), with_kwargs=True, because blocks return a
plain tensor in transformers and a tuple elsewhere. Every hook returns a new tensor and is removed on the way out.
Ablation exists only to score candidate directions (arXiv 2406.11717); nothing else in the project uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_Arguments = tuple[Any, ...]


def _on_input(block: nn.Module, change: Callable[[Tensor], Tensor | None], stack: ExitStack) -> None:
    """Register `change` on the block's input; a returned tensor replaces it."""

    def hook(_: nn.Module, args: _Arguments, kwargs: dict[str, Any]) -> tuple[_Arguments, dict[str, Any]] | None:
        changed = change(args[0])
        return None if changed is None else ((changed, *args[1:]), kwargs)

    stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _on_output(module: nn.Module, change: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
    """Register `change` on the module's output, which may be a tensor or a tuple that starts with one."""

    def hook(_: nn.Module, __: _Arguments, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    stack.callback(module.register_forward_hook(hook).remove)


def _copied_once(vector: Tensor) -> Callable[[Tensor], Tensor]:
    """`vector` on the device and in the dtype of a hidden state, without a copy at every token."""
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(hidden: Tensor) -> Tensor:
        kind = hidden.device, hidden.dtype
        if kind not in copies:
            copies[kind] = vector.to(hidden)
        return copies[kind]

    return like


@contextmanager
def add(layers: Sequence[nn.Module], layer: int, vector: Tensor) -> Iterator[None]:
    """Add `vector` (width,) to the input of block `layer` at every position (paper, equation of the teacher)."""
    like = _copied_once(vector)
    with ExitStack() as stack:
        _on_input(layers[layer], lambda hidden: hidden + like(hidden), stack)
        yield


@contextmanager
def ablate(layers: Sequence[nn.Module], direction: Tensor) -> Iterator[None]:
    """Project `direction` (width,) out of every block input and all that a block adds to it, to score a candidate."""
    like = _copied_once(direction.float() / direction.float().norm())

    def project_out(hidden: Tensor) -> Tensor:
        axis = like(hidden)
        return hidden - (hidden @ axis).unsqueeze(-1) * axis

    with ExitStack() as stack:
        for block in layers:
            _on_input(block, project_out, stack)
            for module in _additions(block):
                _on_output(module, project_out, stack)
        yield


def _additions(block: nn.Module) -> list[nn.Module]:
    """The modules whose outputs a block adds to the residual stream: attention and MLP, or the norms behind them, as in
    Gemma 2 and 3."""
    normed = hasattr(block, "post_feedforward_layernorm")
    names = ("post_attention_layernorm", "post_feedforward_layernorm") if normed else ("self_attn", "mlp")
    return [block.get_submodule(name) for name in names]


@contextmanager
def record(layers: Sequence[nn.Module], positions: int) -> Iterator[dict[int, Tensor]]:
    """Collect the last `positions` positions of each block's input during ONE forward.

    Yields a dictionary that fills with one (batch, positions, width) tensor a block. A block that reads a shared prefix
    first is called twice, and what counts is the call that reads the end.
    """
    seen: dict[int, Tensor] = {}

    def keep(index: int, hidden: Tensor) -> None:
        seen[index] = hidden[:, -positions:].detach().clone()

    with ExitStack() as stack:
        for index, block in enumerate(layers):
            _on_input(block, partial(keep, index), stack)
        yield seen


@contextmanager
def count_calls(layers: Sequence[nn.Module], layer: int) -> Iterator[list[torch.Size]]:
    """Note the shape of each input that block `layer` receives, so that a self-check can see whether hooks fire at all."""
    calls: list[torch.Size] = []
    with ExitStack() as stack:
        _on_input(layers[layer], lambda hidden: calls.append(hidden.shape), stack)
        yield calls
