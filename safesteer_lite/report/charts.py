"""Charts as inline SVG: pure functions from figures to markup that needs no script and no network.

Every chart is `WIDTH` units wide, about what a phone shows, so that its words keep their size there. Colours come from
classes that the page defines, for light, dark and paper; shapes and words tell the same, for who sees no colours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from safesteer_lite.report.markup import Markup, element, join

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 46, 40
_HEIGHT = 246

# More points than this make a line of markers that hides the line.
_MARKED_POINTS = 30

_LARGEST, _SMALLEST = 1e100, 1e-100


def drawable(value: float) -> bool:
    """Whether a figure has a place on an axis: it is a number, and not so large that reckoning with it overflows."""
    return abs(value) < _LARGEST


@dataclass(frozen=True)
class Point:
    """One figure of a line, with the bounds of its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: what the legend calls it.
        style: class of its colour and dashes.
        points: from left to right; those that are not `drawable` are left out.
    """

    name: str
    style: str
    points: Sequence[Point]

    @property
    def drawn(self) -> list[Point]:
        """The points that have a place."""
        return [point for point in self.points if drawable(point.x) and drawable(point.y)]


@dataclass(frozen=True)
class Scale:
    """A map from figures to places, both ends included; one figure alone is put in the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high <= self.low:
            return (self.start + self.end) / 2
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, whole: bool = False, wanted: int = 5) -> list[float]:
    """About `wanted` round figures between `low` and `high`, rising; `whole` ones only, if asked."""
    rough = (high - low) / wanted
    if rough < _SMALLEST:
        return [low]
    magnitude = 10.0 ** floor(log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    found = [number * step for number in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]
    # Rounding to the step undoes 3 * 0.1 = 0.30000000000000004.
    return [round(value, max(0, 1 - floor(log10(step)))) for value in found]


def line_chart(
    label: str,
    series: Sequence[Series],
    x_name: str,
    *,
    share: bool = False,
    whole: bool = True,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Lines over one axis, with a legend, and intervals as whiskers.

    Args:
        label: what the chart shows, for who cannot see it.
        series: the lines.
        x_name: what the horizontal axis counts.
        share: the figures are shares, 0 to 1, shown as percentages on the full axis.
        whole: the horizontal axis counts whole things.
        mark: a place on the horizontal axis and the word for it.

    Returns:
        One `svg` element; an empty one where no point is `drawable`.
    """
    points = [point for line in series for point in line.drawn]
    if not points:
        return _svg(label, 1, [])
    places = [point.x for point in points] + ([mark[0]] if mark else [])
    across = Scale(min(places), max(places), _LEFT + 6, WIDTH - _RIGHT)
    low, high = (0.0, 1.0) if share else _bounds([point.y for point in points])
    up = Scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    shown: Callable[[float], str] = _percent if share else "{:.3g}".format
    parts = [_grid(across, up, shown, x_name, whole)]
    if mark:
        parts.append(_mark(across(mark[0]), mark[1]))
    for index, line in enumerate(series):
        # Whiskers of lines that meet would hide each other.
        aside = 4.0 * (index - (len(series) - 1) / 2) if any(point.low is not None for point in points) else 0.0
        parts.append(_trace(line, index, across, up, aside, shown, x_name))
    return _svg(label, _HEIGHT, [*parts, _legend(series)])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """An axis that holds all values and nought, and is never a single point."""
    low, high = min(0.0, *values), max(0.0, *values)
    return (low, high) if high > low else (0.0, 1.0)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _grid(across: Scale, up: Scale, shown: Callable[[float], str], x_name: str, whole: bool) -> Markup:
    parts = []
    for value in ticks(up.low, up.high):
        y = up(value)
        parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT + 6, y1=y, y2=y, class_="grid"))
        parts.append(element("text", shown(value), x=_LEFT - 6, y=y + 4, text_anchor="end"))
    base = _HEIGHT - _BOTTOM
    for value in ticks(across.low, across.high, whole):
        x = across(value)
        parts.append(element("line", x1=x, x2=x, y1=base, y2=base + 4, class_="axis"))
        parts.append(element("text", f"{value:g}", x=x, y=base + 17, text_anchor="middle"))
    parts.append(element("text", x_name, x=(_LEFT + WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, text_anchor="middle"))
    return join(parts)


def _mark(x: float, word: str) -> Markup:
    anchor, aside = ("start", 4) if x < WIDTH / 2 else ("end", -4)
    return join(
        [
            element("line", x1=x, x2=x, y1=_TOP - 18, y2=_HEIGHT - _BOTTOM, class_="mark"),
            element("text", word, x=x + aside, y=_TOP - 9, text_anchor=anchor, class_="strong"),
        ]
    )


def _trace(
    line: Series, index: int, across: Scale, up: Scale, aside: float, shown: Callable[[float], str], x_name: str
) -> Markup:
    places = [(point, across(point.x) + aside, up(point.y)) for point in line.drawn]
    parts = [
        element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for _, x, y in places), class_=f"line {line.style}")
    ]
    for point, x, y in places:
        told = f"{line.name}: {shown(point.y)} at {x_name} {point.x:g}"
        if point.low is not None and point.high is not None:
            told += f" ({shown(point.low)} to {shown(point.high)})"
            parts.append(
                element("line", x1=x, x2=x, y1=up(point.low), y2=up(point.high), class_=f"whisker {line.style}")
            )
        if len(places) <= _MARKED_POINTS:
            parts.append(_marker(index, x, y, line.style, told))
    return join(parts)


def _marker(index: int, x: float, y: float, style: str, told: str = "") -> Markup:
    """A circle, a square, a triangle or a diamond."""
    inside = [element("title", told)] if told else []
    if index % 4 == 0:
        return element("circle", *inside, cx=x, cy=y, r=3.5, class_=f"point {style}")
    corners = {
        1: ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        2: ((0.0, -4.2), (4.2, 3.2), (-4.2, 3.2)),
        3: ((0.0, -4.6), (4.6, 0.0), (0.0, 4.6), (-4.6, 0.0)),
    }[index % 4]
    outline = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in corners)
    return element("polygon", *inside, points=outline, class_=f"point {style}")


def _legend(series: Sequence[Series]) -> Markup:
    parts, x = [], float(_LEFT)
    for index, line in enumerate(series):
        parts.append(element("line", x1=x, x2=x + 20, y1=11, y2=11, class_=f"line {line.style}"))
        parts.append(_marker(index, x + 10, 11, line.style))
        parts.append(element("text", line.name, x=x + 25, y=15))
        x += 37 + 6.3 * len(line.name)
    return join(parts)


@dataclass(frozen=True)
class Comparison:
    """A share before and after, each with its interval: (share, low, high), all 0 to 1."""

    name: str
    style: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]


def interval_chart(label: str, rows: Sequence[Comparison]) -> Markup:
    """Shares before (hollow) and after (filled) on one axis from 0 to 100 %, with their intervals as whiskers."""
    left, band = 78, 46
    across = Scale(0.0, 1.0, left, WIDTH - _RIGHT - 4)
    base = 8 + band * len(rows)
    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(value)
        parts.append(element("line", x1=x, x2=x, y1=4, y2=base, class_="grid"))
        parts.append(element("text", _percent(value), x=x, y=base + 16, text_anchor="middle"))
    for index, row in enumerate(rows):
        middle = 8 + band * (index + 0.5)
        parts.append(element("text", row.name, x=left - 10, y=middle + 4, text_anchor="end"))
        for word, (figure, low, high), y in (("before", row.before, middle - 9), ("after", row.after, middle + 9)):
            told = f"{row.name} refused {word}: {_percent(figure)} ({_percent(low)} to {_percent(high)})"
            style = f"{row.style} {word}"
            parts.append(element("line", x1=across(low), x2=across(high), y1=y, y2=y, class_=f"whisker {style}"))
            parts.append(_marker(index, across(figure), y, style, told))
    return _svg(label, base + 24, parts)


def heat_map(
    label: str,
    values: Sequence[Sequence[float]],
    *,
    chosen: tuple[int, int] | None = None,
    scored: Collection[tuple[int, int]] = (),
    first_late: float | None = None,
) -> Markup:
    """Figures by position (across) and layer (down), the darker the larger, each written in its cell.

    Args:
        label: what the chart shows, for who cannot see it.
        values: (positions, layers); the last position is -1. What is not `drawable` is left blank.
        chosen: position (negative) and layer of the cell to frame.
        scored: positions and layers of the cells to dot.
        first_late: layers from this one on are set apart by a line.
    """
    positions, layers = len(values), max(map(len, values), default=0)
    if not layers:
        return _svg(label, 1, [])
    left, top, row = 40, 40, 17
    column = (WIDTH - left - 4) / positions
    finite = [value for column_values in values for value in column_values if drawable(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    shade = Scale(low, high, 0.05, 1.0)
    parts = [element("text", "position", x=(left + WIDTH) / 2, y=12, text_anchor="middle")]
    parts.append(element("text", "layer", x=left - 6, y=top - 8, text_anchor="end"))
    for layer in range(layers):
        parts.append(element("text", layer, x=left - 6, y=top + layer * row + 13, text_anchor="end"))
    for place, figures in enumerate(values):
        x, position = left + place * column, place - positions
        parts.append(element("text", position, x=x + column / 2, y=top - 8, text_anchor="middle"))
        for layer, value in enumerate(figures):
            parts.append(
                _cell(x, float(top + layer * row), column, row, value, shade, f"position {position}, layer {layer}")
            )
            if (position, layer) in scored:
                parts.append(element("circle", cx=x + 7, cy=top + (layer + 0.5) * row, r=2.2, class_="dot"))
    if first_late is not None and first_late < layers:
        y = float(top + ceil(first_late) * row)
        parts.append(element("line", x1=left, x2=WIDTH - 4, y1=y, y2=y, class_="mark"))
    if chosen and -positions <= chosen[0] < 0 <= chosen[1] < layers:
        x, y = left + (chosen[0] + positions) * column, float(top + chosen[1] * row)
        parts.append(element("rect", x=x, y=y, width=column, height=row, class_="frame"))
    return _svg(label, top + layers * row + 4, parts)


def _cell(x: float, y: float, width: float, height: float, value: float, shade: Scale, where: str) -> Markup:
    if not drawable(value):
        told = element("title", f"{where}: no figure")
        return element("rect", told, x=x, y=y, width=width, height=height, class_="hole")
    told, strength = element("title", f"{where}: {value:.2f}"), f"fill-opacity:{shade(value):.2f}"
    cell = element("rect", told, x=x, y=y, width=width, height=height, class_="heat", style=strength)
    if width < 30:
        return cell
    return join(
        [cell, element("text", f"{value:.2f}", x=x + width / 2, y=y + 12.5, text_anchor="middle", class_="figure")]
    )


def bar(share: float) -> Markup:
    """A small bar for a table's cell, as long as `share` (0 to 1) of its width."""
    length = 100 * min(max(share, 0.0), 1.0) if drawable(share) else 0.0
    return element(
        "svg",
        element("rect", x=0, y=0, width=length, height=8),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        class_="bar",
        aria_hidden="true",
    )


def _svg(label: str, height: float, parts: Sequence[Markup]) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label, class_="chart")
