"""What `export` writes for users: files, each measured as a user will run it, with the figures beside them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safesteer_lite.events import Progress
from safesteer_lite.export import drafts
from safesteer_lite.export.folder import MERGED, WORK, exported
from safesteer_lite.export.gguf import convert, modelfile
from safesteer_lite.export.gguf.agreement import FIRST_KL_ALLOWANCE
from safesteer_lite.export.rehearsal import rehearse
from safesteer_lite.export.request import Request
from safesteer_lite.export.rows import Row, rows_record, write_rows
from safesteer_lite.export.weights import verify
from safesteer_lite.export.weights.verify import FailedCheck
from safesteer_lite.stages import export
from safesteer_lite.stages.export_card import base_name, model_name, write_beside
from safesteer_lite.stages.export_rows import Measured, gguf_row, measure_trained, merged_row
from safesteer_lite.stages.session import Session


def export_files(session: Session, adapter: Path, out: Path, request: Request) -> dict[str, Any]:
    """Write merged weights or GGUF files to `out`, prove and measure them; returns what `artifacts.json` holds.

    Raises:
        FailedCheck: an artifact failed a check; the files are kept beside `out`.
        ExportError, DiskSpaceError: nothing was left under `out`.
    """
    weights, _ = export.weights_to_take(session.config, session.base, request.weights, request.original)
    quants = request.quants if request.kind == "gguf" else ()
    rehearse(
        session.base.folder,
        out,
        weights,
        session.day,
        words=session.base.words,
        thinking=session.config.model.thinking,
        original=request.original,
        quants=quants,
    )
    with exported(out) as draft:
        measured = measure_trained(session, adapter, request)
        folder = draft / WORK / MERGED
        result = export.merged(session, adapter, folder, request.weights, request.strength, request.original)
        request = replace(request, weights=result["weights"])
        rows, problems = [*measured.rows, merged_row(session, folder, request, measured)], list[str]()
        if request.kind == "gguf":
            assert measured.witness is not None
            found, problems = _gguf_rows(session, draft, request, measured, result["kl_limit"])
            rows += found
        record = written_rows(session, draft, request, rows, problems)
        if request.kind == "merged":
            for path in sorted(folder.iterdir()):
                if path.name != verify.SUMS:
                    path.rename(draft / path.name)
            folder = draft
        files = [row["file"] for row in record["artifacts"] if row["file"]]
        if not modelfile.write_modelfiles(draft, folder, files, session.day, session.config.model.thinking):
            session.warn("No Modelfile was written: Ollama's form of this chat template is not known here.")
        write_beside(session, draft, request, record)
    tell_losses(session, record)
    return record


def copy_adapter(adapter: Path, out: Path) -> None:
    """Write the adapter as it was trained.

    Raises:
        ExportError, DiskSpaceError: nothing was left under `out`.
    """
    with exported(out) as draft:
        drafts.copy_folder(adapter, draft)


def _gguf_rows(
    session: Session, draft: Path, request: Request, measured: Measured, merge_limit: float
) -> tuple[list[Row], list[str]]:
    """Write every GGUF file, check and measure it; a file that fails is told, and the others are still tried."""
    stem, rows, problems = f"{model_name(session)}-safer", [], []
    for quant in request.quants:
        session.note(f"Writing and measuring {quant}.")
        file = draft / f"{stem}-{quant}.gguf"
        convert.write_gguf(
            draft / WORK / MERGED,
            file,
            quant,
            stem,
            draft / WORK,
            lambda done, total: session.emit(Progress(session.stage, "bytes quantised", done, total)),
        )
        try:
            convert.check_embedded_template(file, draft / WORK / MERGED)
            row = gguf_row(session, file, quant, measured, merge_limit + FIRST_KL_ALLOWANCE[quant])
        except FailedCheck as error:
            problems.append(error.message.rstrip("."))
            continue
        rows.append(row)
        if row.agreement and row.agreement.problem:
            problems.append(f"{quant}: {row.agreement.problem}")
    return rows, problems


def written_rows(
    session: Session, draft: Path, request: Request, rows: list[Row], problems: list[str]
) -> dict[str, Any]:
    """Write what was measured to `artifacts.json`; returns what it holds.

    Raises:
        FailedCheck: there are problems.
    """
    record = rows_record(rows, _about(session, request), problems)
    write_rows(draft, record)
    if problems:
        shutil.rmtree(draft / WORK)
        raise FailedCheck(f"The export failed {len(problems)} of its checks: {'; '.join(problems)}.")
    return record


def tell_losses(session: Session, record: dict[str, Any]) -> None:
    """Say of every artifact what safety it lost."""
    for row in record["artifacts"]:
        if row["safety_lost"]:
            session.warn(f"{row['artifact']} lost safety: {row['safety_lost']}.")


def _about(session: Session, request: Request) -> dict[str, Any]:
    return {
        "run": session.run.path.name,
        "model": base_name(session),
        "weights": request.weights,
        "strength": request.strength,
        "split": "test",
        "answer_tokens": session.config.evaluate.answer_tokens,
    }
