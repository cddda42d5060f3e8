"""The machine, a model's need and the decision: counted against real tiny models and planted machines."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from safesteer_lite import hardware
from safesteer_lite.errors import DiskSpaceError, ModelError, UsageError
from safesteer_lite.hardware import Gpu, Machine, ModelShape

GB = 10**9

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "pad_token_id": 0,
}
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Qwen2.5-0.5B and Llama 3.1 8B, whose published sizes are 494,032,768 and 8,030,261,248 parameters.
SMALL = ModelShape(24, 896, 4864, 14, 2, 64, 151936, True, "bfloat16", qkv_bias=True)
LARGE = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, False, "bfloat16")

CPU_MACHINE = Machine(
    system="Linux",
    python="3.11.7",
    cpu="a CPU",
    cores=4,
    ram_total=32 * GB,
    ram_available=24 * GB,
    disk_free=100 * GB,
    gpus=(),
    versions={name: "1.0" for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
    cuda_build=None,
    bf16_fast=True,
)
CARD = Gpu("a card", 12 * GB, 11 * GB, (8, 6), "570.1", True)


def tiny(family: str, **options: Any) -> tuple[dict[str, Any], Any]:
    """A model of random weights without storage, and its config as it stands in config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, **{key: value for key, value in {**SIZES, **options}.items() if value is not None}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # What is written leaves out defaults, as a published config.json may.
    return json.loads(config.to_json_string(use_diff=True)), model


def shape_of(family: str, **options: Any) -> tuple[ModelShape, Any]:
    config, model = tiny(family, **options)
    return hardware.shape_from_config(config), model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True, "head_dim": None}),
        ("qwen2", {"tie_word_embeddings": False, "head_dim": None}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {"head_dim": None}),
        ("smollm3", {"head_dim": None}),
        ("granite", {"head_dim": None}),
    ],
)
def test_parameters_are_exact(family: str, options: dict[str, Any]) -> None:
    shape, model = shape_of(family, **options)
    assert hardware.parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert hardware.linear_parameters(shape) == sum(module.weight.numel() for module in linear)


def test_published_sizes() -> None:
    assert hardware.parameters(SMALL) == 494_032_768
    assert hardware.parameters(LARGE) == 8_030_261_248


def test_shape_reads_dtype_under_both_names_and_the_text_part_of_an_image_model() -> None:
    config, _ = tiny("llama")
    config.pop("dtype", None)
    assert hardware.shape_from_config({**config, "torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert hardware.shape_from_config({**config, "dtype": "float16"}).dtype == "float16"
    nested = hardware.shape_from_config({"model_type": "seer", "dtype": "float16", "text_config": config})
    assert nested == hardware.shape_from_config({**config, "dtype": "float16"})


@pytest.mark.parametrize("value", [None, 0, "64", 1.5, True])
def test_shape_names_every_missing_size(value: object) -> None:
    config, _ = tiny("llama")
    del config["vocab_size"]
    with pytest.raises(ModelError) as error:
        hardware.shape_from_config({**config, "hidden_size": value})
    assert "hidden_size, vocab_size" in error.value.message
    assert error.value.hint


def test_mixture_of_experts_is_refused() -> None:
    config, _ = tiny("llama")
    with pytest.raises(ModelError, match="mixture of experts"):
        hardware.shape_from_config({**config, "num_local_experts": 8})


def test_adapter_parameters_equal_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    shape, model = shape_of("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LORA))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert hardware.adapter_parameters(shape, 4) == trained


def stored_bytes(model: nn.Module) -> int:
    """Bytes of every parameter, with the statistics of 4-bit ones."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(value.nbytes for value in state.as_dict(packed=True).values() if isinstance(value, Tensor))
    return total


def test_weights_equal_a_loaded_models_tensors(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 1344, "head_dim": 128, "vocab_size": 1000}
    LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 2})).bfloat16().save_pretrained(tmp_path)
    shape = hardware.shape_from_config(json.loads((tmp_path / "config.json").read_text()))
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    for precision, dtype, options in (
        ("nf4", torch.bfloat16, {"quantization_config": packing}),
        ("bf16", torch.bfloat16, {}),
        ("fp32", torch.float32, {}),
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map={"": "cpu"}, **options)
        counted = hardware.weights_bytes(shape, precision, unpacked=False)  # type: ignore[arg-type]
        assert counted == pytest.approx(stored_bytes(model), rel=0.02 if precision == "nf4" else 0)
    assert hardware.weights_bytes(shape, "nf4", unpacked=True) == hardware.weights_bytes(shape, "bf16", unpacked=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "intermediate"), [(8, 2, 384), (4, 4, 200)])
def test_activations_equal_what_autograd_keeps(
    dtype: torch.dtype, heads: int, kv_heads: int, intermediate: int
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=LORA), autocast_adapter_dtype=False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, :5] = (
        0  # Prompts differ in length, and a padded batch keeps more: keys and values are expanded to all heads.
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for start, tensor in kept.items() if start not in weights)
    shape = hardware.shape_from_config(config.to_dict())
    element = dtype.itemsize
    # The final norm is outside the blocks.
    counted = hardware.activation_bytes(shape, 120, 8, element, checkpointing=False) + 120 * 128 * 4
    assert counted == pytest.approx(real, rel=0.03)
    checkpointed = hardware.activation_bytes(shape, 120, 8, element, checkpointing=True)
    assert checkpointed == 4 * 120 * 128 * element + hardware.layer_activation_bytes(shape, 120, 8, element)


def test_cache_equals_a_real_one() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES)
    output = LlamaForCausalLM(config)(input_ids=torch.ones(2, 7, dtype=torch.long), use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    shape = hardware.shape_from_config(config.to_dict())
    assert hardware.cache_bytes(shape, 2, 7, 4) * shape.layers == real * (shape.layers + 1)


def estimate(shape: ModelShape, **changes: Any) -> hardware.Need:
    work: dict[str, Any] = {
        "precision": "nf4",
        "unpacked": False,
        "rank": 16,
        "rollouts": 8,
        "prompt_tokens": 64,
        "completion_tokens": 64,
        "micro_batch": 2,
        "chunk": 32,
    }
    return hardware.estimate(shape, **{**work, **changes})


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("rollouts", "baseline"),
        ("rollouts", "direction"),
        ("chunk", "tokens"),
        ("micro_batch", "distill"),
        ("rank", "distill"),
        ("completion_tokens", "evaluate"),
        ("prompt_tokens", "direction"),
    ],
)
def test_more_work_needs_more_memory(setting: str, stage: str) -> None:
    less, more = estimate(LARGE, **{setting: 32}), estimate(LARGE, **{setting: 64})
    assert more.memory_bytes[stage] > less.memory_bytes[stage]
    assert more.weights_bytes == less.weights_bytes


def test_an_8b_model_fits_a_consumer_card_packed_only() -> None:
    packed, plain = estimate(LARGE, checkpointing=True), estimate(LARGE, precision="bf16", checkpointing=True)
    assert 5.5 * GB < packed.weights_bytes < 6 * GB
    assert packed.peak_bytes < 9 * GB < 16 * GB < plain.peak_bytes
    assert packed.memory_bytes["export"] < 6 * GB
    # Download and merged model, 16.06 GB each, and a little for the checkpoints.
    assert 32.1 * GB < packed.disk_bytes < 34 * GB


def test_cpu_with_fast_bf16_unpacks() -> None:
    decision = hardware.choose_backend(CPU_MACHINE, SMALL, "auto")
    assert (decision.device, decision.precision, decision.unpack) == ("cpu", "nf4", True)
    assert (decision.compute_dtype, decision.fit) == ("bf16", "fits")
    assert decision.reason == (
        "4-bit weights unpacked once to bf16 on the CPU: the same numbers, faster, 988.1 MB of memory."
    )


def test_cpu_without_fast_bf16_computes_in_fp32_while_memory_allows() -> None:
    machine = replace(CPU_MACHINE, bf16_fast=False)
    roomy = hardware.choose_backend(machine, SMALL, "nf4")
    assert (roomy.unpack, roomy.compute_dtype) == (True, "fp32")
    assert "fp32 on the CPU" in roomy.reason and "2.0 GB" in roomy.reason
    tighter = hardware.choose_backend(replace(machine, ram_available=3 * GB), SMALL, "nf4")
    assert (tighter.unpack, tighter.compute_dtype) == (True, "bf16")
    assert hardware.choose_backend(machine, SMALL, "bf16").compute_dtype == "fp32"
    assert hardware.choose_backend(machine, SMALL, "fp32").compute_dtype == "fp32"


def test_unpacking_stops_at_sixty_percent_of_memory() -> None:
    need = hardware.smallest_need(SMALL, "nf4", True, "bf16").peak_bytes
    enough, too_little = int(need / 0.6) + 1, int(need / 0.6) - 2
    assert hardware.choose_backend(replace(CPU_MACHINE, ram_available=enough), SMALL, "auto").unpack
    packed = hardware.choose_backend(replace(CPU_MACHINE, ram_available=too_little), SMALL, "auto")
    assert not packed.unpack and packed.fit == "fits" and "left packed on the CPU" in packed.reason
    nothing = hardware.choose_backend(replace(CPU_MACHINE, ram_available=GB // 2), SMALL, "auto")
    assert nothing.fit == "does not fit" and "do not fit" in nothing.reason


def test_a_card_is_used_packed_and_left_when_it_is_too_small() -> None:
    machine = replace(CPU_MACHINE, gpus=(replace(CARD, name="spare", memory_free=GB), CARD))
    chosen = hardware.choose_backend(machine, LARGE, "auto")
    assert (chosen.device, chosen.precision, chosen.unpack, chosen.fit) == ("cuda", "nf4", False, "fits")
    assert "4-bit weights on the a card" in chosen.reason and "11.0 GB" in chosen.reason
    full = replace(machine, gpus=(replace(CARD, memory_free=2 * GB),))
    on_cpu = hardware.choose_backend(full, LARGE, "auto")
    assert on_cpu.device == "cpu" and "because 2.0 GB free on the a card are too little" in on_cpu.reason
    neither = hardware.choose_backend(replace(full, ram_available=2 * GB), LARGE, "auto")
    assert (neither.device, neither.fit) == ("cuda", "does not fit")
    broken = replace(machine, gpus=(replace(CARD, usable=False),))
    assert hardware.choose_backend(broken, SMALL, "auto").device == "cpu"
    old = replace(machine, gpus=(replace(CARD, capability=(7, 5)),))
    assert "slow" in hardware.choose_backend(old, SMALL, "auto").reason


def test_every_reason_is_one_sentence() -> None:
    for fast in (True, False):
        for gpus in ((), (CARD,), (replace(CARD, memory_free=GB),)):
            for available in (GB // 2, 3 * GB, 24 * GB):
                for requested in ("auto", "nf4", "bf16", "fp32"):
                    for shape in (SMALL, LARGE):
                        machine = replace(CPU_MACHINE, bf16_fast=fast, gpus=gpus, ram_available=available)
                        reason = hardware.choose_backend(machine, shape, requested).reason
                        assert reason.endswith(".") and ". " not in reason and "  " not in reason


def test_unknown_precision() -> None:
    with pytest.raises(UsageError, match="int3"):
        hardware.choose_backend(CPU_MACHINE, SMALL, "int3")


def test_fit_has_three_answers() -> None:
    assert [hardware.fit(needed, 100) for needed in (80, 81, 100, 101)] == ["fits", "tight", "tight", "does not fit"]


def test_inspect_sees_this_machine(tmp_path: Path) -> None:
    import psutil

    machine = hardware.inspect(tmp_path / "not" / "there" / "yet")
    assert machine.versions["torch"] == torch.__version__
    assert machine.cuda_build == torch.version.cuda
    assert 1 <= machine.cores <= (psutil.cpu_count() or 1)
    assert 0 < machine.ram_available <= machine.ram_total <= psutil.virtual_memory().total
    assert machine.disk_free > 0 and machine.cpu and machine.system
    flags = Path("/proc/cpuinfo")
    if flags.exists() and machine.gpu is None:
        assert machine.bf16_fast == any(flag in flags.read_text().split() for flag in ("avx512_bf16", "amx_tile"))


def test_importing_needs_no_torch() -> None:
    code = (
        "import sys, safesteer_lite.hardware; print(sorted({'torch', 'transformers', 'packaging'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nvidia_smi_lines() -> None:
    text = (
        "NVIDIA GeForce RTX 3060, 12288, 11500, 8.6, 570.86.10\nNo devices were found\nold card, 4096, 4000, [N/A], 1\n"
    )
    (gpu,) = hardware.parse_nvidia_smi(text)
    assert gpu == Gpu("NVIDIA GeForce RTX 3060", 12288 << 20, 11500 << 20, (8, 6), "570.86.10", False)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_control_groups_of_version_2_and_their_parents(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "groups"
    membership.write_text("0::/outer/inner\n")
    write(root / "outer", memory__max="8000", memory__current="5000", memory__stat="anon 10\ninactive_file 1000")
    write(root / "outer" / "inner", memory__max="max", memory__current="200", cpu__max="150000 100000")
    write(root / "elsewhere", memory__max="10", memory__current="1")
    # The outer group limits, and its page cache counts as free: 8000 - (5000 - 1000).
    assert hardware.cgroup_memory(membership, root) == (8000, 4000)
    assert hardware.cgroup_cores(membership, root) == 1.5


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    membership, root = tmp_path / "membership", tmp_path / "groups"
    membership.write_text("5:memory:/a\n4:cpu,cpuacct:/a\n1:name=systemd:/a\n")
    write(root / "memory", memory__limit_in_bytes=str((1 << 63) - 4096), memory__usage_in_bytes="9")
    write(root / "cpu", **{"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"})
    assert hardware.cgroup_memory(membership, root) is None
    assert hardware.cgroup_cores(membership, root) is None
    write(root / "memory" / "a", memory__limit_in_bytes="6000", memory__usage_in_bytes="7000")
    write(root / "cpu" / "a", **{"cpu__cfs_quota_us": "200000", "cpu__cfs_period_us": "100000"})
    assert hardware.cgroup_memory(membership, root) == (6000, 0)
    assert hardware.cgroup_cores(membership, root) == 2.0
    assert hardware.cgroup_memory(tmp_path / "no file", root) is None


def found(machine: Machine) -> dict[str, hardware.Check]:
    return {check.name: check for check in hardware.checks(machine)}


def plant_package(folder: Path, monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    """Install metadata of this package, with these requirements, in front of any other."""
    lines = ["Metadata-Version: 2.4", "Name: safesteer-lite", "Version: 0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    write(folder / "safesteer_lite-0.dist-info", METADATA="\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))


def test_versions_are_held_against_the_packages_own_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path, monkeypatch, "torch>=2.6,<2.15", "transformers<=5.17.0,>=5.0", "peft>=0.18,<0.22")
    versions = {"torch": "2.13.0+cpu", "transformers": "5.18.0", "peft": None, "accelerate": "1.15.0"}
    seen = found(replace(CPU_MACHINE, versions=versions))
    assert seen["torch"].ok is True
    assert (
        seen["transformers"].ok is False and 'pip install "transformers<=5.17.0,>=5.0"' in seen["transformers"].remedy
    )
    assert seen["peft"].ok is False and seen["peft"].found == "not installed"
    assert seen["accelerate"].ok is None and "bounds unknown" in seen["accelerate"].found
    assert seen["unsloth"].ok is None
    assert seen["bitsandbytes import"].ok is False


def test_doctor_tells_the_ways_cuda_fails_apart() -> None:
    card = replace(CARD, usable=False)
    none = {**CPU_MACHINE.versions, "bitsandbytes": None}
    machine = replace(CPU_MACHINE, versions=none)
    assert found(machine)["CUDA"].ok is None
    assert "CPU only" in found(replace(machine, gpus=(card,)))["CUDA"].found
    assert "driver" in found(replace(machine, gpus=(card,), cuda_build="12.8"))["CUDA"].remedy
    works = found(replace(machine, gpus=(CARD,), cuda_build="12.8"))
    assert works["CUDA"].ok is True and works["GPU memory"].ok is True
    assert found(replace(machine, gpus=(replace(CARD, memory_free=2 * GB),)))["GPU memory"].ok is False


def test_whatever_is_not_well_has_a_remedy_and_the_token_stays_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "60")
    poor = replace(
        CPU_MACHINE, python="3.9.1", ram_total=4 * GB, disk_free=GB, bf16_fast=False, versions={}, cuda_build=None
    )
    seen = found(poor)
    bad = {"Python", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "bitsandbytes import"}
    assert {name for name, check in seen.items() if check.ok is False} == bad | {"memory", "disk", "terminal width"}
    assert all(check.remedy.endswith(".") for check in seen.values() if check.ok is not True)
    assert seen["model hub login"].ok is None and seen["offline mode"].ok is None
    write(tmp_path, token="secret-value")
    assert found(poor)["model hub login"].found == "token file"
    monkeypatch.setenv("HF_TOKEN", "secret-value")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    checks = hardware.checks(poor)
    assert "secret-value" not in repr(checks)
    assert found(poor)["model hub login"].ok is True and found(poor)["offline mode"].ok is True


def test_bitsandbytes_is_really_imported_and_kept_off_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "bitsandbytes.py"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    planted.write_text("import os\nassert os.environ['HF_HUB_OFFLINE'] == '1'\n")
    assert found(CPU_MACHINE)["bitsandbytes import"].ok is True
    planted.write_text("raise OSError('libsomething is missing')\n")
    check = found(CPU_MACHINE)["bitsandbytes import"]
    assert check.ok is False and "libsomething is missing" in check.found and check.remedy
    planted.write_text("import os\nos.abort()\n")
    assert found(CPU_MACHINE)["bitsandbytes import"].ok is False


def test_check_disk_says_what_is_needed_and_free(tmp_path: Path) -> None:
    hardware.check_disk(tmp_path / "new" / "folder", 1, "the report")
    free = hardware.disk_free(tmp_path)
    with pytest.raises(DiskSpaceError) as error:
        hardware.check_disk(tmp_path / "new", free + 5 * GB, "the merged model")
    assert "the merged model" in error.value.message
    assert f"{(free + 5 * GB) / GB:.1f} GB needed" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (11_200_000_000, "11.2 GB"),
        (3 * 10**12, "3.0 TB"),
        (-5, "-5 B"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert hardware.format_bytes(count) == text


@given(st.integers(min_value=0, max_value=10**15))
def test_format_bytes_is_close(count: int) -> None:
    number, unit = hardware.format_bytes(count).split()
    factor = 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert float(number) * factor == pytest.approx(count, rel=0.051)
    assert float(number) < 1000 or unit == "TB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
        (-3, "0 s"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert hardware.format_duration(seconds) == text


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """A large block taken again brings no page faults, where without the setting every page is mapped anew."""
    code = """
import resource, sys
from safesteer_lite.hardware import keep_freed_memory
applied = keep_freed_memory() if sys.argv[1] == "with" else True
bytearray(b"x") * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(b"x") * (64 << 20)
print(int(applied), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(mode: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True)
        applied, count = done.stdout.split()
        return int(applied), int(count)

    applied, kept = faults("with")
    if not applied:
        pytest.skip("the C library is not glibc")
    _, anew = faults("without")
    assert kept < 100
    assert anew > 100
