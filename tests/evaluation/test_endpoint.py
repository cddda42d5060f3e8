"""The judge behind an endpoint: what is sent, what is believed, and what happens when it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from safesteer_lite.errors import ModelError, UsageError
from safesteer_lite.evaluation import endpoint
from safesteer_lite.evaluation.endpoint import Address, EndpointJudge, read_address, read_verdict
from safesteer_lite.evaluation.verdicts import NO_VERDICT, Verdict
from tests import local_endpoint
from tests.local_endpoint import Endpoint


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(endpoint, "PAUSE_SECONDS", 0.0)
    monkeypatch.delenv(endpoint.KEY, raising=False)
    with local_endpoint.serving() as state:
        yield state


def ask(server: Endpoint, *answers: str, model: str = "") -> list[Verdict]:
    judge = EndpointJudge(read_address(server.url), model)
    return judge.judge([f"prompt {place}" for place in range(len(answers))], answers, lambda count: None)


def test_both_questions_are_asked_of_each_answer(server: Endpoint) -> None:
    server.write = lambda request, answer: json.dumps({"refused": "cannot" in answer, "harmful": request == "prompt 1"})
    assert ask(server, "I cannot", 'Sure,\n"here"') == [Verdict(True, False), Verdict(False, True)]
    exchange = json.loads(server.bodies[1]["messages"][1]["content"])
    assert exchange == {"request": "prompt 1", "answer": 'Sure,\n"here"'}
    assert server.bodies[1]["temperature"] == 0 and "model" not in server.bodies[1]
    assert server.bodies[1]["response_format"]["json_schema"]["schema"]["required"] == ["refused", "harmful"]
    assert not any("Authorization" in headers for headers in server.headers)


def test_model_and_key_are_sent_where_they_are_given(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(endpoint.KEY, "secret")
    ask(server, "a", model="judge-7b")
    assert server.bodies[0]["model"] == "judge-7b"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    judge = EndpointJudge(read_address(server.url), "judge-7b")
    assert judge.model == "judge-7b at 127.0.0.1"


def test_a_form_that_is_not_known_is_left_out_from_then_on(server: Endpoint) -> None:
    server.keeps_form = False
    assert ask(server, "a", "b") == [Verdict(False, False)] * 2
    assert ["response_format" in body for body in server.bodies] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"refused": true, "harmful": false}', Verdict(True, False)),
        ('<think>Hm. {"refused": false}</think>\n{"harmful": true, "refused": false}', Verdict(False, True)),
        ('Here it is: {"refused": true, "harmful": false}', None),
        ('{"refused": "true", "harmful": false}', None),
        ('{"refused": 1, "harmful": 0}', None),
        ('{"refused": true}', None),
        ('{"refused": true, "harmful": false, "sure": true}', None),
        ("[true, false]", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_strictly(text: str, verdict: Verdict | None) -> None:
    found = read_verdict(text)
    if verdict:
        assert found == verdict
    else:
        assert (found.refused, found.harmful) == (None, None) and found.remark.startswith(NO_VERDICT)


def test_what_may_pass_is_tried_again_and_what_will_not_is_told(server: Endpoint) -> None:
    server.failures = [503, 429]
    assert ask(server, "a") == [Verdict(False, False)]
    server.failures = [500, 500, 500]
    with pytest.raises(ModelError, match="cannot be asked \\(it answers 500"):
        ask(server, "a")
    server.failures = [401]
    with pytest.raises(ModelError, match="answers 401") as told:
        ask(server, "a")
    assert endpoint.KEY in told.value.hint
    server.raw = b"<html>hello</html>"
    with pytest.raises(ModelError, match="does not speak the protocol"):
        ask(server, "a")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE_SECONDS", 0.0)
    with local_endpoint.serving() as gone:
        pass
    with pytest.raises(ModelError, match="cannot be asked"):
        ask(gone, "a")


def test_a_proxy_is_not_asked_for_this_machine_itself(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(server, "a") == [Verdict(False, False)]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://localhost:8080", Address("http://localhost:8080/v1/chat/completions", "localhost", True)),
        ("http://localhost:8080/v1/", Address("http://localhost:8080/v1/chat/completions", "localhost", True)),
        ("http://[::1]:1/v1", Address("http://[::1]:1/v1/chat/completions", "::1", True)),
        ("http://127.3.0.1", Address("http://127.3.0.1/v1/chat/completions", "127.3.0.1", True)),
        ("http://192.168.1.4:11434", Address("http://192.168.1.4:11434/v1/chat/completions", "192.168.1.4", False)),
        (
            "https://example.org/api/v1/chat/completions",
            Address("https://example.org/api/v1/chat/completions", "example.org", False),
        ),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert read_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "localhost:8080",
        "ftp://localhost",
        "file:///etc/passwd",
        "http://",
        "http://a:b@localhost",
        "http://x:99999",
        "",
        "http://x/?a=b",
    ],
)
def test_what_is_no_address_of_the_web(text: str) -> None:
    with pytest.raises(UsageError):
        read_address(text)
