"""A look at a model before its weights are downloaded: its size, its licence, and whether it may be had at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safesteer_lite.errors import ModelError
from safesteer_lite.events import discard
from safesteer_lite.hardware.known import KNOWN
from safesteer_lite.hardware.shape import ModelShape, parameters, shape_from_config
from safesteer_lite.sources.demo import DEMO
from safesteer_lite.sources.download import cache_folder, quiet_hub
from safesteer_lite.sources.gguf_file import find_gguf, open_gguf
from safesteer_lite.sources.hub import ask_hub, cached_model, first_line, hub_refusals, is_hub_id, licence_of
from safesteer_lite.sources.resolve import resolve_model
from safesteer_lite.sources.settings import check_config
from safesteer_lite.text import typed_path


@dataclass(frozen=True)
class Look:
    """What is known of a model.

    Attributes:
        name: as it was given.
        shape: its size.
        licence: as its page states it; empty where it states none.
        gated: whether a licence must be accepted first.
        download_bytes: what is still to come; 0 where the model is on this machine.
    """

    name: str
    shape: ModelShape
    licence: str
    gated: bool
    download_bytes: int


def look(name: str, revision: str | None = None, *, template: str = "") -> Look:
    """Look at a local folder, at a GGUF file, at a preset's model (from public figures, without the network) or at a hub model.

    Args:
        name: a local folder, a GGUF file, `owner/name`, or the demo's model.
        revision: branch, tag or commit on the hub.
        template: the chat template that the user gives; empty where the model has to have one.

    Raises:
        ModelError: it is not there, may not be seen, or cannot be used; the hint says what to do.
    """
    if name in KNOWN and not Path(name).is_dir():
        known = KNOWN[name]
        return Look(name, known.shape, known.licence, known.gated, 0 if _is_here(name, revision) else known.size)
    if gguf := find_gguf(typed_path(name)):
        # Made a folder only when it is used: the header says how large the model is.
        file = open_gguf(gguf)
        if not template:
            file.require_template()
        licence = str(file.field("general.license") or "")
        return Look(name, shape_from_config(file.config().to_dict()), licence, False, 0)
    try:
        base = resolve_model(name, revision, discard, download=False, template=template)
    except ModelError:
        if Path(name).expanduser().exists() or not is_hub_id(name):
            raise
    else:
        return Look(name, base.shape, base.licence, False, 0)
    return _look_on_hub(name, revision)


def _is_here(name: str, revision: str | None) -> bool:
    if name == DEMO.name:
        return (cache_folder() / "demo" / name / "config.json").is_file()
    with quiet_hub():
        return cached_model(name, revision) is not None


def _look_on_hub(name: str, revision: str | None) -> Look:
    import httpx
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            info = ask_hub(name, revision)
            with hub_refusals(name, revision):
                folder = Path(hf_hub_download(name, "config.json", revision=info.sha)).parent
    except (OSError, httpx.HTTPError) as error:
        raise ModelError(
            f"{name} is not a folder, not on this machine, and the model hub cannot be asked ({first_line(error)}).",
            "Check the spelling and the connection, or give a local folder.",
        ) from error
    shape = check_config(folder)
    sizes: list[int] = [file.size or 0 for file in info.siblings if file.rfilename.endswith(".safetensors")]
    gated = bool(getattr(info, "gated", False))
    return Look(name, shape, licence_of(info), gated, sum(sizes) or 2 * parameters(shape))
