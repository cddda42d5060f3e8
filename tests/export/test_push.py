"""Uploads: refused before any work where they cannot succeed, and whole. Nothing here leaves this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from safesteer_lite.errors import ExportError, UsageError
from safesteer_lite.export.push import check_push, push
from tests.export.hub_server import OWNER, TOKEN, Hub, serving


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

    monkeypatch.setattr(HfApi, "model_info", lambda *_: SimpleNamespace(private=True))
    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ExportError) as caught:
        push(tmp_path, "owner/name")
    assert told in caught.value.hint


UPLOAD = """
import sys
from pathlib import Path
from safesteer_lite.errors import SafeSteerError
from safesteer_lite.export.push import check_push, push
public = sys.argv[3] == "public"
try:
    print(push(Path(sys.argv[1]), check_push(sys.argv[2], public), public))
except SafeSteerError as error:
    sys.exit(f"{error.message} {error.hint}")
"""


def client(hub: Hub, token: str = TOKEN) -> dict[str, str]:
    """The environment in which the hub's client takes this hub for the hub, and sends files as they are."""
    ours = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **ours}


def upload(
    hub: Hub, folder: Path, name: str, shown: str = "private", token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Upload with the hub's real client, in a process of its own."""
    command = [sys.executable, "-c", UPLOAD, str(folder), name, shown]
    return subprocess.run(command, env=client(hub, token), capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an export leaves it."""
    made = tmp_path / "safer"
    made.mkdir()
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    (made / "README.md").write_text("# Safer, and \u00fc\n", encoding="utf-8")
    (made / "SHA256SUMS").write_text("", encoding="utf-8")
    return made


def test_every_file_arrives_as_it_is_and_private_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "hub") as hub:
        done = upload(hub, folder, "my-model")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.address}/{OWNER}/my-model"
        assert upload(hub, folder, "team/model", "public").returncode == 0
        assert hub.repositories == {f"{OWNER}/my-model": True, "team/model": False}
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in (f"{OWNER}/my-model", "team/model"):
        assert {path.name: path.read_bytes() for path in (tmp_path / "hub" / name).iterdir()} == sent


def test_a_repository_that_everybody_sees_takes_an_upload_only_with_public(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "hub") as hub:
        hub.repositories = {"team/shown": False, "team/hidden": True}
        refused = upload(hub, folder, "team/shown")
        assert refused.returncode == 1 and "team/shown is public on the model hub already" in refused.stderr
        assert "Add --public" in refused.stderr and not (tmp_path / "hub" / "team").exists()
        assert upload(hub, folder, "team/shown", "public").returncode == 0
        assert upload(hub, folder, "team/hidden").returncode == 0


def test_a_wrong_token_and_a_broken_upload_lose_nothing(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "hub") as hub:
        refused = upload(hub, folder, "my-model", token="hf_of_nobody")
        assert refused.returncode == 1 and "(401)" in refused.stderr and "HF_TOKEN" in refused.stderr
        assert hub.repositories == {}
        hub.broken = True
        broken = upload(hub, folder, "my-model")
        again = f"`hf upload {OWNER}/my-model {folder} . --private`"
        assert broken.returncode == 1 and "broke off" in broken.stderr and again in broken.stderr
        assert "Traceback" not in broken.stderr
    assert not (tmp_path / "hub" / OWNER).exists()
    assert len(list(folder.iterdir())) == 3


def test_the_hint_after_a_broken_upload_uploads(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "hub") as hub:
        hub.broken = True
        said = upload(hub, folder, "my-model").stderr
        hub.broken = False
        command = said.split("`")[1].split()
        assert command[0] == "hf"
        program = Path(sys.executable).with_name("hf")
        done = subprocess.run([program, *command[1:]], env=client(hub), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert hub.repositories == {f"{OWNER}/my-model": True}
    arrived = tmp_path / "hub" / OWNER / "my-model"
    assert {path.name for path in arrived.iterdir()} == {path.name for path in folder.iterdir()}
