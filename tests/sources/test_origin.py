"""The model that another one was made from: taken where its hidden states can be the other's, and refused where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.shell.cli import main
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.origin import open_origin
from safesteer_lite.sources.resolve import resolve_model
from tests import tiny
from tests.sources.local_hub import HUB_ID, LocalHub
from tests.sources.test_folder import ORM, tensors


def test_a_model_of_the_same_kind_is_taken_and_others_are_refused(tmp_path: Path) -> None:
    made = open_base(tiny.save_model(tmp_path / "made", "llama", seed=1))
    same = tiny.save_model(tmp_path / "same", "llama", seed=2)
    assert open_origin(str(same), made, discard).fingerprint == open_base(same).fingerprint != made.fingerprint
    deeper = tiny.save_model(tmp_path / "deeper", "llama", layers=5)
    wider = tiny.save_model(tmp_path / "wider", "llama", width=32)
    for other, told in ((deeper, "5 blocks of width 64"), (wider, "4 blocks of width 32")):
        with pytest.raises(ModelError, match=f"{told} and 320 tokens, and made 4 blocks of width 64") as caught:
            open_origin(str(other), made, discard)
        assert "changed from" in caught.value.hint
    with pytest.raises(ModelError, match="is a mistral model and made a llama model"):
        open_origin(str(tiny.save_model(tmp_path / "kin", "mistral")), made, discard)
    with pytest.raises(ModelError, match="neither a folder nor the id"):
        open_origin(str(tmp_path / "gone"), made, discard)


def serve(hub: type[LocalHub], folder: Path) -> None:
    """Have the hub offer a model's folder."""
    hub.files.update({path.name: path.read_bytes() for path in folder.iterdir()})


def test_one_in_the_hub_s_cache_is_taken_from_there_without_asking(hub: type[LocalHub], tmp_path: Path) -> None:
    """Not even where it cannot be used, for it has no chat template."""
    folder, served = tiny.save_model(tmp_path / "made", "llama", seed=1), tiny.save_model(tmp_path / "served", "llama")
    (served / "chat_template.jinja").unlink()
    serve(hub, served)
    given, own = open_base(folder, tiny.CHAT_TEMPLATE), open_base(folder)
    fetched = resolve_model(HUB_ID, None, discard, template=tiny.CHAT_TEMPLATE)
    hub.asked.clear()
    assert open_origin(HUB_ID, given, discard).fingerprint == fetched.fingerprint
    with pytest.raises(ModelError, match="has no chat template"):
        open_origin(HUB_ID, own, discard)
    assert hub.asked == []


@pytest.mark.parametrize(("layers", "told"), [(5, f"{HUB_ID} has 5 blocks"), (4, "are not finite")])
def test_it_is_looked_at_first_and_fetched_last(
    layers: int,
    told: str,
    hub: type[LocalHub],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What its settings tell is told before all weights of the run's own model are read, which are read before it comes."""
    monkeypatch.chdir(tmp_path)
    made = tiny.save_model(tmp_path / "made", "llama", seed=1)
    tensors(lambda stored: stored[ORM].fill_(float("nan")))(made)
    serve(hub, tiny.save_model(tmp_path / "served", "llama", layers=layers))
    assert main(["run", str(made), "--direction-from", HUB_ID, "--plain"]) == 1
    assert told in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert "config.json" in hub.asked and "model.safetensors" not in hub.asked


def test_one_that_does_not_go_with_the_base_is_refused_before_that_is_fetched(
    hub: type[LocalHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    serve(hub, tiny.save_model(tmp_path / "served", "llama"))
    origin = tiny.save_model(tmp_path / "deeper", "llama", layers=5)
    assert main(["run", HUB_ID, "--direction-from", str(origin), "--plain"]) == 1
    assert f"has 5 blocks of width 64 and 320 tokens, and {HUB_ID} 4" in capsys.readouterr().err
    assert "model.safetensors" not in hub.asked
