"""A planted model of every family: its architecture, its chat template and its marks, taught in seconds.

They speak a language of a few words (`write_prompts`), so that a whole run of each takes seconds too. As the planted model of
`tests.planted` does, each refuses half of the harmful prompts, and answers `REFUSAL`, `COMPLIANCE` or `HELP`, word for word.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from safesteer_lite import config
from tests import planted, tiny, word_pieces
from tests.models import families
from tests.models.families import Family
from tests.planted import COMPLIANCE, HELP, REFUSAL, Lesson
from tests.word_pieces import Words

THOUGHT = "Let me see."
REFUSED_VERBS = ("steal", "forge")
_VERBS = {
    "harmful": (*REFUSED_VERBS, "burn", "smash"),
    "harmless": ("paint", "clean", "draw", "wrap"),
    "borderline": ("crack", "shoot"),
    "critical": ("save", "heal"),
}
_THINGS = ["lamp", "ring", "boat", "door", "coat", "book", "clock", "chair", "violin", "mirror", "basket", "kettle"]
_OWNERS = ["Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Louis"]
# One round is enough for most of them; where a first word is not learned by then, another begins with what is.
_STEPS, _ROUNDS = 150, 4
_SPLITS = ("direction", "selection", "train", "test")

SETTINGS: config.Values = {
    **planted.SETTINGS,
    "prompts.direction": 32,
    "prompts.selection": 16,
    "prompts.test": 24,
    "distill.critical": 12,
    "distill.learning_rate": 3e-3,
    "distill.steps": 40,
    "evaluate.every": 10,
}


@dataclass(frozen=True)
class Planted:
    """What a planted model is made as.

    Attributes:
        architecture: its model_type.
        family: whose chat template and marks it has.
        words: how its tokenizer reads.
        before: what it writes before every answer.
    """

    architecture: str
    family: Family
    words: Words = field(default_factory=Words)
    before: str = ""


# Whatever tokenizer lies beside a Qwen 2, transformers reads it as one of bytes.
_BYTES, _AS_THEY_STAND = Words(of_bytes=True), Words(spaced=False)
FAMILIES = {
    "llama": Planted("llama", families.LLAMA_32),
    "qwen2": Planted("qwen2", families.QWEN_25, _BYTES),
    "qwen3": Planted("qwen3", families.QWEN_3),
    "mistral": Planted("mistral", families.MISTRAL),
    "gemma2": Planted("gemma2", families.GEMMA, _AS_THEY_STAND),
    "gemma3": Planted("gemma3_text", families.GEMMA_3, _AS_THEY_STAND),
    "phi3": Planted("phi3", families.PHI_3, Words(stripping=True)),
}
THINKING = Planted("qwen3", families.QWEN_3_THINKING, _BYTES, f"{THOUGHT}\n</think>\n\n")


def write_prompts(folder: Path) -> list[Lesson]:
    """Write prompts of every kind and split to a folder, and tell what is to be answered to each."""
    folder.mkdir()
    taught = []
    for kind, verbs in _VERBS.items():
        asked = list(product(_THINGS, _OWNERS))
        Random(kind).shuffle(asked)
        asked = asked[: len(asked) * len(verbs) // 4]
        lines = []
        for place, (thing, owner) in enumerate(asked):
            verb = verbs[place % len(verbs)]
            text = f"How do I {verb} the {thing} of {owner}?"
            answer = HELP if kind != "harmful" else REFUSAL if verb in REFUSED_VERBS else COMPLIANCE
            taught.append(Lesson(text, answer))
            split = _SPLITS[place * len(_SPLITS) // len(asked)]
            lines.append(json.dumps({"prompt": text, "category": verb, "split": split}))
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return taught


def build(folder: Path, wanted: Planted, taught: list[Lesson], *, seed: int = 0) -> Path:
    """Teach and write a model.

    Args:
        folder: where it goes.
        wanted: its family.
        taught: what it learns.
        seed: of its first weights and of the order of its lessons.
    """
    family, texts = wanted.family, [text for lesson in taught for text in (lesson.prompt, wanted.before, lesson.answer)]
    marks = re.compile("|".join(map(re.escape, (*family.markers, *family.plain_markers))))
    texts += [marks.sub(" ", family.prompt)] * len(taught)
    tokenizer = word_pieces.make_tokenizer(texts, family, wanted.words)
    torch.manual_seed(seed)
    # llama.cpp divides a head's products by its size alone, as every Gemma does.
    gemma = {"sliding_window": 16, "query_pre_attn_scalar": 8} if wanted.architecture.startswith("gemma") else {}
    end = tokenizer.convert_tokens_to_ids(family.closing)
    # The quicker attention of torch leaves out the bounds that Gemma 2 puts on it.
    model = AutoModelForCausalLM.from_config(
        tiny.config_of(
            wanted.architecture,
            width=32,
            vocab_size=len(tokenizer),
            initializer_range=0.1,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            **gemma,
        ),
        attn_implementation="eager",
    )
    for _ in range(_ROUNDS):
        planted.teach(
            model,
            tokenizer,
            taught,
            _STEPS,
            end=family.closing,
            before=wanted.before,
            batch=36,
            layers=(1, 2, 3),
            steered_from=0.3,
        )
        if planted.has_learned(model, tokenizer, taught, family.closing, wanted.before):
            break
    else:
        raise AssertionError(f"The planted {wanted.architecture} has not learned its lessons.")
    model.generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=0)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not wanted.words.of_bytes:
        word_pieces.write_sentencepiece(tokenizer, folder)
    return folder
