"""Stage 6: merged 16-bit weights, reloaded and compared with the model that was trained (docs/export.md)."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path
from typing import Any

from safesteer_lite.config import RunConfig
from safesteer_lite.config.constants import CHECK_PROMPTS
from safesteer_lite.events import Metric, Progress
from safesteer_lite.export import drafts
from safesteer_lite.export.rehearsal import rehearse
from safesteer_lite.export.weights import merge, verify
from safesteer_lite.export.weights.base import Weights
from safesteer_lite.export.weights.original import describe_original
from safesteer_lite.export.weights.reload import compare_reloaded
from safesteer_lite.export.weights.verify import FailedCheck
from safesteer_lite.models.adapter import read_adapter, scale_adapter
from safesteer_lite.models.reference import Reference, reference_answers
from safesteer_lite.prompts.plan import texts
from safesteer_lite.runs.folder import Publication
from safesteer_lite.sources.base import Base
from safesteer_lite.stages.session import Session

# Greedy answers of the reload check, in tokens.
_CHECK_TOKENS = 32

KL_LIMITS = {"dequantised": 0.005, "original": 0.5}
"""Nats a token by which merged weights may differ from the trained policy. The dequantised base is what was trained, so
only rounding to 16 bits remains: 0.0004 on the demo's model, whose whole adapter is worth twice the limit. Original weights
differ from it by the whole quantisation error of the base."""


def run(session: Session, publication: Publication) -> None:
    """Merge, check the files, reload them, compare, and write the sums."""
    adapter = session.run.folder("distill", "adapter")
    (publication.path / "adapter").mkdir()
    drafts.copy_folder(adapter, publication.path / "adapter")
    # Merged outside the draft, which does not outlive a kill; publishing the stage removes this folder.
    work = publication.path.with_suffix(".partial")
    try:
        publication.result = merged(session, adapter, work / "merged", session.config.export.weights)
        (work / "merged").rename(publication.path / "merged")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def merged(
    session: Session, adapter: Path, out: Path, weights: str, strength: float = 1.0, original: Path | None = None
) -> dict[str, Any]:
    """Write merged weights to `out` and prove them; returns what goes into the manifest.

    Args:
        session: of a trained run.
        adapter: its adapter.
        out: the folder to create. What a killed attempt has left there, finished or not, is taken over.
        weights: base to merge into, `original` or `dequantised`.
        strength: factor on the adapter.
        original: the 16-bit weights of a base that is itself in 4 bits; None if they are not at hand.

    Raises:
        ExportError: the weights could not be written; then nothing stays under `out`.
        FailedCheck: they are written, and failed a check; the caller keeps them aside or removes them.
    """
    trained = trained_answers(session, adapter, strength)
    prompts = sum(len(batch) for batch, _ in trained.batches)
    weights, reason = weights_to_take(session.config, session.base, weights, original)
    if reason:
        session.note(reason)
    session.drop_policy()
    reopen(out)
    result = merge.merge_adapter(
        original if original and weights == "original" else session.base.folder,
        adapter,
        out,
        strength=strength,
        words=session.base.words,
        weights=weights,
        progress=lambda done, total: session.emit(Progress(session.stage, "bytes merged", done, total)),
    )
    report = verify.check_files(out, session.base.words)
    kl, same = compare_reloaded(out, trained, session.config.distill.chunk)
    limit = kl_limit(session, weights)
    if not kl <= limit:
        raise FailedCheck(
            f"The merged weights differ from the trained model by {kl:.3f} nats a token, more than {limit:g}.",
            "Try `export --weights dequantised`, which merges into exactly what was trained.",
        )
    verify.write_sums(out)
    session.emit(Metric(session.stage, "KL of merged to trained", kl, trained.positions))
    session.note(
        f"Merged into the {weights} weights ({report.dtype}, {report.parameters / 1e6:.1f} million): along "
        f"{same} of {prompts} of the trained model's answers they find the same words likeliest, KL {kl:.4f} nats a token."
    )
    return {
        "weights": weights,
        "precision_trained": session.config.model.precision,
        "kl_to_trained": kl,
        "kl_limit": limit,
        "same_answers": same,
        "check_prompts": prompts,
        "dtype": report.dtype,
        "parameters": report.parameters,
        "files": list(result.files),
    }


def kl_limit(session: Session, weights: Weights) -> float:
    """Nats a token by which a model on these base weights may differ from the trained one."""
    quantised = session.config.model.precision == "nf4" or session.base.is_quantised
    return KL_LIMITS[weights if quantised else "dequantised"]


def weights_to_take(config: RunConfig, base: Base, wanted: str, original: Path | None = None) -> tuple[Weights, str]:
    """The weights that an adapter is merged into, and why it is not those that were asked for, or an empty string.

    Args:
        config: all settings.
        base: the base model.
        wanted: `original` or `dequantised`.
        original: the 16-bit weights of a base that is itself in 4 bits; None if they are not at hand.
    """
    if wanted == "original":
        if not base.is_quantised or original is not None:
            return "original", ""
        about = describe_original(base.folder, config.model.name)
        return "dequantised", f"The adapter is merged into the dequantised weights. {about}"
    if base.is_quantised or config.model.precision == "nf4":
        return "dequantised", ""
    return "original", "The base was not quantised, so its dequantised weights are its original ones."


def rehearse_stage(config: RunConfig, base: Base, run: Path, day: date) -> None:
    """See, before anything is trained, that this stage will be able to write what it makes of the base.

    Args:
        config: all settings.
        base: the base model.
        run: the run folder, which need not exist yet.
        day: what a chat template that asks the date is told.

    Raises:
        ExportError: it will not; the message names everything that is in the way.
        DiskSpaceError: nothing but room is missing.
    """
    weights, _ = weights_to_take(config, base, config.export.weights)
    # Where a killed attempt has left weights, which then count as room.
    rehearse(
        base.folder,
        run / "06-export.partial" / "merged",
        weights,
        day,
        words=base.words,
        thinking=config.model.thinking,
    )


def reopen(out: Path) -> None:
    """Make merged weights of a killed attempt a draft again: the merge knows what in it is whole, and what is its own."""
    if (out / merge.RECORD).is_file():
        shutil.rmtree(drafts.draft_name(out), ignore_errors=True)
        out.rename(drafts.draft_name(out))
    elif out.exists():
        shutil.rmtree(out)


def trained_answers(session: Session, adapter: Path, strength: float) -> Reference:
    """Greedy answers of the trained policy, its adapter scaled by `strength`, to harmful and harmless prompts."""
    policy = session.policy
    read_adapter(policy.model, adapter)
    scale_adapter(policy.model, strength)
    sets, half = session.prompts.split("selection"), CHECK_PROMPTS // 2
    prompts = texts(sets.harmful)[:half] + texts(sets.harmless)[: CHECK_PROMPTS - half]
    return reference_answers(policy, prompts, _CHECK_TOKENS, session.answer_batch)
