"""The model hub: what is fetched from it, what is refused and with which advice, and the copy used without it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from huggingface_hub import close_session

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Event, Note, discard
from safesteer_lite.sources.resolve import resolve_model
from safesteer_lite.sources.transfer import hub_store
from tests.sources.local_hub import HUB_ID, LocalHub

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


def fetch() -> list[str]:
    """What is said while the hub's model is fetched: the notes, then its files or the error."""
    said: list[str] = []

    def tell(event: Event) -> None:
        if isinstance(event, Note):
            said.append(event.message)

    try:
        folder = resolve_model(HUB_ID, None, tell).folder
        return [*said, " ".join(sorted(path.name for path in folder.iterdir()))]
    except ModelError as error:
        return [*said, str(error)]


def test_hub_model_is_fetched_without_pickles_and_code_and_told_once(hub: type[LocalHub], model_folder: Path) -> None:
    wanted = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    unwanted = ("pytorch_model.bin", "modeling.py", "onnx/model.json", "consolidated.safetensors", "README.md")
    hub.files.update(wanted | dict.fromkeys(unwanted, b"unwanted"))
    names = "chat_template.jinja config.json model.safetensors tokenizer.json"
    assert fetch() == [f"Fetching {HUB_ID} from the model hub: 4 MB, licence mit.", names]
    assert fetch() == [names]
    assert not {name.rsplit("/", 1)[-1] for name in unwanted} & set(hub.asked)


def test_what_was_fetched_is_found_again_without_the_hub(
    hub: type[LocalHub], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    folder = resolve_model(HUB_ID, None, discard).folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model(HUB_ID, None, discard).folder == folder
    assert resolve_model(HUB_ID, None, discard, download=False).folder == folder
    for path in model_folder.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_hub_model_that_cannot_be_used_is_refused_before_its_weights_come(
    hub: type[LocalHub], model_folder: Path
) -> None:
    hub.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    hub.files["config.json"] = b'{"architectures": ["MambaForCausalLM"]}'
    assert "MambaForCausalLM, which is not supported. Supported are" in fetch()[1]
    assert "model.safetensors" not in hub.asked
    del hub.files["model.safetensors"]
    assert "offers no safetensors" in fetch()[0]


@pytest.mark.parametrize(
    ("refusal", "said"), [("GatedRepo", "gated.*hf auth login"), ("RepoNotFound", "no model of this name.*spelling")]
)
def test_hub_refusal_says_what_to_do(hub: type[LocalHub], model_folder: Path, refusal: str, said: str) -> None:
    hub.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    hub.refusal = refusal
    assert re.search(said, fetch()[-1])


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("all", "hub cannot be reached .what answered in its place is no model hub, such as the log-in page"),
        ("files", "A web page came in place of .*log-in"),
    ],
)
def test_a_web_page_in_place_of_the_hub_is_told(hub: type[LocalHub], model_folder: Path, page: str, said: str) -> None:
    hub.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    hub.page = page
    assert re.search(said, fetch()[-1])
    assert not list(hub_store(HUB_ID).rglob("snapshots/*/*"))


def test_a_socks_proxy_is_told_where_its_package_is_missing(
    hub: type[LocalHub], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("socksio"):
        pytest.skip("the package is installed")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    hub.files.update({path.name: path.read_bytes() for path in model_folder.iterdir()})
    close_session()
    assert re.search(r"cannot be reached .a SOCKS proxy is set.*pip install .httpx\[socks\]", fetch()[-1])
