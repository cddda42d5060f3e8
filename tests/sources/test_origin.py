"""The model that another one was made from: taken where its hidden states can be the other's, and refused where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.sources.base import open_base
from safesteer_lite.sources.origin import open_origin
from tests import tiny


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
