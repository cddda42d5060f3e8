"""Uploads: refused before any work where they cannot succeed. Nothing here reaches the model hub."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from safesteer_lite.errors import ExportError, UsageError
from safesteer_lite.export.push import check_push, push


@pytest.mark.parametrize("name", ["a/b/c", "with space", "owner/..", "-x"])
def test_a_name_that_the_hub_does_not_allow_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        check_push(name)


def test_no_token_and_no_network_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(ExportError, match="there is no token") as caught:
        check_push("owner/name")
    assert "hf auth login" in caught.value.hint
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: "hf_x")
    with pytest.raises(ExportError, match="cannot be reached"):
        push(tmp_path, "owner/name")


def refusing(status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("POST", "https://hub.invalid/api"))
    return HfHubHTTPError("refused", response=response)


@pytest.mark.parametrize(("status", "told"), [(401, "may write there"), (403, "may write there"), (500, "Try again")])
def test_refusals_of_the_hub_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, told: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise refusing(status)

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ExportError) as caught:
        push(tmp_path, "owner/name")
    assert told in caught.value.hint


def test_an_upload_is_private_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []

    def create(_: object, name: str, *, private: bool, exist_ok: bool) -> str:
        asked.append((name, private, exist_ok))
        return f"hub/{name}"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: asked.append(options["folder_path"]))
    assert push(tmp_path, "owner/name") == "hub/owner/name"
    push(tmp_path, "owner/name", public=True)
    assert asked == [("owner/name", True, True), tmp_path, ("owner/name", False, True), tmp_path]
