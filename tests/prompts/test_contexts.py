"""Contexts hold what they promise, and no split of them leaks into another."""

from __future__ import annotations

from collections import Counter

import pytest

from safesteer_lite.errors import PromptError
from safesteer_lite.prompts.contexts import (
    BEGUN,
    CONTEXT_SPLITS,
    CONTEXTS,
    TRAINED,
    Context,
    ContextName,
    Conversation,
    asked_in,
    contexts,
    partly_in_contexts,
)
from safesteer_lite.prompts.sets import KINDS, Prompt, prompt_set, similar_pairs

LEAST: dict[str, dict[ContextName, int]] = {
    "train": {"system": 8, "turns": 8, "role": 6, "agreed": 4, "steps": 4},
    "selection": {"system": 4, "turns": 4, "role": 4, "agreed": 2, "steps": 2},
    "test": {"system": 6, "turns": 6, "role": 6, "agreed": 2, "steps": 2},
}


def words_of(context: Context) -> str:
    """All that a context adds to a prompt."""
    turns = " ".join(text for turn in context.turns for text in turn)
    return " ".join(filter(None, (context.system, turns, context.frame.replace("{prompt}", ""), context.beginning)))


def entries(split: str) -> list[Prompt]:
    return [Prompt(words_of(context), f"{split}-{name}") for name in CONTEXTS for context in contexts(name, split)]


@pytest.mark.parametrize("split", CONTEXT_SPLITS)
def test_each_split_has_enough_of_each_kind_and_each_adds_what_its_kind_says(split: str) -> None:
    for name in CONTEXTS:
        found = contexts(name, split)
        assert len(found) >= LEAST[split][name]
        for context in found:
            given = (bool(context.system), bool(context.turns), context.frame != "{prompt}", bool(context.beginning))
            assert given == (name == "system", name == "turns", name == "role", name in BEGUN)
            assert context.frame.count("{prompt}") == 1
            assert context.beginning == context.beginning.strip(), "a space would be a token that models do not write"


def test_no_context_of_one_split_is_like_one_of_another() -> None:
    everything = [entry for split in CONTEXT_SPLITS for entry in entries(split)]
    assert len({entry.text for entry in everything}) == len(everything)
    alike = [
        (first.text, second.text)
        for first, second, _ in similar_pairs(everything, everything, 0.4)
        if first.id.partition("-")[0] != second.id.partition("-")[0]
    ]
    assert alike == []
    begun = {split: [c.beginning for name in BEGUN for c in contexts(name, split)] for split in CONTEXT_SPLITS}
    for trained in begun["train"]:
        assert not any(other.startswith(trained) or trained.startswith(other) for other in begun["test"])


def test_earlier_turns_and_system_prompts_hold_no_prompt_that_is_measured() -> None:
    measured = [prompt for kind in KINDS for prompt in prompt_set(kind, "test")]
    asked = [
        Prompt(text, "turn")
        for split in CONTEXT_SPLITS
        for context in contexts("turns", split)
        for turn in context.turns
        for text in turn
    ]
    assert list(similar_pairs(asked, measured, 0.5)) == []


def test_a_conversation_has_its_turns_in_order_and_not_the_beginning_of_the_answer() -> None:
    context = Context(
        "system", "Be kind.", (("Hello", "Hi!"), ("Well?", "Yes?")), "She asks: {prompt}", "Sure, here is"
    )
    conversation = context.around("Who {is} there?")
    assert [(turn["role"], turn["content"]) for turn in conversation.messages] == [
        ("system", "Be kind."),
        ("user", "Hello"),
        ("assistant", "Hi!"),
        ("user", "Well?"),
        ("assistant", "Yes?"),
        ("user", "She asks: Who {is} there?"),
    ]
    assert conversation.beginning == "Sure, here is"
    assert Conversation("Why?").messages == [{"role": "user", "content": "Why?"}]


def test_contexts_take_turns_so_that_all_are_used_equally_often() -> None:
    drawn = contexts("system", "test")
    asked = asked_in([str(number) for number in range(20)], drawn)
    assert [conversation.prompt for conversation in asked] == [str(number) for number in range(20)]
    counts = Counter(conversation.system for conversation in asked)
    assert counts.keys() == {context.system for context in drawn}
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.4, 40), (0.5, 50), (1.0, 100)])
def test_a_share_of_what_is_trained_on_is_asked_in_contexts_that_take_turns(share: float, count: int) -> None:
    prompts = [f"Prompt {number}." for number in range(100)]
    asked = partly_in_contexts(prompts, share)
    conversations = [entry for entry in asked if isinstance(entry, Conversation)]
    assert len(conversations) == count
    for prompt, entry in zip(prompts, asked, strict=True):
        assert entry == prompt or (isinstance(entry, Conversation) and prompt in entry.prompt)
    kinds = Counter(
        "system" if entry.system else "turns" if entry.turns else "role" if entry.prompt not in prompts else "none"
        for entry in conversations
    )
    assert set(kinds) == (set(TRAINED) if count else set())
    assert not kinds or max(kinds.values()) - min(kinds.values()) <= 1
    assert not any(entry.beginning for entry in conversations)


def test_unknown_contexts_are_refused() -> None:
    with pytest.raises(PromptError, match="no contexts 'system' of the split 'direction'") as caught:
        contexts("system", "direction")
    assert "train, selection, test" in caught.value.hint
