"""Ollama's template gives the same text as the model's own, or there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from safesteer_lite.config.sections import Thinking
from safesteer_lite.export.gguf.modelfile import Chat, ChatFormat, Render, chat_format, read_chat, write_modelfiles
from tests import tiny
from tests.export.gguf import go_template
from tests.models import families

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
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
# Mistral 7B Instruct v0.1 refuses system prompts; v0.3 puts one before the last question, and newer v0.2 before the first.
MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_OWN_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}{%- for message in messages %}" + ALTERNATE
)
MISTRAL_2 = (
    _OWN_SYSTEM + "{%- if message['role'] == 'user' %}{%- if loop.first and system is defined %}"
    "{{- ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}{%- else %}"
    "{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
MISTRAL_3 = (
    _OWN_SYSTEM + "{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
TEKKEN = (
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}{%- elif message.role == 'user' %}"
    "{{- '[INST]' + message.content + '[/INST]' }}{%- else %}{{- message.content + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = families.GEMMA.template
TEMPLATES = {
    "chatml": tiny.CHAT_TEMPLATE,
    "qwen2.5": QWEN_25,
    "llama-3": LLAMA_3,
    "llama-3.2": LLAMA_32,
    "mistral-1": MISTRAL_1,
    "mistral-2": MISTRAL_2,
    "mistral-3": MISTRAL_3,
    "tekken": TEKKEN,
    "gemma": GEMMA,
    "gemma-3": families.GEMMA_3.template,
    "phi-3": families.PHI_3.template,
    "phi-4": families.PHI_4.template,
    "phi-4-mini": families.PHI_4_MINI.template,
    "thinking": tiny.CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>"),
}
DAY = date(2026, 11, 26)
CHATS = [
    [("user", "Who are you?")],
    [("system", "You are a pirate."), ("user", "Who are you?")],
    [("user", 'Say "a"\n\nand {b}.'), ("assistant", "a and b"), ("user", "Again, with ü.")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
]


def renderer(template: str) -> Render:
    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        if template in (MISTRAL_1, GEMMA) and messages[0]["role"] == "system":
            # What these refuse comes before the first question (models/template.py).
            question = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{**messages[1], "content": question}, *messages[2:]]
        return compiled.render(
            messages=messages,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
            raise_exception=refuse,
        )

    return render


def as_ollama(form: ChatFormat, chat: list[tuple[str, str]]) -> str:
    """Ollama's own steps: the SYSTEM line stands in for a system message, then the template runs over all messages."""
    system = next((text for role, text in chat if role == "system"), form.system)
    # Ollama leaves a system prompt among the messages too.
    messages = [{"Role": role, "Content": text} for role, text in chat]
    return form.family.begin + go_template.run(form.template, {"System": system, "Messages": messages})


@pytest.mark.parametrize("chat", CHATS, ids=["one question", "system", "three turns", "five turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_makes_the_same_text_as_the_models_own_template(name: str, chat: list[tuple[str, str]]) -> None:
    render = renderer(TEMPLATES[name])
    form = chat_format(render, "<s>")
    assert form is not None
    messages = [{"role": role, "content": text} for role, text in chat]
    assert as_ollama(form, chat) == render(messages)


def test_the_models_own_system_prompt_is_kept() -> None:
    found = {name: chat_format(renderer(template), "<s>") for name, template in TEMPLATES.items()}
    assert {name: form and (form.system, form.preamble) for name, form in found.items()} == {
        **dict.fromkeys(TEMPLATES, ("", "")),
        "qwen2.5": ("You are Qwen. You help.", ""),
        "llama-3.2": ("", "Knowledge: 2023\nToday: 26 Jul 2024\n\n"),
    }


@pytest.mark.parametrize(
    "template",
    [
        # A default system prompt in a format that is not one of those known to have it.
        TEKKEN.replace("{{- bos_token }}", "{{- bos_token + ('Be kind.' if messages[0].role != 'system' else '') }}"),
        "{% for m in messages %}{{ loop.index0 ~ m.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{{ messages[0].content }}",
        QWEN_25.replace("message.content +", "message.content + ' ' +"),
        LLAMA_3.replace("<|eot_id|>", "<|eot|>"),
    ],
)
def test_a_template_that_is_not_exactly_known_gives_no_modelfile(template: str) -> None:
    assert chat_format(renderer(template)) is None


@pytest.mark.parametrize(
    "prompt",
    ['Be kind."""\nFROM elsewhere\nSYSTEM """', "{{ .System }}\0", '"""', '"""\n'],
)
def test_a_system_prompt_that_would_end_its_quotes_is_not_written(prompt: str) -> None:
    quoted = "{{ '" + "<|im_start|>system\n" + prompt.replace("\\", "\\\\") + "<|im_end|>\n' }}"
    template = "{% if messages[0].role != 'system' %}" + quoted + "{% endif %}" + tiny.CHAT_TEMPLATE
    assert chat_format(renderer(template)) is None
    assert chat_format(renderer(template.replace('"""', '""').replace("\0", ""))) is not None


@pytest.mark.parametrize("mark", ["{{ .Evil }}", '"""', "}}"])
def test_marks_that_a_modelfile_would_run_or_end_at_are_not_written(mark: str) -> None:
    template = "{% for m in messages %}{{ m.role[0] + mark + m.content + '.' }}{% endfor %}"
    compiled = jinja2.Environment().from_string(template)
    for part, expected in ((mark, None), (":", ChatFormat)):

        def render(messages: Sequence[Mapping[str, str]], part: str = part) -> str:
            return compiled.render(messages=messages, mark=part)

        found = chat_format(render)
        assert found is None if expected is None else isinstance(found, expected)


def test_a_whole_modelfile() -> None:
    form = chat_format(renderer(QWEN_25))
    assert form is not None
    sampling = {"temperature": 0.7, "top_k": 20, "do_sample": True, "top_p": float("inf"), "repetition_penalty": True}
    chat = Chat(form, ["<|im_end|>", "<|endoftext|>"], sampling, 32768)
    assert chat.modelfile("a-Q8_0.gguf") == (
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
    names = write_modelfiles(tmp_path, tiny_folder("qwen2"), ["m-Q8_0.gguf", "m-Q4_K_M.gguf"], DAY)
    assert names == ["Modelfile", "Modelfile.Q4_K_M"] == sorted(path.name for path in tmp_path.iterdir())
    for name, file in zip(names, ("m-Q8_0.gguf", "m-Q4_K_M.gguf"), strict=True):
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert lines[0] == f"FROM ./{file}"
        assert [line for line in lines if line.startswith("PARAMETER")] == [
            f"PARAMETER stop {json.dumps(tiny.END_OF_TEXT)}",
            f"PARAMETER stop {json.dumps(tiny.END_OF_TURN)}",
            "PARAMETER num_ctx 256",
        ]
    assert write_modelfiles(tmp_path, tiny_folder("qwen2"), ["."], DAY) == ["Modelfile"]
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8").startswith("FROM .\n")


def test_a_supported_model_whose_template_refuses_system_prompts_has_a_modelfile(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    model = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(MISTRAL_1)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": tiny.END_OF_TEXT}))
    assert write_modelfiles(tmp_path, model, ["m.gguf"], DAY) == ["Modelfile"]
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert "# The model's own template knows no system prompt: it is put before the first question.\n" in text
    # This tokenizer leaves the token that begins a text to the template.
    begins = 'TEMPLATE """' + tiny.END_OF_TEXT
    assert begins + '{{ $system := .System }}{{ range .Messages }}{{ if eq .Role "user" }}[INST] ' in text
    assert "[INST] {{ if $system }}{{ $system }}\n\n" in text
    assert "SYSTEM" not in text


def test_what_the_tokenizer_puts_first_by_itself_is_not_in_the_modelfile(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    model = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(MISTRAL_3)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": tiny.END_OF_TEXT}))
    core = Tokenizer.from_file(str(model / "tokenizer.json"))
    core.post_processor = TemplateProcessing(
        single=f"{tiny.END_OF_TEXT} $A", special_tokens=[(tiny.END_OF_TEXT, core.token_to_id(tiny.END_OF_TEXT))]
    )
    core.save(str(model / "tokenizer.json"))
    chat = read_chat(model, DAY)
    assert chat is not None and chat.form.family.begin == tiny.END_OF_TEXT and chat.head == ""
    assert 'TEMPLATE """{{ range $place, $turn := .Messages }}' in chat.modelfile(".")


def test_a_template_that_writes_the_date_says_the_day_of_the_training(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    model = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    today = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}"
    (model / "chat_template.jinja").write_text(
        LLAMA_32.replace("26 Jul 2024", "{#-#}' ~ today ~ '")
        .replace(
            "{{- '<|begin_of_text|>' }}", "{%- set today = " + today.strip("{} ") + " %}{{- '<|begin_of_text|>' }}"
        )
        .replace("{#-#}", "")
    )
    chat = read_chat(model, DAY)
    assert chat is not None and chat.form.preamble == "Knowledge: 2023\nToday: 26 Nov 2026\n\n"
    assert "# The model's own template writes the date; this one says the day of the training, 2026-11-26.\n" in (
        chat.modelfile(".")
    )


def test_a_model_that_names_no_usable_numbers_has_a_modelfile(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    model = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": null, "temperature": true, "top_k": "many"}')
    config = json.loads((model / "config.json").read_text())
    del config["max_position_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    chat = read_chat(model, DAY)
    assert chat is not None and chat.modelfile(".").splitlines()[-2:] == [
        f'PARAMETER stop "{tiny.END_OF_TURN}"',
        "PARAMETER num_ctx 4096",
    ]


def test_a_modelfile_asks_a_model_to_think_or_not_as_it_was_trained(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    model = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    opened = "assistant\n{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("assistant\n", opened)
    tokenizer.save_pretrained(model)
    told: dict[Thinking, tuple[str, str]] = {
        "auto": ("could think", '<|im_start|>assistant\n<think>\n\n</think>\n\n"""'),
        "off": ("could think", '<|im_start|>assistant\n<think>\n\n</think>\n\n"""'),
        "on": ("answers behind </think>", '<|im_start|>assistant\n<think>\n"""'),
    }
    for thinking, (said, opening) in told.items():
        chat = read_chat(model, DAY, thinking)
        assert chat is not None
        text = chat.modelfile(".")
        assert opening in text and f"\n# The model {'thinks' if thinking == 'on' else 'could'}" in text and said in text
