"""What `export --to lora-gguf` writes: the adapter alone for llama.cpp, measured on the base's own GGUF file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safesteer_lite.events import Progress
from safesteer_lite.export.folder import MERGED, WORK, exported
from safesteer_lite.export.gguf import convert
from safesteer_lite.export.gguf.agreement import FIRST_KL_ALLOWANCE
from safesteer_lite.export.rehearsal import rehearse
from safesteer_lite.export.request import Request
from safesteer_lite.export.rows import LORA
from safesteer_lite.export.weights import merge
from safesteer_lite.stages import export
from safesteer_lite.stages.export_card import model_name, write_beside
from safesteer_lite.stages.export_rows import gguf_row, measure_trained
from safesteer_lite.stages.exporting import tell_losses, written_rows
from safesteer_lite.stages.session import Session

# The base's file, on which the adapter is measured: the widest, so that what differs is the adapter's doing.
_ON = "F16"


def export_lora(session: Session, adapter: Path, out: Path, request: Request) -> dict[str, Any]:
    """Write the adapter to `out`, prove and measure it on the base; returns what `artifacts.json` holds.

    Raises:
        FailedCheck: it failed a check; the file is kept beside `out`.
        ExportError, DiskSpaceError: nothing was left under `out`.
    """
    base, words = request.original or session.base.folder, session.base.words
    weights, reason = export.weights_to_take(session.config, session.base, request.weights, request.original)
    if reason:
        session.note(reason)
    request = replace(request, weights=weights)
    rehearse(
        session.base.folder,
        out,
        weights,
        session.day,
        words=words,
        thinking=session.config.model.thinking,
        original=request.original,
        quants=(_ON,),
    )
    with exported(out) as draft:
        measured = measure_trained(session, adapter, request)
        session.drop_policy()
        folder, name = draft / WORK / MERGED, model_name(session)
        export.reopen(folder)
        merge.merge_adapter(
            base,
            adapter,
            folder,
            strength=0.0,
            words=words,
            weights=weights,
            progress=lambda done, total: session.emit(Progress(session.stage, "bytes of the base", done, total)),
        )
        session.note(f"Writing the adapter, and measuring it on the base's {_ON} file.")
        convert.write_gguf(folder, draft / WORK / f"{name}.gguf", _ON, name, draft / WORK)
        file = draft / f"{name}-safer-lora.gguf"
        convert.convert_adapter(adapter, folder, file)
        limit = export.kl_limit(session, weights) + FIRST_KL_ALLOWANCE[_ON]
        row = gguf_row(session, draft / WORK / f"{name}.gguf", LORA, measured, limit, file)
        problems = [f"{LORA}: {row.agreement.problem}"] if row.agreement and row.agreement.problem else []
        record = written_rows(session, draft, request, [*measured.rows, row], problems)
        write_beside(session, draft, request, record)
    tell_losses(session, record)
    return record
