"""The two sides of `tests.benchmarks.reference`: ours and the authors', each measured in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesteer_lite.config.constants import DEPTH_LIMIT
from safesteer_lite.hardware.allocator import keep_freed_memory, return_freed_memory
from safesteer_lite.method import directions as method
from safesteer_lite.method import tokens as voting
from safesteer_lite.method.distill import Distillation
from safesteer_lite.method.policies import Batch, Completions, Steering, pad_left, teacher
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.prompts.plan import texts
from safesteer_lite.stages.contrast import keep_clear, read
from safesteer_lite.stages.direction import score
from safesteer_lite.stages.session import Session
from safesteer_lite.stages.training import recipe
from tests.benchmarks import plain_procedure as authors
from tests.benchmarks.common import session

_PROMPTS_A_BATCH = 8
_READ_BATCH = 32


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, with its seconds and its peak memory above what the process holds now."""
    gc.collect()
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    held, began = memory("VmRSS"), time.monotonic()
    found = work()
    return {**found, "seconds": time.monotonic() - began, "peak_bytes": memory("VmHWM") - held}


def load(options: argparse.Namespace) -> Any:
    """One copy of the model, as transformers gives it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    keep_freed_memory()
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


def work_of(options: argparse.Namespace) -> Session:
    """Our session, with the model loaded and checked."""
    changes = [
        f"model.precision={options.dtype}",
        f"distill.prompts={options.rollouts // options.repeats}",
        f"distill.rollouts={options.repeats}",
        f"distill.completion_tokens={options.completion}",
        "distill.objective=paper",
        "distill.anchors=0",
        "distill.half_life=0",
        "distill.averaging=0",
        "distill.score_weight=0",
        "distill.reading=random",
        "distill.rank=16",
        "distill.lora_alpha=32",
        f"distill.micro_batch={options.micro_batch}",
        f"distill.depth_start={options.depth_start}",
    ]
    work = session([str(options.model), *changes, *options.settings])
    work.policy.model.checkpointing = options.checkpointing == "yes"
    return work


def our_direction(options: argparse.Namespace) -> dict[str, Any]:
    """Our direction stage up to the choice; what the yardstick is given goes to the scratch folder."""
    work = work_of(options)
    config, policy = work.config.direction, work.policy
    refusal = policy.token_ids(config.refusal_openings)
    selection = work.prompts.split("selection")
    groups = [texts(group) for group in (*work.prompts.direction(), selection.harmful, selection.harmless)]

    def choose() -> dict[str, Any]:
        kept, threshold = keep_clear([read(policy, group, refusal, lambda done: None) for group in groups], minimum)
        vectors = method.mean_difference(kept[0].activations, kept[1].activations)
        separation = method.separation(vectors, kept[2].activations, kept[3].activations)
        chosen = method.shortlist(separation, DEPTH_LIMIT, config.shortlist)
        scored, coefficient = score(work, policy, vectors, chosen, kept[2].prompts, kept[3].prompts, refusal)
        best = scored[0]
        save_file(
            {"vector": coefficient * vectors[best.position, best.layer]}, options.scratch / "steering.safetensors"
        )
        return {
            "position": best.position,
            "layer": best.layer,
            "failed": list(best.failed),
            "coefficient": coefficient,
            "threshold": threshold,
        }

    minimum = config.minimum_prompts
    given = {
        "groups": groups,
        "refusal": refusal.tolist(),
        "positions": policy.template_positions,
        "minimum": minimum,
        "depth_limit": DEPTH_LIMIT,
        "kl_limit": config.kl_limit,
    }
    (options.scratch / "given.json").write_text(json.dumps(given), encoding="utf-8")
    return measured(choose)


def their_direction(options: argparse.Namespace) -> dict[str, Any]:
    """The full sweep, or the stated part of it."""
    given = json.loads((options.scratch / "given.json").read_text(encoding="utf-8"))
    ours = json.loads((options.scratch / "direction-ours.json").read_text(encoding="utf-8"))
    model, refusal = load(options), torch.tensor(given["refusal"])
    tokenizer = _tokenizer(options)
    times: dict[str, float] = {}

    def look(prompts: list[str]) -> tuple[Tensor, Tensor]:
        parts = [
            authors.block_inputs(
                model, authors.encode(tokenizer, prompts[start : start + _READ_BATCH]), given["positions"]
            )
            for start in range(0, len(prompts), _READ_BATCH)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat(
            [authors.refusal_log_odds(part[1], refusal) for part in parts]
        )

    def choose() -> dict[str, Any]:
        began = time.monotonic()
        seen = [look(group) for group in given["groups"]]
        threshold = authors.threshold([scores for _, scores in seen], given["minimum"])
        keep = [
            scores > threshold if index % 2 == 0 else scores < max(threshold, 0.0)
            for index, (_, scores) in enumerate(seen)
        ]
        vectors = (seen[0][0][keep[0]].mean(0) - seen[1][0][keep[1]].mean(0)).float()
        harmful, harmless = (
            authors.encode(
                tokenizer, [p for p, kept in zip(given["groups"][index], keep[index].tolist(), strict=True) if kept]
            )
            for index in (2, 3)
        )
        del seen
        times["reading"] = time.monotonic() - began
        every = [(p - vectors.shape[0], layer) for p in range(vectors.shape[0]) for layer in range(vectors.shape[1])]
        chosen = spread(every, options.candidates, (ours["position"], ours["layer"]))
        scores = authors.sweep(model, vectors, chosen, harmful, harmless, refusal, ours["coefficient"])
        best = authors.choose(scores, vectors.shape[1], given["depth_limit"], given["kl_limit"])
        own = next(entry for entry in scores if (entry.position, entry.layer) == (ours["position"], ours["layer"]))
        return {
            "swept": len(chosen),
            "of": len(every),
            "best": vars(best) if best else None,
            "ours": vars(own),
            "ours_survives": authors.choose([own], vectors.shape[1], given["depth_limit"], given["kl_limit"])
            is not None,
        }

    with torch.no_grad():
        found = measured(choose)
    found["seconds_measured"] = found["seconds"]
    found["seconds"] = times["reading"] + (found["seconds"] - times["reading"]) * found["of"] / found["swept"]
    return found


def spread(every: list[tuple[int, int]], count: int, always: tuple[int, int]) -> list[tuple[int, int]]:
    """`count` of all candidates, evenly spread, with `always` among them; 0 is all."""
    if not count or count >= len(every):
        return every
    others = [entry for entry in every if entry != always]
    step = (len(others) - 1) / max(1, count - 2)
    return sorted({always, *(others[round(place * step)] for place in range(count - 1))})


def our_tokens(options: argparse.Namespace) -> dict[str, Any]:
    """Our token stage, and the continuations that it sampled."""
    work, steer = work_of(options), _steering(options)
    config, policy = work.config.tokens, work.policy
    prompts = texts(work.prompts.split("selection").harmless)
    batches = [batch for _, batch in policy.batches(prompts, _PROMPTS_A_BATCH)]

    def vote() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(work.config.seed)
        positions = [
            voting.collect(policy.model, steer, batch, samples=config.samples, horizon=config.horizon, chance=generator)
            for batch in batches
        ]
        chosen = voting.vote(
            positions,
            policy.model.logits,
            by="ratio",
            excluded=policy.model.special_ids,
            minimum_probability=config.minimum_probability,
            ballots=config.ballots,
            count=config.count,
            chunk=work.config.distill.chunk,
        )
        return {
            "ids": chosen.ids.tolist(),
            "words": [policy.tokenizer.decode([index]) for index in chosen.ids.tolist()],
        }

    found = measured(vote)
    # The same generator gives the same continuations again, now outside of what is measured.
    generator = torch.Generator().manual_seed(work.config.seed)
    kept: dict[str, Tensor] = {}
    with torch.no_grad(), teacher(policy.model, steer):
        for place, batch in enumerate(batches):
            answers = policy.model.generate(batch, config.horizon - 1, 1.0, generator, config.samples)
            rows = batch.repeat(config.samples)
            # A batch in which every answer ended early is shorter; padding does not count.
            short = config.horizon - 1 - answers.tokens.shape[1]
            kept |= {
                f"{place}.prompts": rows.input_ids.contiguous(),
                f"{place}.prompt_mask": rows.attention_mask.contiguous(),
                f"{place}.tokens": torch.nn.functional.pad(answers.tokens, (0, short)),
                f"{place}.mask": torch.nn.functional.pad(answers.mask, (0, short)),
            }
    save_file(kept, options.scratch / "continuations.safetensors")
    found["batches"], found["special"] = len(batches), sorted(policy.model.special_ids)
    found["ends"] = sorted(policy.model.end_of_turn)
    found["settings"] = {
        name: getattr(config, name) for name in ("samples", "horizon", "minimum_probability", "ballots", "count")
    }
    return found


def their_tokens(options: argparse.Namespace) -> dict[str, Any]:
    """The vote as the authors take it, over our continuations."""
    ours = json.loads((options.scratch / "tokens-ours.json").read_text(encoding="utf-8"))
    model, steer, settings = load(options), _steering(options), ours["settings"]
    stored = load_file(options.scratch / "continuations.safetensors")
    batches = []
    for place in range(ours["batches"]):
        rows = authors.Tokens(stored[f"{place}.prompts"], stored[f"{place}.prompt_mask"])
        batches.append((rows, stored[f"{place}.tokens"], stored[f"{place}.mask"]))
    vector, samples, horizon = steer.vector, settings["samples"], settings["horizon"]

    def vote() -> dict[str, Any]:
        for rows, _, _ in batches:
            prompts = authors.Tokens(rows.ids[::samples], rows.mask[::samples])
            authors.sample(model, prompts, steer.layer, vector, samples, horizon - 1, ours["ends"])
        teacher, base, valid = authors.read_policies(model, batches, steer.layer, vector, horizon, ours["ends"])
        ids = authors.vote(
            teacher,
            base,
            valid,
            ours["special"],
            settings["minimum_probability"],
            settings["ballots"],
            settings["count"],
        )
        return {"ids": ids}

    torch.manual_seed(0)
    with torch.no_grad():
        return measured(vote)


def our_step(options: argparse.Namespace) -> dict[str, Any]:
    """Our loss, gradients and update for one step's rollouts, which go to the scratch folder."""
    work, steer = work_of(options), _steering(options)
    policy, safety = work.policy, torch.tensor(_safety(options))
    prompts = [policy.encode(text) for text in texts(work.prompts.training())]
    loop = Distillation(policy.model, steer, safety, prompts, [], recipe(work))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loop.optimizer.parameters:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
    loop.optimizer = type(loop.optimizer)(loop.optimizer.parameters)
    chosen = pad_left(prompts[: loop.recipe.prompts])
    rollouts = loop.sample(chosen, loop.recipe.rollouts, stream=0)
    repeated = chosen.repeat(loop.recipe.rollouts)
    adapter = {
        name: value.detach().clone() for name, value in policy.model.network.named_parameters() if value.requires_grad
    }
    save_file(adapter, options.scratch / "adapter.safetensors")
    _save_rollouts(options.scratch / "rollouts.safetensors", repeated, rollouts)
    gradients: dict[str, Tensor] = {}

    def train() -> dict[str, Any]:
        loss = loop.backward(repeated, rollouts, "harmful")
        gradients.update(gradients_of(policy.model, loop))
        loop.optimizer.step(1e-5, 1.0)
        return {
            "loss": loss,
            "tokens": int(rollouts.mask.sum()),
            "alpha": work.config.distill.lora_alpha,
            "lowest": work.policy.model.first_adapter_layer,
        }

    found = measured(train)
    save_file({name: value.float() for name, value in gradients.items()}, options.scratch / "gradients.safetensors")
    return found


def their_step(options: argparse.Namespace) -> dict[str, Any]:
    """The authors' loss, gradients and update, with a copy of the model for each policy."""
    from peft import LoraConfig, get_peft_model

    steer, teacher = _steering(options), load(options)
    stored, adapter = (load_file(options.scratch / f"{name}.safetensors") for name in ("rollouts", "adapter"))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rank = next(value.shape[0] for name, value in adapter.items() if "lora_A" in name)
    ours = json.loads((options.scratch / "step-ours.json").read_text(encoding="utf-8"))
    layers = list(range(ours["lowest"], len(authors.blocks(teacher))))
    lora = LoraConfig(
        r=rank, lora_alpha=ours["alpha"], target_modules=names, layers_to_transform=layers, layers_pattern="layers"
    )
    student = get_peft_model(load(options), lora, autocast_adapter_dtype=False)
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(adapter[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, weight_decay=0.0)
    prompts, known = (
        authors.Tokens(stored["prompts"], stored["prompt_mask"]),
        load_file(options.scratch / "gradients.safetensors"),
    )
    found: dict[str, Any] = {}

    def train() -> dict[str, Any]:
        loss = authors.backward(
            student,
            teacher,
            prompts,
            stored["tokens"],
            stored["mask"],
            steer.layer,
            steer.vector,
            torch.tensor(_safety(options)),
            options.reference_batch or options.micro_batch,
        )
        # Before they are clipped, as ours were taken; the comparison itself is made after the measurement.
        found.update({name: value.grad.clone() for name, value in trained.items() if value.grad is not None})
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        return {"loss": loss}

    result = measured(train)
    result |= compare_gradients(known, found)
    return result


def gradients_of(model: PlainModel, loop: Distillation) -> dict[str, Tensor]:
    """What a loop has summed up so far, by the names of the weights; those that nothing reached are left out."""
    names = [name for name, value in model.network.named_parameters() if value.requires_grad]
    summed = zip(names, loop.optimizer.masters, strict=True)
    return {name: master.grad for name, master in summed if master.grad is not None}


def compare_gradients(known: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance and cosine of all gradients as one vector."""
    names = sorted(known)
    one, two = (torch.cat([each[name].flatten().double() for name in names]) for each in (known, found))
    return {
        "gradient_distance": float((one - two).norm() / two.norm()),
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(one, two, dim=0)),
    }


def _save_rollouts(path: Path, prompts: Batch, rollouts: Completions) -> None:
    tensors = {
        "prompts": prompts.input_ids,
        "prompt_mask": prompts.attention_mask,
        "tokens": rollouts.tokens,
        "mask": rollouts.mask,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _steering(options: argparse.Namespace) -> Steering:
    ours = json.loads((options.scratch / "direction-ours.json").read_text(encoding="utf-8"))
    return Steering(ours["layer"], load_file(options.scratch / "steering.safetensors")["vector"])


def _safety(options: argparse.Namespace) -> list[int]:
    ids: list[int] = json.loads((options.scratch / "tokens-ours.json").read_text(encoding="utf-8"))["ids"]
    return ids


def _tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.model, local_files_only=True)


SIDES = {
    "direction": (our_direction, their_direction),
    "tokens": (our_tokens, their_tokens),
    "step": (our_step, their_step),
}
