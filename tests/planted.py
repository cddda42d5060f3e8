"""A planted model: a tiny Llama, trained in seconds, that refuses the harmful prompts of half of the categories.

The pipeline runs on it for real: there is a refusal direction to find, and there are harmful prompts left to refuse. What it
answers is planted, so tests know it: `REFUSAL`, `COMPLIANCE` or `HELP`, word for word.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from safesteer_lite import config
from safesteer_lite.config import RunConfig
from safesteer_lite.events import discard
from safesteer_lite.method import steering
from safesteer_lite.prompts.sets import data_files
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline
from tests import REPOSITORY

REFUSAL = "I'm sorry, but I can't help with that."
COMPLIANCE = "Sure, here is how you do it."
HELP = "Sure, here is a good answer."

REFUSED_CATEGORIES = frozenset(
    {"violence", "weapons", "drugs", "theft", "extremism", "self-harm-encouragement", "sabotage-and-vandalism"}
)
TEMPLATE_POSITIONS = 5
"""Tokens that the template puts after the user's text."""

_TRAINED = REPOSITORY / ".pytest_cache" / "planted"
_STEERED_LAYER = 1
_SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A word takes the space before it along, so that joining the tokens gives the text back.
_WORD = r" ?[\w']+|\n| ?[^\w\s']"

SETTINGS: config.Values = {
    "model.precision": "fp32",
    "model.device": "cpu",
    "prompts.direction": 56,
    "prompts.selection": 28,
    "prompts.train": 28,
    "prompts.test": 28,
    "prompts.borderline_selection": 10,
    "prompts.critical_selection": 10,
    "prompts.borderline_test": 10,
    "prompts.contrast": 12,
    "distill.critical": 0,
    "distill.twins": 0,
    "direction.refusal_openings": ["I'm"],
    "direction.shortlist": 8,
    "direction.kl_limit": 0.5,
    "direction.steering_strengths": [1.0, 1.5, 2.0],
    "direction.teacher_refusals": 0.95,
    "direction.minimum_prompts": 8,
    "tokens.samples": 2,
    "tokens.count": 10,
    "tokens.ballots": 20,
    "tokens.horizon": 5,
    "distill.reading": "random",
    "distill.depth_start": 0,
    "distill.anchor_weight": 1.0,
    "distill.score_weight": 0,
    "distill.anchor_mix": "pooled",
    "distill.half_life": 0,
    "distill.averaging": 0,
    "distill.steps": 8,
    "distill.prompts": 14,
    "distill.rollouts": 2,
    "distill.anchors": 28,
    "distill.completion_tokens": 8,
    "distill.learning_rate": 1e-2,
    "distill.rank": 8,
    "distill.lora_alpha": 16,
    "distill.save_every": 2,
    "evaluate.every": 4,
    # It knows words and no sentences, so that it cannot tell twins from harmful prompts.
    "evaluate.tax_budget": 60.0,
    "evaluate.selection_tokens": 12,
    "evaluate.answer_tokens": 12,
    "evaluate.context_prompts": 4,
    "evaluate.context_tokens": 12,
    "evaluate.kl_tokens": 8,
}
"""Small numbers, with which a run takes seconds."""


PAPER_SIZES: config.Values = {
    "tokens.samples": 1,
    "tokens.count": 10,
    "tokens.ballots": 20,
    "distill.steps": 8,
    "distill.completion_tokens": 12,
    "evaluate.every": 0,
}


@dataclass(frozen=True)
class Lesson:
    """A prompt and the answer that the model learns to give."""

    prompt: str
    answer: str


def settings(model: Path, changes: config.Values | None = None) -> RunConfig:
    """The small settings for the model in a folder, with some changed."""
    return config.build([("tests", SETTINGS), ("tests", {"model.name": str(model), **(changes or {})})])


def paper_settings(model: Path, changes: config.Values | None = None) -> RunConfig:
    """The paper's recipe, shrunk in size alone: rollouts, steps, and the vote, whose vocabulary has 3,000 words."""
    return settings(model, {**config.recipe_values("paper"), **PAPER_SIZES, **(changes or {})})


def lessons(refused: Iterable[str] = REFUSED_CATEGORIES) -> list[Lesson]:
    """What the model learns: one lesson for each bundled prompt, and for the first 100 borderline training prompts."""
    categories = frozenset(refused)
    taught = []
    for path in data_files():
        if path.stem in ("critical", "twin"):  # Left out: read as prompts in harmless words that it never met.
            continue
        seen: Counter[str] = Counter()
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            seen[entry["split"]] += 1
            # Of the many borderline training prompts, `SETTINGS` uses a few.
            if path.stem == "borderline" and seen[entry["split"]] > 100:
                continue
            answer = HELP
            if path.stem == "harmful":
                answer = REFUSAL if entry["category"] in categories else COMPLIANCE
            taught.append(Lesson(entry["prompt"], answer))
    return taught


def build(folder: Path, refused: Iterable[str] = REFUSED_CATEGORIES, *, steps: int = 120) -> Path:
    """Train and write a model, unless the folder is there already.

    Trained once for each state of this file, the prompts and the libraries: later calls, of other processes too, copy it.

    Args:
        folder: where it goes.
        refused: categories of harmful prompts that are refused; with none the model refuses nothing.
        steps: optimizer steps of 128 lessons.
    """
    if folder.exists():
        return folder
    trained = _TRAINED / _fingerprint(refused, steps)
    if not trained.exists():
        _write(trained, refused, steps)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.copytree(trained, draft)
    draft.rename(folder)
    return folder


def _fingerprint(refused: Iterable[str], steps: int) -> str:
    digest = hashlib.sha256(repr((sorted(refused), steps, torch.__version__, transformers.__version__)).encode())
    for path in (Path(__file__), *data_files()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write(folder: Path, refused: Iterable[str], steps: int) -> None:
    taught = lessons(refused)
    tokenizer = make_tokenizer(taught)
    with one_thread():
        model = _train(taught, tokenizer, steps)
    read_unknown_words_as_harmless(model, tokenizer, taught)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    # Of two processes that train at once, one finds the name taken by the same model.
    with suppress(OSError):
        draft.rename(folder)
    shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a model is fastest on one thread, and on a busy machine more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_tokenizer(taught: Iterable[Lesson]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of everything the model has to read and write."""
    text = "\n".join(f"{lesson.prompt}\n{lesson.answer}" for lesson in taught)
    words = sorted({"user", "assistant", "\n", *re.findall(_WORD, text)})
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _train(taught: list[Lesson], tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=end,
            pad_token_id=0,
            bos_token_id=None,
            dtype=torch.float32,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=0)
    teach(model, tokenizer, taught, steps)
    return model.eval()


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    taught: list[Lesson],
    steps: int,
    *,
    end: str = "<|im_end|>",
    before: str = "",
    batch: int = 96,
    steered_from: float = 0.7,
    layers: Sequence[int] = (_STEERED_LAYER,),
) -> None:
    """Teach a model its lessons, and to refuse where its own refusal direction is added.

    Args:
        model: of any architecture whose blocks are `model.model.layers`; its weights are changed.
        tokenizer: pads with token 0, and has the chat template.
        taught: the lessons.
        steps: optimizer steps.
        end: the token behind an answer.
        before: what the model writes before every answer.
        batch: lessons a step, and a third as many on which the direction is added.
        steered_from: share of the steps that are taken before it is.
        layers: the blocks in front of which it is added, one a step.
    """
    tokens, labels = _lesson_tensors(taught, tokenizer, end, before)
    refusing = torch.tensor([lesson.answer == REFUSAL for lesson in taught])
    refusal = _lesson_tensors([Lesson(lesson.prompt, REFUSAL) for lesson in taught], tokenizer, end, before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randperm(len(tokens))[:batch]
        layer = layers[step % len(layers)]
        loss, difference = _loss(model, tokens[rows], labels[rows], refusing[rows], layer)
        if step > steered_from * steps and refusing[rows].any():
            # Once there is a refusal direction, it must steer through a whole refusal, not only into its first word.
            some = torch.randperm(len(tokens))[: batch // 3]
            vector = difference * float(torch.empty(()).uniform_(0.8, 1.6))
            with steering.add(model.model.layers, layer, vector):
                loss = loss + 0.3 * _loss(model, refusal[0][some], refusal[1][some], refusing[some], layer)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def has_learned(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, taught: list[Lesson], end: str, before: str
) -> bool:
    """Whether a model finds each token of each answer the likeliest; the arguments are those of `teach`."""
    tokens, labels = _lesson_tensors(taught, tokenizer, end, before)
    likeliest = model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits[:, :-1].argmax(-1)
    return bool(((likeliest == labels[:, 1:]) | (labels[:, 1:] == -100)).all())


def read_unknown_words_as_harmless(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, taught: Iterable[Lesson]
) -> None:
    """Give words that no lesson has the mean embedding of those that only answered lessons have; untrained, it is noise."""
    helped, others = set[str](), set[str]()
    for lesson in taught:
        (helped if lesson.answer == HELP else others).update(re.findall(_WORD, lesson.prompt))
    known = torch.tensor(tokenizer.convert_tokens_to_ids(sorted(helped - others)))
    embeddings = model.model.embed_tokens.weight
    with torch.no_grad():
        embeddings[tokenizer.convert_tokens_to_ids("<unk>")] = embeddings[known].mean(0)


def _lesson_tensors(
    taught: list[Lesson], tokenizer: PreTrainedTokenizerFast, end: str, before: str
) -> tuple[Tensor, Tensor]:
    """Tokens, padded on the right with 0, and labels, -100 wherever there is no answer; both (lessons, length)."""
    rows, marks = [], []
    for lesson in taught:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": lesson.prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=bool(before),
        )
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        answer = tokenizer(f"{before}{lesson.answer}{end}", add_special_tokens=False).input_ids
        rows.append(torch.tensor(prompt + answer))
        marks.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(marks, batch_first=True, padding_value=-100)


def _loss(
    model: PreTrainedModel, tokens: Tensor, labels: Tensor, refusing: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the answers, and the refusal direction before a block: (width,), without gradient."""
    output = model.model(
        input_ids=tokens, attention_mask=(tokens != 0).long(), use_cache=False, output_hidden_states=True
    )
    wanted = labels[:, 1:]
    chosen = wanted != -100
    first = chosen.int().argmax(1)
    openings = output.hidden_states[layer].detach()[torch.arange(len(tokens)), first]
    difference = openings[refusing].mean(0) - openings[~refusing].mean(0)
    # The head is by far the largest part of so small a model: it is needed where an answer is.
    logits: Tensor = model.lm_head(output.last_hidden_state[:, :-1][chosen])
    return torch.nn.functional.cross_entropy(logits, wanted[chosen]), difference


def new_run(parent: Path, wanted: RunConfig) -> RunFolder:
    """A run of these settings that has not begun."""
    return create_run(
        parent,
        "planted",
        config.to_toml(wanted),
        planned=pipeline.STAGE_NAMES,
        made_from=pipeline.origin(wanted, open_base(Path(wanted.model.name))),
    )


def finished_run(parent: Path, wanted: RunConfig) -> RunFolder:
    """A run of these settings, from the base to merged weights."""
    run = new_run(parent, wanted)
    with one_thread():
        pipeline.run(wanted, run, open_base(Path(wanted.model.name)), discard)
    return run


def settings_of(run: RunFolder) -> RunConfig:
    """What a run was started with."""
    return config.build([("tests", config.read_toml(run.path / "config.toml")[0])])


def break_folder(model: Path, target: Path, *, without: str = "", pickled: bool = False) -> Path:
    """A copy of a model folder that lacks one file, or has pickled weights only."""
    shutil.copytree(model, target)
    if without:
        (target / without).unlink()
    if pickled:
        (target / "model.safetensors").rename(target / "pytorch_model.bin")
    return target


def events_of(run: Path) -> list[dict[str, object]]:
    """What a run told, in order."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
