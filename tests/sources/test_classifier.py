"""A classifier from a folder or the model hub: what is refused before its weights come."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Event, Note, discard
from safesteer_lite.sources.classifier import resolve_classifier
from tests import judge_models
from tests.sources.local_hub import HUB_ID, LocalHub

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judge_models.save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "classifier")


def test_a_classifier_is_fetched_and_its_size_and_licence_told(hub: type[LocalHub], folder: Path) -> None:
    hub.files.update({path.name: path.read_bytes() for path in folder.iterdir()} | {"pytorch_model.bin": b"unwanted"})
    events: list[Event] = []
    fetched = resolve_classifier(HUB_ID, None, events.append, "judge")
    assert sorted(path.name for path in fetched.iterdir()) == sorted(path.name for path in folder.iterdir())
    (note,) = [event for event in events if isinstance(event, Note)]
    assert note.stage == "judge" and "licence mit" in note.message and "Fetching" in note.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "no refusal classifier of a kind that is supported"),
        ({"architectures": None}, "no architecture"),
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "never run"),
        ({"attn_implementation": "somebody/kernel"}, "fetched from elsewhere"),
    ],
)
def test_what_is_no_such_classifier_is_refused_before_its_weights_come(
    hub: type[LocalHub], folder: Path, change: dict[str, object], said: str
) -> None:
    hub.files.update({path.name: path.read_bytes() for path in folder.iterdir()})
    hub.files["config.json"] = json.dumps(json.loads(hub.files["config.json"]) | change).encode()
    with pytest.raises(ModelError, match=said):
        resolve_classifier(HUB_ID, None, discard, "judge")
    assert "model.safetensors" not in hub.asked


def test_a_folder_is_taken_as_it_is_if_it_is_whole(folder: Path) -> None:
    assert resolve_classifier(str(folder), None, discard, "judge") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks"):
        resolve_classifier(str(folder), None, discard, "judge")
    with pytest.raises(ModelError, match="neither a folder nor the id of a model"):
        resolve_classifier("nowhere", None, discard, "judge")
