"""The parts of the report on the training: losses, rates and KL by step, and by the adapter's strength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safesteer_lite.evaluation.scorecard import kinds_of
from safesteer_lite.report.charts import Point, Series, line_chart
from safesteer_lite.report.markup import Markup, element, figure, folded, join, paragraph, table
from safesteer_lite.report.rates import kl_text, rate_of, rate_text
from safesteer_lite.report.source import Source, plain_json


def training(source: Source) -> Markup | None:
    """Losses, refusal rates and KL by optimizer step."""
    history = source.read("distill", "history.json", plain_json)
    if not history:
        return None
    start, best = source.record["selection"]["before"], history["best_step"]
    parent = source.parent
    # A run that continues another one begins with that one's adapter, which was measured before the first step.
    measured = ([{"step": 0, **start, "kl_to_base": 0.0}] if start and not parent else []) + history["measured"]
    losses = [Series("loss on harmful prompts", "loss", _points(history["steps"], "step", "loss"))]
    anchors = _points(history["steps"], "step", "anchor_loss")
    if anchors:
        losses.append(Series("on anchors", "anchor", anchors))
    kept = (float(best), f"kept: step {best}")
    loss_chart = figure(line_chart("Loss by step", losses, "step", mark=kept), "Loss of each step, nats a token.")
    told = (
        f"{len(history['steps'])} steps; step {best} has the best trade-off on the selection split and was kept. Step 0 is "
        f"{_beginning(parent)}. The best of several noisy figures flatters itself: the scorecard is from other prompts."
    )
    rows = [(entry["step"], *_measured_cells(entry)) for entry in measured]
    return join(
        [
            paragraph(told),
            element("div", loss_chart, *_curves(measured, "step", kept), class_="charts"),
            folded("The figures", table(("step", *_measured_headings(measured[0])), rows)),
        ]
    )


def _beginning(parent: Mapping[str, Any]) -> str:
    """What a training began from, with how that came to be."""
    if not parent:
        return "the base"
    ancestors = ", then ".join(parent["ancestors"])
    return f"the adapter of {parent['run']} (SHA-256 {parent['adapter'][:12]}), after {parent['steps']} steps in {ancestors}"


def strength(source: Source) -> Markup | None:
    """The strength dial: rates and KL by the factor on the adapter."""
    points = source.dial()
    if not points:
        return None
    rows = [(f"{point['strength']:g}", *_measured_cells(point)) for point in points]
    told = "The adapter scaled, without training again: 0 is the base, 1 the trained model. Measured on the selection split."
    charts = element("div", *_curves(points, "strength", (1.0, "trained")), class_="charts")
    return join([paragraph(told), charts, table(("strength", *_measured_headings(points[0])), rows)])


def _points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Point]:
    return [Point(float(row[x]), float(row[y])) for row in rows if row.get(y) is not None]


def _measured_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    score, apart = entry.get("score"), entry.get("separation")
    return (
        *(rate_text(rate_of(entry[name])) for name in kinds_of(entry)),
        kl_text(entry["kl_to_base"]),
        "" if score is None else f"{score:+.1f}",
        "" if apart is None else f"{apart:+.2f}",
    )


def _measured_headings(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (*kinds_of(entry), "KL", "score, points", "separation, nats")


def _curves(rows: Sequence[Mapping[str, Any]], x: str, mark: tuple[float, str]) -> Iterator[Markup]:
    """Refusal rates and KL over steps or strengths."""
    lines = [
        Series(
            name, name, [Point(float(row[x]), (rate := rate_of(row[name])).share, rate.low, rate.high) for row in rows]
        )
        for name in kinds_of(rows[0])
    ]
    rates = line_chart(f"Refusal rates by {x}", lines, x, share=True, whole=x == "step", mark=mark)
    yield figure(rates, "Refused on the selection split, with 95\u00a0% Wilson intervals.")
    divergence = _points(rows, x, "kl_to_base")
    if divergence:
        line = Series("KL to the base", "kl", divergence)
        chart = line_chart(f"KL to the base by {x}", [line], x, whole=x == "step", mark=mark)
        yield figure(chart, "Divergence from the base over whole answers to harmless prompts, nats a token.")
