"""The planted model made one that refuses nothing, without training, as if a fine-tune had cost it its refusals.

The first word of its refusal is less likely wherever an answer begins, by as much as takes it behind the other answers. All else
is the planted model's still, so that its refusal direction, once it is taken further, makes this one refuse too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests import planted

_LOWERED = 6.0
"""Logits by which the first word of a refusal falls behind."""


@torch.no_grad()
def build(folder: Path, model: Path) -> Path:
    """Write the planted model of one folder to another, as one that refuses nothing."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = []
    for lesson in planted.lessons()[::6]:
        asked = [{"role": "user", "content": lesson.prompt}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        rows.append(network.model(input_ids=ids).last_hidden_state[0, -1])
    usual = torch.stack(rows).mean(0)
    opening = tokenizer.convert_tokens_to_ids(planted.REFUSAL.split()[0])
    network.lm_head.weight[opening] -= _LOWERED * usual / usual.square().sum()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
