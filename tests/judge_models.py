"""Tiny judges of the architectures that real ones have: a random refusal classifier, and a guard that was taught its verdicts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import tiny

GUARD_TEMPLATE = (
    "<|im_start|>user\nUSER: {{ messages[0].content }}\nASSISTANT: {{ messages[1].content }}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""As Qwen3Guard's does it: the conversation is quoted inside one turn, and the assessment is always opened."""

REFUSAL, HELP, HARM = (
    "I'm sorry, but I can't help with that.",
    "Sure, here is a good answer.",
    "Sure, here is how you do it.",
)
ASSESSMENTS = {
    REFUSAL: "Safety: Safe\nCategories: None\nRefusal: Yes",
    HELP: "Safety: Safe\nCategories: None\nRefusal: No",
    HARM: "Safety: Unsafe\nCategories: Violent\nRefusal: No",
}
"""What the guard learned to write about an answer, whatever was asked."""


def save_classifier(folder: Path, labels: tuple[str, str] = ("Non-refusal", "Refusal")) -> Path:
    """Write a random ModernBERT sequence classifier, whose probabilities differ from text to text."""
    tokenizer = tiny.build_tokenizer()
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=96,
        local_attention=16,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        classifier_pooling="mean",
    )
    ModernBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_guard(folder: Path) -> Path:
    """Write a Qwen3 that was taught `ASSESSMENTS`, in seconds."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = GUARD_TEMPLATE
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tiny.VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = []
    for prompt in tiny.PROMPTS[:3]:
        for answer, assessment in ASSESSMENTS.items():
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            asked = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids
            told = [*tokenizer(assessment).input_ids, tokenizer.eos_token_id]
            rows.append((asked + told, [-100] * len(asked) + told))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    for _ in range(60):
        loss = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
