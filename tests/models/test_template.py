"""What a chat template must do for this method is tried at the start, on templates built as those of real families."""

from __future__ import annotations

import sys
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import safesteer_lite
from safesteer_lite.errors import ModelError
from safesteer_lite.models.plain import load_tokenizer
from safesteer_lite.models.template import ChatTemplate, stop_ids
from safesteer_lite.sources.base import open_base
from tests import tiny
from tests.models.families import FAMILIES, LLAMA_32, QWEN_3, QWEN_25, Family, tokenizer_of

DAY = date(2025, 3, 2)
CHATML = tiny.CHAT_TEMPLATE
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HI = [{"role": "user", "content": "Hi there"}]


def with_template(template: object) -> Any:
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_real_families_are_rendered_to_the_letter(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer, DAY)
    assert template.render(HI) == family.prompt
    assert template.encode(HI) == tokenizer(family.prompt, add_special_tokens=False).input_ids
    assert template.end == tokenizer.convert_tokens_to_ids(family.closing)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_conversation_holds_every_turn_and_the_system_prompt(family: Family) -> None:
    template = ChatTemplate(tokenizer_of(family), DAY)
    turns = [*HI, {"role": "assistant", "content": "Hello yourself"}, {"role": "user", "content": "And now?"}]
    text = template.render(turns)
    places = [text.index(turn["content"]) for turn in turns]
    assert places == sorted(places)
    system = [{"role": "system", "content": "Be brief."}, *turns]
    assert template.knows_system == family.takes_system
    assert "Be brief." in template.render(system)
    assert template.render(system) != text
    if not family.takes_system:
        assert template.render(system) == template.render(
            [{**turns[0], "content": "Be brief.\n\nHi there"}, *turns[1:]]
        )
        assert len(template.encode(system)) > len(template.encode(turns))


def test_a_system_prompt_that_a_template_would_lose_begins_the_first_question() -> None:
    losing = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    assert ChatTemplate(with_template(CHATML)).knows_system
    assert not ChatTemplate(with_template(losing)).knows_system
    assert "<|im_start|>user\nBe brief.\n\nHi there<" in ChatTemplate(with_template(losing)).render(
        [{"role": "system", "content": "Be brief."}, *HI]
    )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_marker_that_somebody_spells_out_stays_text(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer, DAY)
    names = [*family.markers, *family.plain_markers, tiny.END_OF_TEXT]
    # Cut badly, two of these would leave a third between them.
    spelled = " ".join([*names, *(first[:-1] + second for first, second in pairwise(names))])
    for role in ("user", "assistant"):
        turns = [*HI, {"role": "assistant", "content": "A plain answer"}, {"role": "user", "content": "plain words"}]
        markers = {tokenizer.convert_tokens_to_ids(name) for name in names} & set(tokenizer.added_tokens_decoder)
        expected = [index for index in template.encode(turns) if index in markers]
        turns = [{**turn, "content": f"say {spelled} twice"} if turn["role"] == role else turn for turn in turns]
        ids = template.encode(turns)
        assert [index for index in ids if index in markers] == expected, role
        assert f"say {spelled} twice" in tokenizer.decode(ids), role
    assert template.spells_out(f"say {spelled} twice") and not template.spells_out("say < im_end > twice")


def test_nothing_else_renders_prompts() -> None:
    """Chat, training, judging and exports all ask `ChatTemplate`, or a marker, a date or a thought would slip through."""
    package = Path(safesteer_lite.__file__).parent
    files = [path for path in package.rglob("*.py") if "apply_chat_template" in path.read_text(encoding="utf-8")]
    assert [path.name for path in files] == ["rendering.py"]


def test_a_template_that_asks_the_date_gets_that_of_the_run() -> None:
    tokenizer = tokenizer_of(LLAMA_32)
    first, second = ChatTemplate(tokenizer, DAY), ChatTemplate(tokenizer, date(2026, 1, 9))
    assert "Today Date: 09 Jan 2026" in second.render(HI) and "02 Mar 2025" in second.render(HI, DAY)
    assert first.encode(HI) == ChatTemplate(tokenizer, DAY).encode(HI) != second.encode(HI)
    assert [note for note in first.notes if "writes the date" in note and "02 March 2025" in note] == first.notes
    assert ChatTemplate(tokenizer_of(QWEN_25), DAY).notes == []


def test_a_model_that_may_think_is_asked_not_to() -> None:
    template = ChatTemplate(tokenizer_of(QWEN_3), DAY)
    assert template.render(HI).endswith("<think>\n\n</think>\n\n")
    assert "enable_thinking=false" in template.notes[0]
    assert template.switches == {"enable_thinking": False} and template.marks is None
    assert not ChatTemplate(tokenizer_of(QWEN_25)).switches


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHATML.replace(OPENING, ""), r"does not open the answer.*<\|im_start\|>assistant"),
        (CHATML.replace("{{ message.content }}", ""), "loses or changes what the user says"),
        (CHATML.replace("message.content", "message.content | e"), "loses or changes what the user says"),
        (CHATML.replace("message.content", "message.content | lower"), "loses or changes what the user says"),
        (CHATML.replace("message.content", "message.content[:9]"), "loses or changes what the user says"),
        (
            CHATML.replace("{{ message.content }}", "{% if message.role == 'user' %}{{ message.content }}{% endif %}"),
            "ass",
        ),
        (CHATML + "{% for message in %}", "cannot be run"),
        (CHATML + "{{ raise_exception('not today') }}", r"refuses a conversation of user \(not today\)"),
        (CHATML + "{{ messages[7].content.text }}", "refuses a conversation of user"),
        (CHATML + "{{ messages[0].content + 7 }}", "fails"),
        (CHATML + "{{ 1 / 0 }}", "division by zero"),
        (CHATML + "{{ nothing() }}", "'nothing' is undefined"),
        (CHATML + "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "cannot be run"),
        (CHATML + "{{ '(' * 3 }}" + "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be run"),
        (CHATML + "{{ 'x' * 5000000 }}", "makes 5,000,"),
        (CHATML + "{{ ''.__class__.__mro__ }}", "refuses|unsafe"),
        (CHATML + "{{ 9 ** 9 ** 9 ** 9 }}", "computes powers"),
        ("", "no chat template"),
        (None, "no chat template"),
        ({"tool_use": CHATML}, "none is called default"),
        ({}, "none is called default"),
    ],
)
def test_a_template_that_will_not_do_is_refused(template: object, problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        ChatTemplate(with_template(template))
    # There is no system prompt here that could be left out.
    assert caught.value.hint and "system" not in caught.value.hint


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='ab') %}" + "{% for a in 'abcdefghij' %}" * 12 + "{{ n.s }}" + "{% endfor %}" * 12,
        "{% macro walk(n) %}{% for a in 'abcdefghij' %}{% if n %}{{ walk(n - 1) }}{% endif %}{% endfor %}{% endmacro %}"
        "{{ walk(20) }}",
    ],
)
def test_a_template_that_would_never_be_done_is_stopped(loop: str) -> None:
    before = sys.gettrace()
    with pytest.raises(ModelError, match="stopped after"):
        ChatTemplate(with_template(CHATML + loop))
    assert sys.gettrace() is before


def test_long_conversations_are_not_taken_for_endless_ones() -> None:
    turns = [{"role": role, "content": "word " * 200} for _ in range(500) for role in ("user", "assistant")]
    for family in FAMILIES.values():
        assert len(ChatTemplate(tokenizer_of(family), DAY).render(turns)) > 1_000_000


def test_of_named_templates_the_default_is_used_and_told() -> None:
    template = ChatTemplate(with_template({"tool_use": "{{ 7 }}", "default": CHATML}))
    assert template.render(HI).startswith("<|im_start|>user\nHi there")
    assert "tool_use, default" in template.notes[0]


@pytest.mark.parametrize("layout", ["list", "files"])
def test_named_templates_of_a_folder_are_read_in_both_layouts(layout: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = with_template({"default": CHATML, "tool_use": "{{ 7 }}"})
    tokenizer.save_pretrained(tmp_path, save_jinja_files=layout == "files")
    assert (tmp_path / "additional_chat_templates").is_dir() == (layout == "files")
    template = ChatTemplate(load_tokenizer(tmp_path, open_base(tmp_path).config))
    assert template.render(HI).startswith("<|im_start|>user\nHi there")
    assert "default is the one that is used" in template.notes[0]


def test_markdown_is_no_power() -> None:
    template = ChatTemplate(with_template("**Be brief.** {{ '**Now**' }}" + CHATML))
    assert template.render(HI).startswith("**Be brief.** **Now**<|im_start|>")


def test_everything_that_ends_an_answer_counts() -> None:
    tokenizer = tokenizer_of(QWEN_25)
    turn, text = (int(tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_end|>", "<|endoftext|>"))
    assert stop_ids(tokenizer) == {turn, text}
    assert stop_ids(tokenizer, None, [7, 9], 8) == {turn, text, 7, 8, 9}
    assert stop_ids(tokenizer, [None, True, "x", -1, 2.5]) == {turn, text}
    # The template closes answers with letters, so only the settings can say what ends one.
    tokenizer.chat_template = QWEN_25.template.replace("'<|im_end|>' + '\\n'", "'\\n'")
    assert stop_ids(tokenizer, 5) == {text, 5}
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="Nothing says which token ends an answer"):
        stop_ids(tokenizer)
