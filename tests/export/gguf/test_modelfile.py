"""Ollama's template gives the same text as the model's own, or there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import pytest

from safesteer_lite.export.gguf.modelfile import ChatFormat, Render, chat_format, modelfile, write_modelfiles
from tests import tiny
from tests.export.gguf import go_template

QWEN_25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen. You help.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLAMA_32 = (
    "{{- '<|begin_of_text|>' }}{%- if messages[0]['role'] == 'system' %}{%- set own = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set own = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nKnowledge: 2023\nToday: 26 Jul 2024\n\n' + own + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{- message.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
MISTRAL = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"
TEMPLATES = {"chatml": tiny.CHAT_TEMPLATE, "qwen2.5": QWEN_25, "llama-3": LLAMA_3, "llama-3.2": LLAMA_32}
CHATS = [
    [("user", "Who are you?")],
    [("system", "You are a pirate."), ("user", "Who are you?")],
    [("user", 'Say "a"\n\nand {b}.'), ("assistant", "a and b"), ("user", "Again, with ü.")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
]


def renderer(template: str) -> Render:
    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        return compiled.render(messages=messages, add_generation_prompt=True)

    return render


def as_ollama(form: ChatFormat, chat: list[tuple[str, str]]) -> str:
    """Ollama's own steps: the SYSTEM line stands in for a system message, then the template runs over all messages."""
    system = next((text for role, text in chat if role == "system"), form.system)
    messages = [{"Role": role, "Content": text} for role, text in chat]
    return form.family.begin + go_template.run(form.template, {"System": system, "Messages": messages})


@pytest.mark.parametrize("chat", CHATS, ids=["one question", "system", "three turns", "five turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_makes_the_same_text_as_the_models_own_template(name: str, chat: list[tuple[str, str]]) -> None:
    render = renderer(TEMPLATES[name])
    form = chat_format(render)
    assert form is not None
    assert as_ollama(form, chat) == render([{"role": role, "content": text} for role, text in chat])


def test_the_models_own_system_prompt_is_kept() -> None:
    found = {name: chat_format(renderer(template)) for name, template in TEMPLATES.items()}
    assert {name: form and (form.system, form.preamble) for name, form in found.items()} == {
        "chatml": ("", ""),
        "qwen2.5": ("You are Qwen. You help.", ""),
        "llama-3": ("", ""),
        "llama-3.2": ("", "Knowledge: 2023\nToday: 26 Jul 2024\n\n"),
    }


@pytest.mark.parametrize(
    "template",
    [
        MISTRAL,
        tiny.CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>"),
        QWEN_25.replace("message.content +", "message.content + ' ' +"),
        LLAMA_3.replace("<|eot_id|>", "<|eot|>"),
    ],
)
def test_a_template_that_is_not_exactly_known_gives_no_modelfile(template: str) -> None:
    assert chat_format(renderer(template)) is None


def test_a_whole_modelfile() -> None:
    form = chat_format(renderer(QWEN_25))
    assert form is not None
    text = modelfile(
        "a-Q8_0.gguf",
        form,
        ["<|im_end|>", "<|endoftext|>"],
        {"temperature": 0.7, "top_k": 20, "do_sample": True},
        32768,
    )
    assert text == (
        "FROM ./a-Q8_0.gguf\n\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n\n'
        'SYSTEM """You are Qwen. You help."""\n\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
        "PARAMETER num_ctx 4096\nPARAMETER temperature 0.7\nPARAMETER top_k 20\n"
    )


def test_each_file_has_a_modelfile_with_the_stops_and_the_context_of_its_model(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    names = write_modelfiles(tmp_path, tiny_folder("qwen2"), ["m-Q8_0.gguf", "m-Q4_K_M.gguf"])
    assert names == ["Modelfile", "Modelfile.Q4_K_M"] == sorted(path.name for path in tmp_path.iterdir())
    for name, file in zip(names, ("m-Q8_0.gguf", "m-Q4_K_M.gguf"), strict=True):
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert lines[0] == f"FROM ./{file}"
        assert [line for line in lines if line.startswith("PARAMETER")] == [
            f"PARAMETER stop {json.dumps(tiny.END_OF_TURN)}",
            f"PARAMETER stop {json.dumps(tiny.END_OF_TEXT)}",
            "PARAMETER num_ctx 256",
        ]
    assert write_modelfiles(tmp_path, tiny_folder("qwen2"), ["."]) == ["Modelfile"]
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8").startswith("FROM .\n")
