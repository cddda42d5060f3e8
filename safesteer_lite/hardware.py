"""What this machine has, what a model will need of it, and the decision that follows: before anything is downloaded.

Read in order: the machine, a model's shape, its need, the decision, the doctor's checks. Sizes are bytes; what is shown
to the user is decimal (1 GB = 1e9 bytes). torch is imported inside functions only, so that `--help` stays fast.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from safesteer_lite.errors import DiskSpaceError, ModelError, UsageError

Precision = Literal["nf4", "bf16", "fp32"]
Fit = Literal["fits", "tight", "does not fit"]

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "unsloth")

# Unpacking stops here, so that the desktop and the prompt sets keep room.
_UNPACK_SHARE = 0.6
_FITS_SHARE = 0.8


def format_bytes(count: int) -> str:
    """A size for people: `1.0 GB`, decimal units, one digit after the point."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.95:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_duration(seconds: float) -> str:
    """A duration for people: the two largest units, `2 h 5 min`."""
    whole = max(round(seconds), 0)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for index, (name, length) in enumerate(units):
        if whole >= length:
            smaller_name, smaller = units[min(index + 1, 3)]
            rest = whole % length // smaller
            return f"{whole // length} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return "0 s"


# The machine.


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA card.

    Attributes:
        name: as the driver calls it.
        memory_total, memory_free: bytes.
        capability: CUDA compute capability, (major, minor).
        driver: driver version; None where it cannot be read.
        usable: whether the installed torch can compute on it.
    """

    name: str
    memory_total: int
    memory_free: int
    capability: tuple[int, int]
    driver: str | None
    usable: bool


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        system: operating system and release.
        python: version.
        cpu: name.
        cores: physical cores that this process may use.
        ram_total, ram_available: bytes, within the limits of the process's control group.
        disk_free: bytes, at the folder asked about.
        gpus: every card found, also those torch cannot use.
        versions: package name to installed version, None where missing.
        cuda_build: the CUDA version torch was built for; None for a CPU build.
        bf16_fast: whether the device that will compute (`gpu`, else the CPU) has bf16 arithmetic; False where unknown.
    """

    system: str
    python: str
    cpu: str
    cores: int
    ram_total: int
    ram_available: int
    disk_free: int
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str | None]
    cuda_build: str | None
    bf16_fast: bool

    @property
    def gpu(self) -> Gpu | None:
        """The usable card with most free memory."""
        return max((gpu for gpu in self.gpus if gpu.usable), key=lambda gpu: gpu.memory_free, default=None)


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, without importing them."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def inspect(folder: Path) -> Machine:
    """Look at this machine. Takes a few seconds the first time, because torch is imported.

    Args:
        folder: where the run will be written; it need not exist yet.
    """
    memory = psutil.virtual_memory()
    limit, available = cgroup_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")) or (memory.total, memory.total)
    versions = {name: _version(name) for name in _PACKAGES}
    cuda_build, gpus, cpu_bf16 = _torch_facts(_nvidia_smi()) if versions["torch"] else (None, _nvidia_smi(), False)
    machine = Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores=usable_cores(),
        ram_total=min(memory.total, limit),
        ram_available=min(memory.available, available),
        disk_free=disk_free(folder),
        gpus=gpus,
        versions=versions,
        cuda_build=cuda_build,
        bf16_fast=cpu_bf16,
    )
    if machine.gpu is None:
        return machine
    return replace(machine, bf16_fast=machine.gpu.capability >= (8, 0))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_facts(found: tuple[Gpu, ...]) -> tuple[str | None, tuple[Gpu, ...], bool]:
    """torch's CUDA build, the cards (torch's view where it can use them) and whether the CPU has bf16 arithmetic."""
    try:
        import torch
    except (ImportError, OSError):  # A damaged installation is the doctor's to report, not a reason to crash here.
        return None, found, False
    helpers = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    cpu_bf16 = any(bool(getattr(torch.cpu, name, bool)()) for name in helpers)
    if not torch.cuda.is_available():
        return torch.version.cuda, found, cpu_bf16
    driver = found[0].driver if found else None
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(properties.name, total, free, (properties.major, properties.minor), driver, True))
    return torch.version.cuda, tuple(gpus), cpu_bf16


_SMI_FIELDS = "name,memory.total,memory.free,compute_cap,driver_version"


def _nvidia_smi() -> tuple[Gpu, ...]:
    """The cards the driver knows, so that a card is seen even when torch is a CPU build."""
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Cards from `nvidia-smi --query-gpu` lines (memory in MiB); lines that are something else are passed over."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            name, total, free, capability, driver = cells
            major, minor = (int(part) for part in capability.split("."))
            gpus.append(Gpu(name, int(total) << 20, int(free) << 20, (major, minor), driver, False))
        except ValueError:
            continue
    return tuple(gpus)


def _cpu_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str:
    """The text of a system file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cgroup_folders(membership: Path, root: Path, controller: str) -> list[Path]:
    """The folders of every control group, innermost first, that limits this process: versions 1 and 2."""
    folders = []
    for line in _read(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        inner = base / path.strip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder == base or base in folder.parents]
    return folders


def cgroup_memory(membership: Path, root: Path) -> tuple[int, int] | None:
    """Memory limit and what is left of it, bytes; None where no control group sets a limit.

    A limit of an outer group counts as well, and page cache that the kernel would give back counts as free.

    Args:
        membership: the file that names the process's groups, `/proc/self/cgroup`.
        root: where the groups are mounted, `/sys/fs/cgroup`.
    """
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    limits, left = [], []
    for folder in _cgroup_folders(membership, root, "memory"):
        for limit_name, usage_name, cache_name in names:
            limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
            # Version 1 writes "no limit" as the largest multiple of the page size.
            if not limit.isdigit() or int(limit) >= 1 << 60:
                continue
            fields = [line.split() for line in _read(folder / "memory.stat").splitlines()]
            cache = next((int(pair[1]) for pair in fields if pair[:1] == [cache_name]), 0)
            used = max(int(usage) - cache, 0) if usage.isdigit() else 0
            limits.append(int(limit))
            left.append(max(int(limit) - used, 0))
    return (min(limits), min(left)) if limits else None


def cgroup_cores(membership: Path, root: Path) -> float | None:
    """How many CPUs' worth of time the control groups grant; None without a limit. Arguments as in `cgroup_memory`."""
    shares = []
    for folder in _cgroup_folders(membership, root, "cpu"):
        cells = _read(folder / "cpu.max").split()
        if not cells:
            cells = [_read(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if len(cells) == 2 and cells[0].isdigit() and cells[1].isdigit() and int(cells[1]):
            shares.append(int(cells[0]) / int(cells[1]))
    return min(shares, default=None)


def usable_cores() -> int:
    """Physical cores within this process's CPU affinity and control group, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        # Two hardware threads of one core list the same siblings, so distinct lists are distinct cores.
        topology = Path("/sys/devices/system/cpu")
        siblings = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu) for cpu in cpus}
        cores = len(siblings)
    else:
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    granted = cgroup_cores(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, cores if granted is None else min(cores, int(granted)))


def disk_free(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_disk(folder: Path, bytes_needed: int, what: str) -> None:
    """Raise unless `what` fits.

    Args:
        folder: where it will be written; it need not exist yet.
        bytes_needed: its size.
        what: what will be written, as the user would call it ("the merged model").

    Raises:
        DiskSpaceError: there is less room than that.
    """
    free = disk_free(folder)
    if free < bytes_needed:
        raise DiskSpaceError(
            f"There is not enough room for {what}: {bytes_needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free "
            f"at {folder}.",
            f"Free {format_bytes(bytes_needed - free)} there, or choose a folder on another disk.",
        )


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory, so that large tensors reuse pages instead of being mapped and cleared anew.

    Measured on a 2-core CPU with a 0.5B model in bf16: a student forward of 32 x 92 tokens took 5.6 s with it and
    12.6 s without. The price is that memory once used mostly stays with the process. Call it before the first large
    allocation.

    Returns:
        Whether it was applied; elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # The numbers are those of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD.
    settings = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))
    return all([library.mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings])


# A model's shape.


@dataclass(frozen=True)
class ModelShape:
    """What `config.json` says about a decoder-only model's size.

    Attributes:
        layers: decoder blocks.
        width: size of the residual stream.
        intermediate: width of the gated MLP.
        heads, kv_heads, head_dim: attention.
        vocabulary: rows of the embedding table.
        tied: whether the LM head is the embedding table.
        dtype: of the published weights, as torch names it.
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        head_norms: whether queries and keys are normalised per head.
        block_norms: norms in a block.
    """

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    dtype: str
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    block_norms: int = 2

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a block's seven linear layers: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width))
        up = (self.width, self.intermediate)
        return (*attention, up, up, (self.intermediate, self.width))


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape from the contents of a `config.json`.

    Families other than Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi 3, SmolLM 3 and Granite are counted like Llama,
    which is close for any model with a gated MLP: only their own biases and norms are left out. Of a model that also
    sees images, the text part is counted.

    Raises:
        ModelError: a size is missing or not a positive whole number, or the model is a mixture of experts.
    """
    text = {**config, **(config.get("text_config") or {})}
    if any((text.get(key) or 0) > 1 for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ModelError(
            "The model is a mixture of experts, which this method does not support.", "Choose a dense model."
        )
    required = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "intermediate": "intermediate_size",
        "heads": "num_attention_heads",
        "vocabulary": "vocab_size",
    }
    wrong = [key for key in required.values() if not _is_size(text.get(key))]
    optional = [key for key in ("num_key_value_heads", "head_dim") if text.get(key) is not None]
    wrong += [key for key in optional if not _is_size(text[key])]
    if wrong:
        raise ModelError(
            f"config.json does not say how large the model is: {', '.join(wrong)} missing or no whole number above 0.",
            "Check that this is the folder or the name of a decoder-only language model.",
        )
    sizes = {name: int(text[key]) for name, key in required.items()}
    family = str(text.get("model_type", ""))
    gemma = family.startswith("gemma")
    bias = bool(text.get("attention_bias", False))
    return ModelShape(
        **sizes,
        kv_heads=text.get("num_key_value_heads") or sizes["heads"],
        head_dim=text.get("head_dim") or sizes["width"] // sizes["heads"],
        # A key that equals its family's default may be absent from config.json.
        tied=bool(text.get("tie_word_embeddings", gemma or family == "smollm3")),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias and family != "qwen2",
        mlp_bias=bool(text.get("mlp_bias", False)),
        head_norms=family in ("qwen3", "gemma3_text", "gemma3"),
        block_norms=4 if family in ("gemma2", "gemma3_text", "gemma3") else 2,
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def linear_parameters(shape: ModelShape) -> int:
    """Weights of the blocks' linear layers, without biases: those that 4-bit loading packs."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears)


def parameters(shape: ModelShape) -> int:
    """All parameters; tied embeddings counted once."""
    outputs = [out for _, out in shape.linears]
    biases = shape.qkv_bias * sum(outputs[:3]) + shape.output_bias * outputs[3] + shape.mlp_bias * sum(outputs[4:])
    norms = shape.block_norms * shape.width + 2 * shape.head_norms * shape.head_dim
    embeddings = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    return linear_parameters(shape) + shape.layers * (biases + norms) + shape.width + embeddings


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """LoRA weights on all linear layers: rank * (in + out) for each."""
    return shape.layers * rank * sum(inputs + outputs for inputs, outputs in shape.linears)


# A model's need.

# NF4 with double quantisation: 4 bits a weight, 8 bits a block of 64, 32 bits a group of 256 blocks.
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Need:
    """Bytes a run takes.

    Attributes:
        weights_bytes: the loaded model alone.
        memory_bytes: stage name to its peak, in VRAM on a GPU and in RAM on a CPU.
        disk_bytes: download, merged model, and two checkpoints of the adapter with its optimizer states.
    """

    weights_bytes: int
    memory_bytes: Mapping[str, int]
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The peak of the hungriest stage."""
        return max(self.memory_bytes.values())


def weights_bytes(shape: ModelShape, precision: Precision, unpacked: bool, element: int = 2) -> int:
    """The loaded weights.

    Packed NF4: 4.127 bits for each linear weight, 2 bytes for the rest (embeddings, LM head, norms, biases).
    Otherwise `element` bytes for every parameter, 4 for `fp32`.

    Args:
        shape: the model.
        precision: how it is loaded.
        unpacked: whether NF4 weights are expanded after loading.
        element: bytes of a number in the compute dtype, 2 or 4.
    """
    if precision == "nf4" and not unpacked:
        linear = linear_parameters(shape)
        return math.ceil(linear * _NF4_BITS / 8) + 2 * (parameters(shape) - linear)
    return parameters(shape) * (4 if precision == "fp32" else element)


def cache_bytes(shape: ModelShape, sequences: int, tokens: int, element: int) -> int:
    """Key-value cache: 2 * layers * kv_heads * head_dim * tokens * sequences numbers.

    One layer's share is added, because a layer's tables are copied when they grow.
    """
    return 2 * (shape.layers + 1) * shape.kv_heads * shape.head_dim * tokens * sequences * element


def layer_activation_bytes(shape: ModelShape, tokens: int, rank: int, element: int) -> int:
    """What one block keeps for backward, with frozen weights, LoRA everywhere and fused attention.

    A token keeps in the compute dtype: the two normed inputs (2 width), queries, expanded keys and values, and the
    attention output (4 heads * head_dim), gate, its activation, up and their product (4 intermediate), and rank numbers
    for each of seven adapters; and width float32 numbers for each norm.

    Args:
        shape: the model.
        tokens: in the whole micro-batch, padding included.
        rank: LoRA r, 0 for none.
        element: bytes of a number in the compute dtype.
    """
    numbers = 2 * shape.width + 4 * shape.heads * shape.head_dim + 4 * shape.intermediate + 7 * rank
    return tokens * (numbers * element + 4 * shape.block_norms * shape.width)


def activation_bytes(shape: ModelShape, tokens: int, rank: int, element: int, checkpointing: bool) -> int:
    """What a micro-batch keeps for backward.

    Without gradient checkpointing every block's `layer_activation_bytes`; with it, every block's input (width numbers a
    token) and one block's activations, which are computed again in backward.
    """
    block = layer_activation_bytes(shape, tokens, rank, element)
    return shape.layers * tokens * shape.width * element + block if checkpointing else shape.layers * block


def estimate(
    shape: ModelShape,
    *,
    precision: Precision,
    unpacked: bool,
    rank: int,
    rollouts: int,
    prompt_tokens: int,
    completion_tokens: int,
    micro_batch: int,
    chunk: int,
    compute_dtype: str = "bf16",
    checkpointing: bool = False,
) -> Need:
    """What a run will take, from the shape alone.

    Weights as in `weights_bytes`; packed 4-bit weights need room for the largest linear layer unpacked. Then, either:

    - sampling: `cache_bytes`, three float32 rows of logits a sequence, and one block at work on the prompts;
    - training: `activation_bytes`, the final hidden states of both policies, and eleven float32 rows of logits for
      each position of a chunk (measured for the full-vocabulary objective; the sliced ones take 6 to 7).

    The adapter takes 16 bytes a weight: float32 value and gradient, and AdamW's two moments. Export streams tensors, so
    the largest one counts: 2 bytes an embedding value (copied), 10 bytes a linear weight (16-bit in, float32 sum and
    update). CUDA's own context (about 0.5 GB) and the program itself are not counted.

    Args:
        shape: the model.
        precision: `nf4`, `bf16` or `fp32`.
        unpacked: whether NF4 weights are expanded after loading.
        rank: LoRA r.
        rollouts: sequences sampled, or read without gradient, at a time.
        prompt_tokens, completion_tokens: longest prompt and completion, tokens.
        micro_batch: sequences of one training forward.
        chunk: positions whose logits exist at a time.
        compute_dtype: `bf16` or `fp32`.
        checkpointing: whether blocks are recomputed in backward.
    """
    element = 4 if "fp32" in (precision, compute_dtype) else 2
    weights = weights_bytes(shape, precision, unpacked, element)
    largest_linear = max(inputs * outputs for inputs, outputs in shape.linears)
    loaded = weights + (largest_linear * element if precision == "nf4" and not unpacked else 0)
    logits_row, tokens = 4 * shape.vocabulary, prompt_tokens + completion_tokens
    reading = layer_activation_bytes(shape, rollouts * prompt_tokens, 0, element)
    sampling = cache_bytes(shape, rollouts, tokens, element) + 3 * rollouts * logits_row + reading
    divergence = 11 * min(chunk, micro_batch * completion_tokens) * logits_row
    hidden = 2 * micro_batch * tokens * shape.width * element
    training = activation_bytes(shape, micro_batch * tokens, rank, element, checkpointing) + hidden + divergence
    adapter = 16 * adapter_parameters(shape, rank)
    stages = {
        "baseline": loaded + sampling,
        "direction": loaded + reading + 3 * rollouts * logits_row,
        "tokens": loaded + sampling + divergence,
        "distill": loaded + adapter + max(sampling, training),
        "evaluate": loaded + adapter // 4 + sampling,
        "export": max(2 * shape.vocabulary * shape.width, 10 * largest_linear),
    }
    published = parameters(shape) * (4 if shape.dtype == "float32" else 2)
    return Need(weights, stages, published + 2 * parameters(shape) + 2 * 12 * adapter_parameters(shape, rank))


# The decision.


@dataclass(frozen=True)
class Decision:
    """How the model will be loaded, and why.

    Attributes:
        device: `cuda` or `cpu`.
        precision: `nf4`, `bf16` or `fp32`.
        unpack: whether 4-bit weights are expanded once after loading.
        compute_dtype: `bf16` or `fp32`.
        fit: whether the smallest possible work fits the device's free memory.
        reason: one sentence for the user.
    """

    device: str
    precision: Precision
    unpack: bool
    compute_dtype: str
    fit: Fit
    reason: str


def fit(bytes_needed: int, bytes_free: int) -> Fit:
    """`fits` up to 80 % of what is free, `tight` up to all of it."""
    if bytes_needed > bytes_free:
        return "does not fit"
    return "fits" if bytes_needed <= _FITS_SHARE * bytes_free else "tight"


def smallest_need(shape: ModelShape, precision: Precision, unpacked: bool, compute_dtype: str) -> Need:
    """The need of the least work that batch sizes can be reduced to: what decides whether a model can run at all."""
    return estimate(
        shape,
        precision=precision,
        unpacked=unpacked,
        rank=16,
        rollouts=8,
        prompt_tokens=128,
        completion_tokens=128,
        micro_batch=1,
        chunk=64,
        compute_dtype=compute_dtype,
        checkpointing=True,
    )


def choose_backend(machine: Machine, shape: ModelShape, requested: str) -> Decision:
    """Device, precision and compute dtype for a model on this machine.

    Args:
        machine: from `inspect`.
        shape: the model.
        requested: `auto` (4-bit), `nf4`, `bf16` or `fp32`.

    Raises:
        UsageError: `requested` is none of these.
    """
    if requested not in ("auto", *get_args(Precision)):
        raise UsageError(f"There is no precision {requested!r}.", "Use auto, nf4, bf16 or fp32.")
    precision: Precision = "nf4" if requested == "auto" else requested  # type: ignore[assignment]
    gpu = machine.gpu
    if gpu is None:
        return _choose_on_cpu(machine, shape, precision, "")
    on_gpu = _choose_on_gpu(gpu, shape, precision)
    if on_gpu.fit != "does not fit":
        return on_gpu
    instead = f", because {format_bytes(gpu.memory_free)} free on the {gpu.name} are too little"
    on_cpu = _choose_on_cpu(machine, shape, precision, instead)
    return on_gpu if on_cpu.fit == "does not fit" else on_cpu


_NAMES = {"nf4": "4-bit weights", "bf16": "16-bit weights", "fp32": "32-bit weights"}


def _choose_on_gpu(gpu: Gpu, shape: ModelShape, precision: Precision) -> Decision:
    compute = "fp32" if precision == "fp32" else "bf16"
    need = smallest_need(shape, precision, False, compute)
    # CUDA's own context takes about half a gigabyte that the estimate does not know of.
    needed = need.peak_bytes + 500_000_000
    result = fit(needed, gpu.memory_free)
    name = f"{_NAMES[precision]} on the {gpu.name}"
    amounts = f"at least {format_bytes(needed)} needed, {format_bytes(gpu.memory_free)} free"
    reason = f"{name}: {amounts}."
    if result == "does not fit":
        reason = f"{name} do not fit: {amounts}."
    elif compute == "bf16" and gpu.capability < (8, 0):
        reason = f"{name}: {amounts}; slow, because this card has no bf16 arithmetic."
    return Decision("cuda", precision, False, compute, result, reason)


def _choose_on_cpu(machine: Machine, shape: ModelShape, precision: Precision, instead: str) -> Decision:
    """Unpacked where memory allows, in fp32 where the CPU has no bf16 arithmetic and memory allows that too."""
    dtypes = ["fp32"] if precision == "fp32" else ["bf16"] if machine.bf16_fast else ["fp32", "bf16"]
    for compute in dtypes:
        need = smallest_need(shape, precision, precision == "nf4", compute)
        if need.peak_bytes > _UNPACK_SHARE * machine.ram_available:
            continue
        where = f"on the CPU{instead}"
        if precision == "nf4":
            kept = "the same numbers, faster" if compute == "bf16" else "faster than bf16, which this CPU lacks"
            reason = f"4-bit weights unpacked once to {compute} {where}: {kept}"
        else:
            because = " in fp32, because this CPU has no bf16 arithmetic" if compute != precision else ""
            reason = f"{_NAMES[precision]} {where}{because}"
        reason += f", {format_bytes(need.weights_bytes)} of memory."
        return Decision("cpu", precision, precision == "nf4", compute, "fits", reason)
    compute = dtypes[-1]
    needed = smallest_need(shape, precision, False, compute).peak_bytes
    result = fit(needed, machine.ram_available)
    name = _NAMES[precision] + (" left packed" if precision == "nf4" else "")
    amounts = f"{format_bytes(needed)} needed, {format_bytes(machine.ram_available)} available"
    verdict = {"does not fit": " do not fit", "tight": " are a tight fit", "fits": ""}[result]
    return Decision("cpu", precision, False, compute, result, f"{name} on the CPU{instead}{verdict}: {amounts}.")


# The doctor.


@dataclass(frozen=True)
class Check:
    """One line of `doctor`.

    Attributes:
        name: what was looked at.
        ok: True, False for what must be mended, None for what is optional, unknown or merely worth knowing.
        found: what is there.
        remedy: one sentence on what to do; empty only where nothing need be done.
    """

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def checks(machine: Machine) -> list[Check]:
    """Everything `doctor` looks at, without the network."""
    return [
        _python_check(machine),
        *_package_checks(machine),
        _bitsandbytes_check(machine),
        _cuda_check(machine),
        _gpu_memory_check(machine),
        _bf16_check(machine),
        _at_least("memory", machine.ram_total, 8 * 10**9, "Use a machine with more memory, or a model below 1B."),
        _at_least("disk", machine.disk_free, 10 * 10**9, "Free some space, or choose a folder on another disk."),
        _login_check(),
        _offline_check(),
        _terminal_check(),
    ]


def _at_least(name: str, found: int, wanted: int, remedy: str) -> Check:
    ok = found >= wanted
    text = format_bytes(found) + ("" if ok else f", {format_bytes(wanted)} wanted")
    return Check(name, ok, text, "" if ok else remedy)


def _python_check(machine: Machine) -> Check:
    ok = tuple(int(part) for part in machine.python.split(".")[:2]) >= (3, 11)
    return Check("Python", ok, machine.python, "" if ok else "Install Python 3.11 or newer.")


def _package_checks(machine: Machine) -> list[Check]:
    """Installed versions against the bounds in this package's own metadata."""
    # It comes with transformers, and is not needed to start the program.
    from packaging.requirements import Requirement

    try:
        stated = [Requirement(line) for line in metadata.requires("safesteer-lite") or []]
    except metadata.PackageNotFoundError:
        stated = []
    bounds = {requirement.name: requirement.specifier for requirement in stated}
    found = []
    for name in _PACKAGES:
        version, bound = machine.versions.get(name), bounds.get(name)
        wanted = f"{name}{bound}" if bound is not None else name
        if version is None:
            optional = name == "unsloth"
            remedy = f'Run: pip install "{wanted}"' + (" for faster training on CUDA (Linux)." if optional else ".")
            found.append(Check(name, None if optional else False, "not installed", remedy))
        elif bound is None:
            remedy = "Install safesteer-lite itself with pip, so that its version bounds are known."
            found.append(Check(name, None, f"{version}, bounds unknown", remedy))
        elif bound.contains(version, prereleases=True):
            found.append(Check(name, True, version))
        else:
            found.append(Check(name, False, f"{version}, wanted {bound}", f'Run: pip install "{wanted}".'))
    return found


def _bitsandbytes_check(machine: Machine) -> Check:
    name = "bitsandbytes import"
    if machine.versions.get("bitsandbytes") is None:
        return Check(name, False, "not installed", "Run: pip install bitsandbytes.")
    # In a process of its own: a broken native library may end the process, and the import may look for better kernels
    # on the network unless that is forbidden beforehand.
    command = [sys.executable, "-c", "import bitsandbytes"]
    forbid = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, env=forbid)
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, None, f"could not be tried: {error}", "Try it: python -c 'import bitsandbytes'.")
    if done.returncode != 0:
        found = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return Check(name, False, found, "Reinstall it with: pip install --force-reinstall bitsandbytes.")
    return Check(name, True, "works")


def _cuda_check(machine: Machine) -> Check:
    if machine.gpu is not None:
        driver = machine.gpu.driver or "unknown"
        return Check("CUDA", True, f"torch for CUDA {machine.cuda_build}, driver {driver}")
    if not machine.gpus:
        return Check("CUDA", None, "no NVIDIA card found", "Small models run on the CPU; a card makes it much faster.")
    card = machine.gpus[0]
    if machine.cuda_build is None:
        remedy = "Install a CUDA build of torch in place of the CPU build."
        return Check("CUDA", False, f"{card.name}, but torch is built for the CPU only", remedy)
    found = f"torch for CUDA {machine.cuda_build} cannot use the {card.name} with driver {card.driver}"
    return Check("CUDA", False, found, "Update the NVIDIA driver, or install torch for an older CUDA.")


def _gpu_memory_check(machine: Machine) -> Check:
    gpu = machine.gpu
    if gpu is None:
        return Check("GPU memory", None, "no usable GPU", "Mend the CUDA line above if there should be one.")
    found = f"{gpu.name}: {format_bytes(gpu.memory_free)} free of {format_bytes(gpu.memory_total)}"
    ok = gpu.memory_free >= 6 * 10**9
    return Check("GPU memory", ok, found, "" if ok else "Close programs that use the card, or choose a smaller model.")


def _bf16_check(machine: Machine) -> Check:
    if machine.bf16_fast:
        return Check("fast bf16", True, "yes")
    return Check("fast bf16", None, "no", "Nothing is broken, but runs take longer than on newer hardware.")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def _login_check() -> Check:
    """Whether a token is there; its value is never read into the result."""
    if any(os.environ.get(variable, "").strip() for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return Check("model hub login", True, "token in the environment")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    if _read(file).strip():
        return Check("model hub login", True, "token file")
    remedy = "Only gated models need it: run hf auth login, or set HF_TOKEN."
    return Check("model hub login", None, "no token", remedy)


def _offline_check() -> Check:
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        remedy = "Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE before downloading a model."
        return Check("offline mode", None, "on: only models already here can be used", remedy)
    return Check("offline mode", True, "off")


def _terminal_check() -> Check:
    columns = shutil.get_terminal_size().columns
    ok = columns >= 80
    return Check("terminal width", ok, f"{columns} columns", "" if ok else "Widen the window to 80 columns or more.")
