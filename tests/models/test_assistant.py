"""Prompts in, answers out; and the KL that is measured along a policy's own answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from safesteer_lite.errors import ModelError
from safesteer_lite.method import policies
from safesteer_lite.method.policies import Batch, Completions
from safesteer_lite.models import plain
from safesteer_lite.models.adapter import read_adapter, save_adapter, scale_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reference import kl_to_reference, reference_answers
from safesteer_lite.prompts.contexts import Conversation
from safesteer_lite.sources.base import open_base
from tests import tiny


def test_the_template_positions_are_those_after_the_users_text(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    ids = policy.encode("Why?").input_ids[0]
    tail = policy.tokenizer.decode(ids[-policy.template_positions :])
    assert tail == "<|im_end|>\n<|im_start|>assistant\n"
    assert policy.template_positions == 5


def test_batches_are_padded_on_the_left_and_know_their_places(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    seen = []
    for places, batch in policy.batches(tiny.PROMPTS, 2):
        assert len(places) <= 2
        for row, place in enumerate(places):
            alone = policy.encode(tiny.PROMPTS[place]).input_ids[0]
            width = batch.input_ids.shape[1] - len(alone)
            assert batch.attention_mask[row].tolist() == [0] * width + [1] * len(alone)
            assert torch.equal(batch.input_ids[row, width:], alone)
        seen += places
    assert sorted(seen) == list(range(len(tiny.PROMPTS)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_answers_come_in_the_order_of_the_prompts_whatever_the_batch(size: int, tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    progress: list[int] = []
    answers = policy.answers(tiny.PROMPTS, 6, size, progress.append)
    expected = [policy.decode(policy.model.generate(policy.encode(text), 6, 0.0, None, 1))[0] for text in tiny.PROMPTS]
    assert answers == expected and len(set(answers)) == len(answers)
    assert progress[-1] == len(tiny.PROMPTS)


def test_what_fitted_in_memory_is_remembered_for_answers_as_long_or_longer(
    tiny_policy: tiny.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tried = tiny_policy(), list[tuple[int, int]]()
    expected = policy.answers(tiny.PROMPTS, 6, 1)
    generate = policy.model.generate

    def short_of_memory(prompts: Batch, tokens: int, *others: Any) -> Completions:
        tried.append((len(prompts), tokens))
        if len(prompts) > 1 and tokens > 2:
            raise torch.OutOfMemoryError("simulated, for want of a card")
        return generate(prompts, tokens, *others)

    monkeypatch.setattr(policy.model, "generate", short_of_memory)
    assert policy.answers(tiny.PROMPTS, 6, 4) == expected
    assert [size for size, _ in tried] == [4, 2, 1, 1, 1, 1, 1]
    for tokens, first in ((6, 1), (8, 1), (2, 4)):
        tried.clear()
        policy.answers(tiny.PROMPTS, tokens, 4)
        assert tried[0] == (first, tokens)


def test_prompts_that_stand_for_several_sequences_are_remembered_as_such(tiny_policy: tiny.Loader) -> None:
    policy, tried = tiny_policy(), list[int]()

    def twenty_sequences_fit(size: int, samples: int) -> int:
        tried.append(size)
        if size * samples > 20:
            raise torch.OutOfMemoryError("simulated, for want of a card")
        return size

    for samples, sizes in ((8, [8, 4, 2]), (8, [2]), (1, [8]), (3, [5]), (64, [1])):
        tried.clear()
        with suppress(torch.OutOfMemoryError):
            policy.fitting(7, 8, partial(twenty_sequences_fit, samples=samples), samples)
        assert tried == sizes


def test_a_long_prompt_loses_its_middle_and_keeps_the_template(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    policy.prompt_tokens = 60
    ids = policy.encode("start " + "river " * 200 + " end").input_ids[0]
    text = policy.tokenizer.decode(ids)
    assert len(ids) <= 60
    assert text.startswith("<|im_start|>user\nstart river") and text.endswith(" end<|im_end|>\n<|im_start|>assistant\n")
    policy.prompt_tokens = 8
    with pytest.raises(ModelError, match="template alone takes"):
        policy.encode("river " * 200)


def test_a_conversation_is_read_with_all_its_turns_and_goes_on_from_the_beginning_of_the_answer(
    tiny_policy: tiny.Loader,
) -> None:
    policy = tiny_policy()
    asked = Conversation("Why?", "Be brief.", (("Say hello.", "Hello."),), "Because <|im_end|>")
    text = policy.tokenizer.decode(policy.encode(asked).input_ids[0])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hello.<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause <|im_end|>"
    )
    end = policy.tokenizer.convert_tokens_to_ids(tiny.END_OF_TURN)
    assert int(policy.encode(asked).input_ids[0, -1]) != end, "what a beginning spells out is text, not a marker"
    plain = policy.encode("Why?").input_ids
    begun = policy.encode(Conversation("Why?", beginning="Because")).input_ids
    own = policy.tokenizer("Because", add_special_tokens=False).input_ids
    assert begun[0].tolist() == [*plain[0].tolist(), *own]
    # An answer that had begun is told from where the model took over.
    [answer] = policy.answers([Conversation("Why?", beginning="Because")], 5, 1)
    tokens = policy.model.generate(Batch(begun, torch.ones_like(begun)), 5, 0.0, None, 1)
    assert [answer] == policy.decode(tokens)


def test_answers_in_contexts_do_not_depend_on_what_is_asked_beside_them(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    policy.prompt_tokens = 250
    asked: list[str | Conversation] = [
        *tiny.PROMPTS,
        *(Conversation(prompt, "Be brief.") for prompt in tiny.PROMPTS),
        *(Conversation(prompt, turns=(("Say hello.", "Hello."),), beginning="Sure") for prompt in tiny.PROMPTS),
    ]
    assert policy.answers(asked, 5, 4) == [policy.answers([each], 5, 1)[0] for each in asked]


def test_a_long_prompt_in_a_context_loses_its_own_middle_only(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    policy.prompt_tokens = 90
    asked = Conversation("start " + "river " * 200 + " end", "Be brief.", beginning="Sure")
    text = policy.tokenizer.decode(policy.encode(asked).input_ids[0])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nstart river")
    assert text.endswith(" end<|im_end|>\n<|im_start|>assistant\nSure")
    policy.prompt_tokens = 20
    with pytest.raises(ModelError, match="what is said before the prompt take"):
        policy.encode(asked)


def test_prompts_that_are_cut_are_counted(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    policy.prompt_tokens = 60
    prompts = ["river " * count for count in range(1, 60)] + ["é" * count for count in range(1, 60)]
    read = [policy.tokenizer.decode(policy.encode(prompt).input_ids[0]) for prompt in prompts]
    cut = [prompt for prompt, text in zip(prompts, read, strict=True) if prompt not in text]
    assert policy.too_long(prompts) == len(cut) > 10
    assert policy.too_long(tiny.PROMPTS) == 0


def test_token_ids_are_the_first_tokens_of_each_opening(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy()
    first = policy.tokenizer("why", add_special_tokens=False).input_ids[0]
    assert policy.token_ids(["why", "why"]).tolist() == [first]
    several = policy.token_ids(["zoo", "Say", "I"])
    assert several.tolist() == sorted(several.tolist()) and len(several) == 3


def test_kl_along_the_reference_answers_equals_a_plain_computation(tiny_policy: tiny.Loader) -> None:
    policy = tiny_policy(filled=True)
    with policies.base(policy.model):
        reference = reference_answers(policy, tiny.PROMPTS, 5, 2)
        assert kl_to_reference(policy, reference, 3) < 1e-9
    total, positions = 0.0, 0
    for text in tiny.PROMPTS:
        batch = policy.encode(text)
        with torch.no_grad():
            with policies.base(policy.model):
                answer = policy.model.generate(batch, 5, 0.0, None, 1)
                known = policy.model.causal(**vars(answer.after(batch))).logits.double().log_softmax(-1)
            now = policy.model.causal(**vars(answer.after(batch))).logits.double().log_softmax(-1)
        length = answer.tokens.shape[1]
        total += float((known.exp() * (known - now)).sum(-1)[0, -length - 1 : -1].sum())
        positions += length
    assert reference.positions == positions
    for chunk in (1, 4, 1000):
        assert kl_to_reference(policy, reference, chunk) == pytest.approx(total / positions, rel=1e-4)
    assert total / positions > 0.01


def test_an_adapter_is_saved_and_read_back(tiny_policy: tiny.Loader, tmp_path: Path) -> None:
    policy, fresh = tiny_policy(filled=True), tiny_policy()
    save_adapter(policy.model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    batch = tiny.prompt_batch(policy)
    with torch.no_grad():
        expected = policies.last_logits(policy.model, batch)
        assert not torch.equal(policies.last_logits(fresh.model, batch), expected)
        read_adapter(fresh.model, tmp_path)
        assert torch.equal(policies.last_logits(fresh.model, batch), expected)
        # The strength dial: 0 is the base, and the update is linear in the factor on B.
        scale_adapter(fresh.model, 0.0)
        with policies.base(policy.model):
            assert torch.equal(policies.last_logits(fresh.model, batch), policies.last_logits(policy.model, batch))
    with pytest.raises(ModelError, match="does not fit"):
        read_adapter(tiny_policy(first_layer=1).model, tmp_path)


def test_an_empty_chat_template_is_none(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text("")
    base = open_base(folder)
    with pytest.raises(ModelError, match="no chat template") as caught:
        plain.load_tokenizer(base.folder, base.config)
    assert "instruct" in caught.value.hint


def test_prompt_limit_is_respected_by_every_length(tiny_policy: tiny.Loader) -> None:
    """Cutting can split words into more tokens than they had; the limit holds all the same."""
    policy = Policy(tiny_policy().model, 40)
    for repeats in range(1, 60, 3):
        for word in ("bake bread, ", "rivers find ", "wood tallest "):
            assert policy.encode(word * repeats).input_ids.shape[1] <= 40
