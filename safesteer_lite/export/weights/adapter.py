"""Read a LoRA adapter: the low-rank update of each matrix, or why a plain merge cannot reproduce it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from safesteer_lite.errors import ExportError
from safesteer_lite.export.weights import shards
from safesteer_lite.sources.folder import few

# Everything in an adapter's configuration that changes the model by more than W + scale * B @ A.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Initialisations that leave the base weights alone. Others (PiSSA, OLoRA, LoftQ, ...) train against a changed base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Update:
    """The low-rank update of one matrix: `scale * up @ down`.

    Attributes:
        down: LoRA A, (rank, inputs).
        up: LoRA B, (outputs, rank).
        scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilised adapters.
    """

    down: Tensor
    up: Tensor
    scale: float


def read_adapter(folder: Path) -> dict[str, Update]:
    """Read a LoRA adapter.

    Returns:
        The update of each matrix, by the matrix's key in the base checkpoint.

    Raises:
        ExportError: not a plain LoRA adapter, or its tensors are incomplete, of wrong shape, or not finite.
    """
    config = shards.read_json(folder / "adapter_config.json")
    _check_adapter_config(folder, config)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ExportError(f"{folder} holds no adapter_model.safetensors.", "Save the adapter as safetensors.")
    factors: dict[str, dict[str, Tensor]] = {}
    unknown, broken = [], []
    for stored in shards.read_shard(file):
        match = _FACTOR.fullmatch(stored.name)
        if match is None:
            unknown.append(stored.name)
            continue
        factor = stored.load().float()
        if not shards.is_finite(factor):
            broken.append(stored.name)
        factors.setdefault(match[1], {})[match[2]] = factor
    if unknown:
        raise ExportError(
            f"The adapter holds {few(sorted(unknown))}, which cannot be merged.", "Only LoRA A and B can."
        )
    if broken:
        raise ExportError(
            f"The adapter holds NaN or infinite values in {few(sorted(broken))}.", "Train again, more gently."
        )
    if not factors:
        raise ExportError(f"The adapter in {folder} is empty.")
    return {f"{module}.weight": _update(module, pair, config) for module, pair in factors.items()}


def _check_adapter_config(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder} holds a {config.get('peft_type')} adapter.", "Only LoRA adapters can be merged.")
    found = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f'bias = "{config["bias"]}"')
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        found.append(f'init_lora_weights = "{start}"')
    if found:
        raise ExportError(
            f"The adapter in {folder} uses {', '.join(found)}, which this merge cannot reproduce.",
            "Train without it, or merge with peft.",
        )


def _update(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> Update:
    """One matrix's factors with their scale, where the first pattern that fits the module's name wins, as in peft."""
    if missing := {"A", "B"} - pair.keys():
        raise ExportError(f"The adapter lacks lora_{missing.pop()} for {module}.", "Save the adapter again.")

    def setting(patterns: str, default: str) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(config[default])

    try:
        rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ExportError(f"The adapter's configuration names no rank or alpha for {module}: {error}.") from error
    down, up = pair["A"], pair["B"]
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] == rank:
        raise ExportError(
            f"The adapter for {module} has shapes {tuple(down.shape)} and {tuple(up.shape)}, "
            f"which do not fit its rank {rank:g}.",
            "Check that adapter_config.json belongs to these weights.",
        )
    return Update(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
