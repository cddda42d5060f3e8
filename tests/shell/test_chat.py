"""Chat and strength dial on the planted model, whose answers are known word for word."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from safesteer_lite import config
from safesteer_lite.errors import ModelError, UsageError
from safesteer_lite.evaluation import dial
from safesteer_lite.events import Event, Metric, discard
from safesteer_lite.models.adapter import read_adapter, save_adapter
from safesteer_lite.models.assistant import Policy
from safesteer_lite.models.reply import Reply
from safesteer_lite.prompts.sets import prompt_set
from safesteer_lite.runs.creation import create_run
from safesteer_lite.runs.folder import RunFolder
from safesteer_lite.shell.chat import Chat
from safesteer_lite.shell.console import SafeConsole
from safesteer_lite.sources.base import open_base
from safesteer_lite.stages import pipeline, strength
from safesteer_lite.stages.session import Session
from safesteer_lite.text import visible
from tests import planted


@pytest.fixture(scope="module")
def model(planted_model: Path) -> Path:
    return planted_model


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A run with an adapter that changes what the model says, as training would, in no time."""
    settings = planted.settings(model)
    parent, text = tmp_path_factory.mktemp("runs"), config.to_toml(settings)
    folder = create_run(parent, "planted", text, planned=pipeline.STAGE_NAMES)
    with planted.one_thread():
        policy = Session(settings, folder, open_base(model), discard, stage="distill").policy
        torch.manual_seed(0)
        for name, parameter in policy.model.network.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        with folder.publish("distill", 4, "trained") as publication:
            save_adapter(policy.model, publication.path / "adapter")
        yield folder


@pytest.fixture(scope="module")
def policy(run: RunFolder, model: Path) -> Policy:
    return Session(planted.settings(model), run, open_base(model), discard, stage="chat").policy


def talk(policy: Policy, run: RunFolder, lines: Sequence[str], view: str = "compare", terminal: bool = False) -> str:
    """What is shown while a user types these lines and then ends the chat."""
    typed = iter(lines)

    def read() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    console = SafeConsole(file=io.StringIO(), width=100, height=30, force_terminal=terminal, color_system=None)
    Chat(policy, run.stage_folder("distill") / "adapter", console, read, view).talk()
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def asked_and_answered() -> str:
    """A harmful prompt that the planted base answers."""
    return next(
        prompt.text for prompt in prompt_set("harmful", "train") if prompt.category not in planted.REFUSED_CATEGORIES
    )


def test_a_reply_is_the_greedy_answer(policy: Policy) -> None:
    prompts = [prompt.text for prompt in prompt_set("harmless", "test", 3)]
    with policy.model.adapters_off():
        for prompt, answer in zip(prompts, policy.answers(prompts, 12, 3), strict=True):
            reply = Reply(policy, [{"role": "user", "content": prompt}], 12, 0.0, 0)
            while not reply.done:
                reply.step()
            assert reply.text == answer == planted.HELP


def test_a_reply_ends_at_its_limit_and_grows_token_by_token(policy: Policy) -> None:
    reply = Reply(policy, [{"role": "user", "content": asked_and_answered()}], 3, 0.0, 0)
    texts = []
    while not reply.done:
        reply.step()
        texts.append(reply.text)
    assert len(texts) == 3 and texts == sorted(texts, key=len)
    reply.step()
    assert reply.text == texts[-1], "an answer that has ended stays as it is"


def test_sampling_follows_its_seed(policy: Policy) -> None:
    def sampled(seed: int) -> str:
        reply = Reply(policy, [{"role": "user", "content": "Hello"}], 8, 5.0, seed)
        while not reply.done:
            reply.step()
        return reply.text

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_conversation_longer_than_the_model_is_refused(policy: Policy) -> None:
    with pytest.raises(ModelError, match="longer than the model can read"):
        Reply(policy, [{"role": "user", "content": "word " * 400}], 8, 0.0, 0)


def test_strength_zero_is_the_base_and_is_not_for_good(policy: Policy, run: RunFolder) -> None:
    adapter = run.stage_folder("distill") / "adapter"
    prompt = [asked_and_answered()]
    with policy.model.adapters_off():
        base = policy.answers(prompt, 12, 1)
    strength.set_strength(policy, adapter, 1.0)
    trained = {name: tensor.clone() for name, tensor in policy.model.network.named_parameters() if "lora_B" in name}
    strength.set_strength(policy, adapter, 0.0)
    assert policy.answers(prompt, 12, 1) == base == [planted.COMPLIANCE]
    strength.set_strength(policy, adapter, 1.0)
    for name, tensor in policy.model.network.named_parameters():
        assert name not in trained or tensor.equal(trained[name])
    with pytest.raises(UsageError, match="outside 0 to"):
        strength.set_strength(policy, adapter, float("nan"))


@pytest.mark.parametrize("terminal", [True, False])
def test_side_by_side(policy: Policy, run: RunFolder, terminal: bool) -> None:
    read_adapter(policy.model, run.stage_folder("distill") / "adapter")
    hardened = policy.answers([asked_and_answered()], 12, 1)[0]
    told = talk(policy, run, [asked_and_answered()], terminal=terminal)
    assert hardened != planted.COMPLIANCE
    assert planted.COMPLIANCE in told and hardened.split()[0] in told
    assert "strength 1; 0 turns so far" in told


def test_commands(policy: Policy, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        "/base",
        asked_and_answered(),
        "/strength 0.5",
        "/save talk.json",
        "/save talk.json",
        "/save no/such/folder.json",
        "/reset",
        "/system Be brief.",
        "/strength much",
        "/strength 3",
        "/dance",
        "/help",
        "  ",
        "/quit",
        "never read",
    ]
    told = talk(policy, run, lines)
    for words in (
        f"base: {planted.COMPLIANCE}",
        "Answering: base alone; strength 0.5; 1 turn so far.",
        "Saved to talk.json.",
        "talk.json exists already.",
        "folder.json cannot be written",
        "system prompt: Be brief.; 0 turns so far.",
        "much is not a number.",
        "A strength of 3 is outside 0 to 2.",
        "There is no command /dance.",
        "/compare, /hardened, /base",
    ):
        assert words in told, f"{words}\n{told}"
    assert "never read" not in told
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    assert saved["base"] == [
        {"role": "user", "content": asked_and_answered()},
        {"role": "assistant", "content": planted.COMPLIANCE},
    ]
    assert (saved["hardened"], saved["strength"], saved["system"]) == ([], 0.5, "")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("view", ["compare", "base"])
def test_nothing_that_is_said_steers_the_terminal(
    view: str, terminal: bool, policy: Policy, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer, a system prompt and the name of a file may hold anything; an emoji of three characters stays one."""
    monkeypatch.chdir(tmp_path)
    hostile, emoji = "x\x1b]52;c;aGk=\x07 [/red] \u202ey", "👩\u200d💻"
    monkeypatch.setattr(policy.tokenizer, "decode", lambda ids, **options: (hostile + emoji)[: 6 * len(ids)])
    lines = [
        f"/system {hostile}",
        asked_and_answered(),
        f"/save {hostile}/f",
        f"/dance{hostile}",
        f"/save {hostile[:3]}.json",
    ]
    told = re.sub(r"\x1b\[[0-9;?]*[A-Zhlm]", "", talk(policy, run, lines, view=view, terminal=terminal)).replace(
        "\r", ""
    )
    assert visible(told, lines=True) == told
    words = told.split()
    for shown in ("x\\x1b]52;c;aGk=\\x07", "[/red]", f"\\u202ey{emoji}"):
        assert shown in words, told
    assert "x\\x1b].json" in told and (tmp_path / "x\x1b].json").is_file()


def test_what_is_typed_in_another_encoding_is_refused_and_the_chat_goes_on(policy: Policy, run: RunFolder) -> None:
    told = talk(policy, run, [b"caf\xe9".decode("utf-8", "surrogateescape"), "/base"], view="compare")
    assert "not text in this terminal's encoding" in told and "Answering: base alone; strength 1; 0 turns" in told


def test_a_home_that_is_not_there(policy: Policy, run: RunFolder) -> None:
    told = talk(policy, run, ["/save ~nobody-of-that-name/talk.json", "/save a\0b"])
    assert "~nobody-of-that-name has no home folder" in told and "cannot hold the character NUL" in told


@pytest.mark.parametrize("view", ["base", "compare"])
def test_ctrl_c_ends_an_answer_and_not_the_chat(
    view: str, policy: Policy, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(100))
    step = Reply.step

    def interrupted_once(reply: Reply) -> None:
        if next(steps) == 2:
            raise KeyboardInterrupt
        step(reply)

    monkeypatch.setattr(Reply, "step", interrupted_once)
    told = talk(policy, run, [asked_and_answered(), "/reset"], view=view, terminal=True)
    assert "(ended early)" in told and told.count("0 turns so far") == 2
    assert "Sure" in told[: told.index("(ended early)")], "what was said until then is shown"


def test_the_dial_begins_at_the_base_and_is_kept(run: RunFolder, model: Path) -> None:
    told: list[Event] = []
    session = Session(planted.settings(model), run, open_base(model), told.append, stage="strength")
    points = strength.dial(session, [1.0, 0.5])
    assert [point.strength for point in points] == [0.0, 0.5, 1.0]
    assert (points[0].score, points[0].card.kl_to_base) == (0.0, 0.0)
    assert points[0].card.harmful.refused == 14, "the planted base refuses half of 28 prompts"
    assert points[2].card.kl_to_base is not None and points[2].card.kl_to_base > 0
    assert points[1].card.kl_to_base is not None and points[1].card.kl_to_base < points[2].card.kl_to_base
    assert dial.to_records(dial.saved_points(run)) == dial.to_records(points)
    metrics = {event.name for event in told if isinstance(event, Metric)}
    assert "harmful refused at strength 0.5" in metrics
    # A dial of another training says nothing about this one.
    record = json.loads((run.path / dial.FILE).read_text(encoding="utf-8"))
    (run.path / dial.FILE).write_text(json.dumps({**record, "distill": "other"}), encoding="utf-8")
    assert dial.saved_points(run) == []
    with pytest.raises(UsageError, match="outside 0 to"):
        strength.dial(session, [2.1])
