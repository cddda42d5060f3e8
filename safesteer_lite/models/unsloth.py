"""The Unsloth backend: its loader and fused kernels on CUDA, in place of transformers' own blocks.

Unsloth changes transformers' classes when it loads a model, and decodes single tokens on a path that passes the blocks by,
where no hook fires. So nothing here calls its `generate`: sampling goes through the blocks with a cache of plain pairs, and
the model stays in evaluation mode, because in training mode Unsloth drops the padding mask. Everything that uses the method
runs the same checks here as on the plain backend, first in a process of its own on a small model of the same kind.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from safesteer_lite import children
from safesteer_lite.errors import ModelError, SelfCheckError
from safesteer_lite.foreign import forbid_hub_kernels
from safesteer_lite.method.policies import Residual
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import Adapter, with_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.sampling import Cache
from safesteer_lite.models.selfcheck import self_check
from safesteer_lite.sources.base import Base, open_base
from safesteer_lite.sources.download import cache_folder

_PROBE_SECONDS = 300
# Nats between a small model read by Unsloth and by transformers: kernels round differently, and nothing else may differ.
_LARGEST_KL = 0.05


class PairCache:
    """The cache as Unsloth's decoder takes and returns it: one (keys, values) pair a block, (rows, heads, tokens, size)."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor]] | None = None

    def take(self, output: Any) -> None:
        """Keep the longer pairs that the decoder returned."""
        self.given = [(pair[0], pair[1]) for pair in output.past_key_values]

    def repeat(self, times: int) -> None:
        """Make each row `times` rows, copies side by side."""
        self.given = [
            (keys.repeat_interleave(times, dim=0), values.repeat_interleave(times, dim=0))
            for keys, values in self.given or []
        ]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.given = [(keys[rows], values[rows]) for keys, values in self.given or []]


class UnslothModel(PlainModel):
    """A model whose blocks are Unsloth's: they return tuples, and take and give the cache as pairs."""

    def new_cache(self) -> Cache:
        """An empty cache of pairs."""
        return PairCache()

    def _cache_of(self, tokens: int) -> Any:
        nothing = torch.zeros(1, 1, tokens, 1, device=self.device)
        return [(nothing, nothing)] * len(self.layers)

    def _block(self, residual: Residual) -> Residual:
        block, prefix = self.layers[residual.layer], residual.prefix
        extra: dict[str, Any] = {}
        if prefix:
            hidden, (keys, values) = block(prefix.hidden, **prefix.arguments, use_cache=True)
            prefix = replace(prefix, hidden=hidden, layer=residual.layer + 1)
            rows = len(residual.hidden)
            extra["past_key_value"] = (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        hidden = block(residual.hidden, **residual.arguments, **extra)[0]
        return replace(residual, hidden=hidden, layer=residual.layer + 1, prefix=prefix)


@dataclass(frozen=True)
class _Original:
    """What a class or module of transformers held before Unsloth changed it."""

    owner: Any
    values: Mapping[str, Any]


_originals: list[_Original] = []


def take_up() -> Any:
    """Unsloth itself, without its banner, its usage statistics and its progress bars.

    Raises:
        ModelError: transformers was imported first, which Unsloth would change too late.
    """
    if "unsloth" not in sys.modules and "transformers" in sys.modules:
        raise ModelError(
            "Unsloth has to be imported before transformers, and this process has imported transformers already.",
            "Start the run in a new process, or set model.backend=plain.",
        )
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Unsloth writes code to a folder and imports it from there: by itself a folder in the current one, which may be
    # somebody else's and hold such a folder already.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth"))
    with redirect_stdout(io.StringIO()):
        return importlib.import_module("unsloth")


def load(base: Base, precision: str, adapter: Adapter, seed: int, device: str = "cuda") -> UnslothModel:
    """Load a model and attach a fresh LoRA adapter (B = 0, so the student starts as the base).

    Args:
        base: the model.
        precision: `nf4` or `bf16`.
        adapter: the adapter's size and place.
        seed: of the adapter's A matrices.
        device: where to.
    """
    unsloth = take_up()
    _remember(base.config["model_type"])
    with redirect_stdout(io.StringIO()):
        network, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=str(base.folder),
            # Longer sequences would be cut without an error, so the limit is the model's own.
            max_seq_length=plain.library_config(base.folder, base.config).max_position_embeddings,
            dtype=torch.bfloat16,
            load_in_4bit=precision == "nf4",
            load_in_16bit=precision == "bf16",
            device_map={"": device},
            offload_embedding=False,
            use_gradient_checkpointing=False,
            use_exact_model_name=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        network.requires_grad_(False)
        network = unsloth.FastLanguageModel.get_peft_model(
            network,
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(adapter.first_layer, len(network.model.layers))),
            layers_pattern="layers",
            use_gradient_checkpointing=False,
            random_state=seed,
        )
    return UnslothModel(network.eval(), plain.load_tokenizer(base.folder, base.config), adapter.first_layer)


def _remember(family: str) -> None:
    """Note the classes of one family of models as they are, unless that is known already."""
    if _originals:
        return
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in {family, "llama"}]
    owners: list[Any] = [*modules]
    for module in modules:
        owners += [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    _originals.extend(_Original(owner, dict(vars(owner))) for owner in owners)


def restore_transformers() -> None:
    """Put transformers' classes back as they were before a model was loaded, so that plain models can be loaded.

    A model that Unsloth has loaded cannot be used after this.
    """
    for original in _originals:
        _restore(original.owner, original.values)
    _originals.clear()


def _restore(owner: type | ModuleType, values: Mapping[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in values:
            delattr(owner, name)
        elif value is not values[name]:
            setattr(owner, name, values[name])


@cache
def problem_with(folder: Path, precision: str) -> str:
    """Try Unsloth out in a process of its own, on a small random model of the same kind.

    Unsloth's changes to transformers stay for the life of a process, so a trial in this one could not be taken back. It is
    made once in a process.

    Returns:
        Why Unsloth cannot be used, without a full stop; empty where it can.
    """
    if "unsloth" not in sys.modules and "transformers" in sys.modules:
        return "transformers was imported first in this process"
    code = "from safesteer_lite.models.unsloth import try_out; try_out(*sys.argv[1:])"
    # The current folder is not searched for modules, but the model's may be given relative to it.
    command, variables = children.python_code(code, str(folder), precision), children.environment()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROBE_SECONDS, env=variables
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"the trial could not be made ({error})"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"the trial ended with code {done.returncode}"]
    # The last line of a traceback, without the name of the exception.
    return re.sub(r"^[\w.]+: ", "", lines[-1]).rstrip(".")


def try_out(folder: str, precision: str, device: str = "cuda") -> None:
    """Load a small model with Unsloth, check it as every run is checked, and compare it with the plain backend.

    Args:
        folder: the model whose kind is tried.
        precision: `nf4` or `bf16`.
        device: where.

    Raises:
        SelfCheckError: what is wrong.
    """
    getLogger("bitsandbytes").setLevel("ERROR")
    forbid_hub_kernels()
    take_up()
    with tempfile.TemporaryDirectory() as scratch:
        small = open_base(small_copy(open_base(Path(folder)), Path(scratch)))
        adapter = Adapter(rank=4, alpha=8)
        policy = Policy(load(small, precision, adapter, 0, device), 128)
        self_check(policy)
        found = _log_probabilities(policy)
        restore_transformers()
        network, tokenizer = plain.load(small, precision=precision, device=device, unpack=False)
        known = _log_probabilities(Policy(with_adapter(network, tokenizer, adapter, 0), 128))
    kl = float((known.exp() * (known - found)).sum(-1).mean())
    if not kl < _LARGEST_KL:
        raise SelfCheckError(f"Unsloth's answers differ from those of transformers by {kl:.3f} nats")


def small_copy(base: Base, out: Path) -> Path:
    """Write a random model of the same kind with two narrow blocks, beside the same tokenizer."""
    from transformers import AutoModelForCausalLM

    config = plain.library_config(base.folder, base.config)
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    for name, value in {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, trust_remote_code=False, attn_implementation=plain.ATTENTION
    )
    model.save_pretrained(out)
    plain.load_tokenizer(base.folder, base.config).save_pretrained(out)
    return out


def _log_probabilities(
    policy: Policy, prompts: Sequence[str] = ("Say hello.", "Why is the sky blue at noon?")
) -> Tensor:
    """What a policy expects after each prompt, (prompts, vocabulary) float32 on the CPU."""
    from safesteer_lite.method.policies import last_logits

    with torch.no_grad():
        rows = [last_logits(policy.model, policy.encode(prompt)).log_softmax(-1) for prompt in prompts]
    return torch.cat(rows).cpu()
