"""A classifier of texts: a local folder or a model of the hub, its settings checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ModelError
from safesteer_lite.events import Emit
from safesteer_lite.sources.download import quiet_hub
from safesteer_lite.sources.folder import AGAIN, Findings, few, missing_weights, read_json
from safesteer_lite.sources.hub import fetch_model, is_hub_id
from safesteer_lite.sources.settings import check_attention, check_code
from safesteer_lite.text import typed_path

ARCHITECTURE = "ModernBertForSequenceClassification"


def resolve_classifier(name_or_path: str, revision: str | None, emit: Emit, stage: str) -> Path:
    """The folder of a classifier that can be used, fetched from the model hub if need be.

    Args:
        name_or_path: a local folder, or `owner/name`.
        revision: branch, tag or commit on the hub; None for its main branch.
        emit: takes one Note with size and licence before a download, then its Progress in bytes.
        stage: the name that the events carry.

    Raises:
        ModelError: it is not there, may not be fetched, or cannot be used.
        DiskSpaceError: the download does not fit.
    """
    path = typed_path(name_or_path)
    if path.is_dir():
        check_classifier(path)
        if missing := missing_weights(path):
            raise ModelError(f"{path} cannot be used: it lacks {few(missing)}.", AGAIN)
        return path
    if path.exists() or not is_hub_id(name_or_path):
        raise ModelError(
            f"{name_or_path} is neither a folder nor the id of a model.",
            "Give a folder with config.json and *.safetensors, or an id such as NousResearch/Minos-v1.",
        )
    with quiet_hub():
        return fetch_model(name_or_path, revision, emit, stage, check_classifier)


def check_classifier(folder: Path) -> Mapping[str, Any]:
    """The config.json of a classifier.

    Raises:
        ModelError: it is not that of a ModernBERT sequence classifier, or asks for code that is not run here.
    """
    findings = Findings(folder)
    config = read_json(folder, "config.json", findings, needed=True)
    if config is not None:
        check_code("config.json", config, findings)
        check_attention(config, findings)
        named = config.get("architectures")
        if named != [ARCHITECTURE] or config.get("model_type") != "modernbert":
            told = few([str(name) for name in named]) if isinstance(named, list) and named else "no architecture"
            findings.add(f"it is no refusal classifier of a kind that is supported ({told})", f"Use an {ARCHITECTURE}.")
    findings.report()
    assert config is not None
    return config
