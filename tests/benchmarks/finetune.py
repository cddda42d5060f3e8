"""A fine-tune on harmless data, as hobbyists make them: does it lose refusals, and does a run bring them back?

python -m tests.benchmarks.finetune MODEL PROBLEMS.jsonl OUT [--first 100] [--count 400] [--rate 5e-4] [--epochs 1]
    [--precision bf16]

PROBLEMS has one `question` and `answer` a line, as GSM8K does (github.com/openai/grade-school-math); the first `--first` of them
are left alone, so that they can be solved afterwards. The model is trained by LoRA on all linear layers to give the answers
as they stand there, merged, and written to OUT, a model folder like any other.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from safesteer_lite.export.weights.merge import merge_adapter
from safesteer_lite.method.policies import Batch
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import Adapter, save_adapter, with_adapter
from safesteer_lite.models.loaded import PlainModel
from safesteer_lite.models.template import ChatTemplate
from safesteer_lite.sources.base import open_base
from tests.benchmarks.common import say

RANK, WARMUP, BATCH = 16, 5, 8
# A calculator's marks inside the answers, which nobody wants in a model's own.
_MARKS = re.compile(r"<<[^>]*>>")


def main() -> None:
    """Train, merge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("problems", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="what is computed in")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    base = open_base(arguments.model)
    network, tokenizer = plain.load(base, precision=arguments.precision, device="cpu", unpack=False)
    model = with_adapter(network, tokenizer, Adapter(RANK, 2 * RANK), seed=0)
    template = ChatTemplate(tokenizer, date(2026, 11, 26))
    lines = arguments.problems.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[arguments.first : arguments.first + arguments.count]]
    end = min(model.end_of_turn) if template.end is None else template.end
    pairs = []
    for row in rows:
        asked = template.encode([{"role": "user", "content": row["question"]}])
        answered = tokenizer(_MARKS.sub("", row["answer"]), add_special_tokens=False).input_ids
        pairs.append((asked, [*answered, end]))

    masters = model.parameters_to_train()
    copies = [parameter.detach().float().clone().requires_grad_() for parameter in masters]
    optimizer = torch.optim.AdamW(copies, lr=arguments.rate, weight_decay=0.0)
    steps = arguments.epochs * (len(pairs) // BATCH)
    order = torch.cat([torch.randperm(len(pairs)) for _ in range(arguments.epochs)]).tolist()
    for step in range(steps):
        # Problems of one length beside each other, two at a time: less padding, and less memory.
        rows_of_step = sorted(order[step * BATCH : (step + 1) * BATCH], key=lambda row: sum(map(len, pairs[row])))
        rate = min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = arguments.rate * rate
        losses = []
        for start in range(0, BATCH, 2):
            losses.append(loss_of(model, [pairs[row] for row in rows_of_step[start : start + 2]]))
            (losses[-1] * 2 / BATCH).backward()
        for copy, parameter in zip(copies, masters, strict=True):
            copy.grad, parameter.grad = parameter.grad.float() if parameter.grad is not None else None, None
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(copies, masters, strict=True):
                parameter.copy_(copy)
        say(f"step {step + 1} of {steps}: {sum(loss.item() for loss in losses) / len(losses):.4f} nats a token")
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder))
        merge_adapter(arguments.model, Path(folder), arguments.out)


def loss_of(model: PlainModel, pairs: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean negative log-likelihood of the answers, nats a token."""
    length = max(len(asked) + len(answered) for asked, answered in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.int64)
    there, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (asked, answered) in enumerate(pairs):
        text = torch.tensor(asked + answered)
        ids[row, -len(text) :], there[row, -len(text) :] = text, 1
        wanted[row, -len(answered) :] = True
    hidden = model.final(model.start(Batch(ids, there)))[:, :-1]
    logits = model.logits(hidden[wanted[:, 1:]]).float()
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted[:, 1:]])


if __name__ == "__main__":
    main()
