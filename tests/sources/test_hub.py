"""The model hub: what is fetched from it, what is refused and with which advice, and the copy used without it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Event, Note, discard
from safesteer_lite.sources.resolve import resolve_model
from tests.sources.local_hub import HUB_ID

pytestmark = pytest.mark.usefixtures("offline")


def test_hub_model_offline_needs_a_whole_local_copy(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hub cannot be reached"):
        resolve_model(HUB_ID, None, discard)
    with pytest.raises(ModelError, match="not on this machine"):
        resolve_model(HUB_ID, None, discard, download=False)
    # The layout of the hub's own cache: a branch is a file that names a commit, a commit is a folder.
    store, commit = tmp_path / "hub" / "models--nobody--no-such-model", "0" * 40
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    snapshot = store / "snapshots" / commit
    snapshot.parent.mkdir()
    model_folder.rename(snapshot)
    notes: list[Event] = []
    assert resolve_model(HUB_ID, None, notes.append).folder == snapshot
    assert len(notes) == 1 and isinstance(notes[0], Note)
    assert resolve_model(HUB_ID, commit, discard, download=False).folder == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="hub cannot be reached"):
        resolve_model(HUB_ID, None, discard)


RESOLVE = f"""
from safesteer_lite.errors import ModelError
from safesteer_lite.events import Note
from safesteer_lite.sources.resolve import resolve_model
for _ in range(2):
    try:
        folder = resolve_model({HUB_ID!r}, None, lambda event: isinstance(event, Note) and print(event.message)).folder
        print(*sorted(path.name for path in folder.iterdir()))
    except ModelError as error:
        print(error)
"""


def test_hub_model_is_fetched_without_pickles_and_code_and_told_once(hub: Any, model_folder: Path) -> None:
    server, run = hub
    wanted = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    unwanted = ("pytorch_model.bin", "modeling.py", "onnx/model.json", "consolidated.safetensors", "README.md")
    server.files.update(wanted | dict.fromkeys(unwanted, b"unwanted"))
    names = "chat_template.jinja config.json model.safetensors tokenizer.json"
    said = run(RESOLVE)
    assert said == [f"Fetching {HUB_ID} from the model hub: 4 MB, licence mit.", names, names]
    assert not {name.rsplit("/", 1)[-1] for name in unwanted} & set(server.asked)


def test_hub_model_that_cannot_be_used_is_refused_before_its_weights_come(hub: Any, model_folder: Path) -> None:
    server, run = hub
    server.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    server.files["config.json"] = b'{"architectures": ["MambaForCausalLM"]}'
    assert "MambaForCausalLM, which is not supported. Supported are" in run(RESOLVE)[1]
    assert "model.safetensors" not in server.asked
    del server.files["model.safetensors"]
    assert "offers no safetensors" in run(RESOLVE)[0]


@pytest.mark.parametrize(
    ("refusal", "said"), [("GatedRepo", "gated.*hf auth login"), ("RepoNotFound", "no model of this name.*spelling")]
)
def test_hub_refusal_says_what_to_do(hub: Any, model_folder: Path, refusal: str, said: str) -> None:
    server, run = hub
    server.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    server.refusal = refusal
    assert re.search(said, run(RESOLVE)[-1])
