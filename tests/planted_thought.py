"""The planted model made one that thinks before every answer, without training: three tokens more, and what they do.

The template opens a thought at `<think>`, behind which the model writes `THOUGHT` and `</think>`. To the model `</think>` looks
as the line break at the end of the planted template does, so it answers behind it what the planted model answers. With a switch,
`enable_thinking`, the template closes the thought at once where it is false.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests import planted

THOUGHT = "hmhm"
_OPENING, _CLOSING = "<think>", "</think>"
# As of a model that reasons before every answer; nothing stands between its thought and its answer.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'].replace('</think>\n\n', '</think>') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<think>{% endif %}"
)
_SWITCHED = "<think>{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"


@torch.no_grad()
def build(folder: Path, model: Path, *, switch: bool = False) -> Path:
    """Write the planted model of one folder to another, as one that thinks; with a switch, it need not."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in (_OPENING, THOUGHT, _CLOSING)])
    tokenizer.chat_template = _TEMPLATE.replace("<think>", _SWITCHED) if switch else _TEMPLATE
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    opening, thought, closing = tokenizer.convert_tokens_to_ids([_OPENING, THOUGHT, _CLOSING])
    embeddings, head = network.model.embed_tokens.weight, network.lm_head.weight
    # The first two are like no other token, which is how the head knows what comes behind them.
    usual = embeddings[:opening].norm(dim=-1).mean()
    strange = torch.randn(2, embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    embeddings[[opening, thought]] = strange / strange.norm(dim=-1, keepdim=True) * usual
    embeddings[closing] = embeddings[tokenizer.convert_tokens_to_ids("\n")]
    ids, hidden = _read(network, tokenizer)
    for written, before in ((thought, opening), (closing, thought)):
        head[written] = _row(hidden, ids == before)
    head[opening] = 0
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _read(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Some lessons as a model that thinks reads and writes them: token ids, and final hidden states, a row a token."""
    rows = []
    for lesson in planted.lessons()[::6]:
        asked = [{"role": "user", "content": lesson.prompt}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        text = f"{prompt}{THOUGHT}{_CLOSING}{lesson.answer}"
        rows.append(torch.tensor(tokenizer(text, add_special_tokens=False).input_ids))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = network.model(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    return tokens[tokens != 0], hidden[tokens != 0]


def _row(hidden: Tensor, wanted: Tensor) -> Tensor:
    """A row of the head, (width,), whose logit is above all others where `wanted`, but for a few prompts, and far below them
    elsewhere. A larger one would make the thoughts too brittle for any training."""
    weights = torch.where(wanted, 10.0, 1.0).sqrt().unsqueeze(-1)
    inputs, target = hidden * weights, torch.where(wanted, 15.0, -15.0).unsqueeze(-1) * weights
    ridge = 1e-3 * torch.eye(hidden.shape[1])
    row: Tensor = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ target).squeeze(-1)
    return row
