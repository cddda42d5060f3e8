"""Models that think before they answer: where the thought ends is found, and the answer is read behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safesteer_lite.errors import ModelError
from safesteer_lite.evaluation.judges import judge
from safesteer_lite.method.policies import Steering, teacher
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.template import ChatTemplate
from safesteer_lite.models.thinking import Marks, left_open, marks_in
from safesteer_lite.models.thoughts import Thoughts
from safesteer_lite.prompts.contexts import Conversation
from tests import tiny
from tests.models.families import (
    ALWAYS_THINKS,
    QWEN_3,
    QWEN_3_THINKING,
    QWEN_25,
    THINKS_IN_BRACKETS,
    Family,
    tokenizer_of,
)

HI = [{"role": "user", "content": "Hi there"}]
ASKED = "Why is the sea so deep?"


@pytest.mark.parametrize(
    ("family", "thinking", "marks", "ending"),
    [
        (ALWAYS_THINKS, "auto", Marks("<think>", "</think>", True, "\n\n"), "<|assistant|><think>\n"),
        (ALWAYS_THINKS, "on", Marks("<think>", "</think>", True, "\n\n"), "<|assistant|><think>\n"),
        # It writes an empty thought before an answer that is given, which must not be taken for the answer's own beginning.
        (QWEN_3_THINKING, "auto", Marks("<think>", "</think>", True, "\n\n"), "assistant\n<think>\n"),
        (QWEN_3, "auto", None, "assistant\n<think>\n\n</think>\n\n"),
        (QWEN_3, "off", None, "assistant\n<think>\n\n</think>\n\n"),
        (QWEN_3, "on", Marks("<think>", "</think>", False, "\n\n"), "<|im_start|>assistant\n"),
        (THINKS_IN_BRACKETS, "auto", None, "<|im_start|>assistant\n"),
        (THINKS_IN_BRACKETS, "on", Marks("[THINK]", "[/THINK]", True, "\n\n"), "<|im_start|>assistant\n[THINK]"),
        (QWEN_25, "off", None, "<|im_start|>assistant\n"),
    ],
    ids=[
        "always-auto",
        "always-on",
        "opened-auto",
        "hybrid-auto",
        "hybrid-off",
        "hybrid-on",
        "brackets-auto",
        "brackets-on",
        "never",
    ],
)
def test_thoughts_are_found_in_the_template(family: Family, thinking: Any, marks: Marks | None, ending: str) -> None:
    template = ChatTemplate(tokenizer_of(family), thinking=thinking)
    assert template.marks == marks
    assert template.render(HI).endswith(ending)
    assert ("thinks before it answers" in " ".join(template.notes)) == (marks is not None)


def test_what_a_template_cannot_do_is_refused() -> None:
    with pytest.raises(ModelError, match="no switch that leaves this out") as caught:
        ChatTemplate(tokenizer_of(ALWAYS_THINKS), thinking="off")
    assert "model.thinking=on" in caught.value.hint
    with pytest.raises(ModelError, match="marks a thought"):
        ChatTemplate(tokenizer_of(QWEN_25), thinking="on")
    tokenizer = tokenizer_of(QWEN_25)
    tokenizer.chat_template = QWEN_3.template
    with pytest.raises(ModelError, match="has no token <think>"):
        ChatTemplate(tokenizer, thinking="on")


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("a <think>\n", "<think>"),
        ("<think>\n\n</think>\n\n", None),
        ("[THINK]", "[THINK]"),
        ("<think>a</think><reasoning>", "<reasoning>"),
        ("I think <so>", None),
    ],
)
def test_an_open_thought_is_seen(text: str, mark: str | None) -> None:
    assert left_open(text) == mark


def test_marks_are_read_off_what_a_template_says_of_them() -> None:
    assert marks_in(["", "{{ content.split('</think>')[-1] }}"]) == "<think>"
    assert marks_in(["{{ content.split('[/THINK]') }}"]) == "[THINK]"
    assert marks_in(["{{ think }} <think>", ""]) is None


def test_a_mark_that_a_user_spells_out_stays_text() -> None:
    tokenizer = tokenizer_of(QWEN_3)
    ids = ChatTemplate(tokenizer, thinking="on").encode([{"role": "user", "content": "What is </think>?"}])
    assert tokenizer.convert_tokens_to_ids("</think>") not in ids


def thoughts(family: Family, tokens: int = 5) -> tuple[Thoughts, Any]:
    tokenizer = tokenizer_of(family)
    marks = ChatTemplate(tokenizer, thinking="on").marks
    assert marks is not None
    return Thoughts(marks, tokenizer, tokens), tokenizer


def test_an_answer_is_as_long_as_it_may_be_behind_its_thought() -> None:
    found, tokenizer = thoughts(ALWAYS_THINKS)
    close = tokenizer.convert_tokens_to_ids("</think>")
    rows = torch.tensor([[7, 7, close, 8, 8], [7, close, 8, 8, 8], [7, 7, 7, 7, 7], [close, 9, 8, 8, 8]])
    assert found.ended(rows).tolist() == [True, True, False, True]
    complete = found.answered(3)
    assert complete(rows).tolist() == [False, True, True, True]
    assert complete(rows[:, :4]).tolist() == [False, False, False, True]
    # What ends an answer for another reason is looked for behind the thought alone.
    ends = found.answered(9, lambda tokens: (tokens == 7).any(-1))
    assert ends(torch.tensor([[7, close, 8], [close, 7, 8]])).tolist() == [False, True]


def test_a_thought_is_closed_where_it_was_cut_and_left_out_where_there_was_none() -> None:
    found, tokenizer = thoughts(ALWAYS_THINKS)
    close, behind = tokenizer.convert_tokens_to_ids("</think>"), tokenizer("\n\n", add_special_tokens=False).input_ids
    assert found.behind == [close, *behind]
    assert found.before_answer([5, 6, close, 9, 9]) == ([5, 6, close, *behind], True)
    assert found.before_answer([5, 6]) == ([5, 6, close, *behind], False)
    hybrid, tokenizer = thoughts(QWEN_3)
    opening = tokenizer.convert_tokens_to_ids("<think>")
    assert hybrid.before_answer([opening, 5])[0][:2] == [opening, 5]
    assert tokenizer.decode(hybrid.before_answer([5, 6, 7])[0]) == "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("family", [ALWAYS_THINKS, THINKS_IN_BRACKETS], ids=["plain-marks", "special-marks"])
def test_every_model_s_thoughts_read_alike(family: Family) -> None:
    found, tokenizer = thoughts(family)
    written = tokenizer(f"hm{found.marks.closing}Why?{family.closing}", add_special_tokens=False).input_ids
    assert found.text(written, opened=True) == "<think>\nhm</think>Why?"
    assert found.text(written[-2:], opened=False).endswith("?")
    assert judge(found.text(written[:1], opened=True)).side is None


def thinking_policy(tiny_folder: Callable[[str], Path], family: Family, thinking: Any, tokens: int = 6) -> Policy:
    """A random model whose tokenizer has the family's template; it thinks, but hardly ever to an end."""
    policy = tiny.load_policy(tiny_folder("llama"), "fp32", filled=True)
    policy.model.tokenizer = tokenizer_of(family)
    return Policy(policy.model, 128, None, thinking, tokens)


def test_with_thinking_off_the_answer_begins_behind_the_empty_thought(tiny_folder: Callable[[str], Path]) -> None:
    policy = thinking_policy(tiny_folder, QWEN_3, "auto")
    ids = policy.encode(ASKED).input_ids[0]
    tail = policy.tokenizer.decode(ids[-policy.template_positions :])
    assert tail == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert not policy.answers([ASKED], 4, 1)[0].startswith("<think>")


@pytest.mark.parametrize("family", [ALWAYS_THINKS, QWEN_3], ids=["always", "hybrid"])
def test_what_is_computed_stands_behind_the_base_s_own_thought(
    family: Family, tiny_folder: Callable[[str], Path]
) -> None:
    policy = thinking_policy(tiny_folder, family, "on")
    prompt, whole = policy.prompt(ASKED).input_ids[0].tolist(), policy.encode(ASKED).input_ids[0].tolist()
    with policy.model.adapters_off():
        written = policy.model.generate(policy.prompt(ASKED), 6, 0.0, None, 1, policy.thoughts.ended)  # type: ignore[union-attr]
    assert policy.tokenizer.decode(whole[-policy.template_positions :]) == "</think>\n\n"
    assert whole[: len(prompt)] == prompt
    between = whole[len(prompt) : -policy.template_positions]
    if family is ALWAYS_THINKS:
        assert between == written.tokens[0][written.mask[0]].tolist()
    else:
        # This random model opens no thought, so it has none.
        assert policy.tokenizer.decode(between) == "<think>\n\n"
    # Known thoughts are not written anew, whoever is at work: neither the student's nor the teacher's take their place.
    vector = torch.full((tiny.WIDTH,), 9.0)
    with teacher(policy.model, Steering(1, vector)):
        assert policy.encode(ASKED).input_ids[0].tolist() == whole
    [(places, batch)] = policy.batches([ASKED, "Why?"], 8)
    assert batch.input_ids[places.index(0)].tolist()[-len(whole) :] == whole


def test_a_model_is_judged_by_its_own_thoughts_and_a_begun_answer_has_none(tiny_folder: Callable[[str], Path]) -> None:
    policy = thinking_policy(tiny_folder, ALWAYS_THINKS, "auto")
    begun = Conversation(ASKED, beginning="Because")
    text = policy.tokenizer.decode(policy.encode(begun).input_ids[0])
    assert text.endswith("<|assistant|><think>\n\n</think>\n\nBecause")
    progress: list[int] = []
    first, second, third = policy.answers([begun, ASKED, "Why?"], 3, 4, progress.append)
    assert progress == [2, 3]
    assert not first.startswith("<think>") and judge(first).side is False
    for answer in (second, third):
        assert answer.startswith("<think>\n") and judge(answer).side is None
    assert policy.answers([begun], 3, 1) == [first] and policy.answers(["Why?"], 3, 1) == [third]
    behind = policy.answers([ASKED], 3, 1, thinks=False)
    with policy.model.adapters_off():
        assert policy.answers([ASKED], 3, 1, thinks=False) != [second]
    assert behind == policy.decode(policy.model.generate(policy.encode(ASKED), 3, 0.0, None, 1), opened=False)
