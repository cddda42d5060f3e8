"""Charts put figures where they belong, whatever the figures are, and markup lets no text out of its element."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safesteer_lite.report.charts import (
    WIDTH,
    Comparison,
    Point,
    Series,
    bar,
    heat_map,
    interval_chart,
    line_chart,
    ticks,
)
from safesteer_lite.report.markup import Markup, element, escape, folded, join, table
from safesteer_lite.text import visible
from tests.report.html_tree import Node, parsed

# A busy machine is no failure.
unhurried = settings(deadline=None)

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
COORDINATES = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy"}


def places(chart: Node, style: str) -> list[tuple[float, float]]:
    """The corners of the line of one style."""
    [line] = chart.all("polyline", class_=f"line {style}")
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in (line.attributes["points"] or "").split())]


def numbers(chart: Node) -> list[float]:
    """Every coordinate of a chart."""
    found = []
    for node in chart.walk():
        texts = [node.attributes[name] for name in COORDINATES & node.attributes.keys()]
        texts += re.split("[ ,]", node.attributes.get("points") or "")
        found += [float(text) for text in texts if text]
    return found


@unhurried
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.booleans())
def test_ticks_are_few_rising_and_inside(low: float, span: float, whole: bool) -> None:
    found = ticks(low, low + span, whole)
    assert len(found) <= 7
    assert found == sorted(set(found))
    slack = span * 1e-6
    assert all(low - slack <= value <= low + span + slack for value in found)
    if whole:
        assert all(value == round(value) for value in found)
    else:
        assert len(found) >= 2


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.36, [0, 0.1, 0.2, 0.3]),
        (1, 16, [5, 10, 15]),
        (-0.06, 0.1, [-0.05, 0, 0.05, 0.1]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == wanted


def test_a_line_goes_through_its_points() -> None:
    points = [Point(0, 0.0), Point(5, 1.0), Point(10, 0.25)]
    chart = parsed(line_chart("a", [Series("one", "loss", points)], "step", share=True))
    (x0, y0), (x1, y1), (x2, y2) = places(chart, "loss")
    assert x1 - x0 == x2 - x1 > 100
    assert y0 > y2 > y1, "higher figures stand higher"
    assert (y0 - y2) == pytest.approx((y0 - y1) / 4, abs=0.1)
    labels = {node.text: float(node.attributes["y"] or "") - 4 for node in chart.all("text")}
    assert (labels["0 %"], labels["100 %"]) == (y0, y1)


def test_a_whisker_spans_the_interval_of_its_point() -> None:
    points = [Point(0, 0.5, 0.25, 1.0), Point(1, 0.0, 0.0, 0.5)]
    chart = parsed(line_chart("a", [Series("one", "harmful", points)], "step", share=True))
    (_, half), (_, nought) = places(chart, "harmful")
    first, second = chart.all("line", class_="whisker harmful")
    assert float(second.attributes["y1"] or "") == nought and float(second.attributes["y2"] or "") == half
    assert float(first.attributes["y1"] or "") == (half + nought) / 2


def test_losses_below_nought_stand_below_its_line() -> None:
    chart = parsed(line_chart("a", [Series("one", "loss", [Point(1, 0.02), Point(2, -0.06)])], "step"))
    (_, above), (_, below) = places(chart, "loss")
    [nought] = [float(node.attributes["y"] or "") - 4 for node in chart.all("text") if node.text == "0"]
    assert above < nought < below


@unhurried
@given(st.lists(st.tuples(ANY_FLOAT, ANY_FLOAT), max_size=8), st.booleans())
@example([(0.0, 5e-324), (5e-324, 0.0)], False)
@example([(1.7e308, -1.7e308), (-1.7e308, 1.7e308)], False)
@example([(0.0, 1e99), (1e99, -1e99), (1.0, 2.0)], False)
def test_no_figure_leaves_the_chart(pairs: list[tuple[float, float]], share: bool) -> None:
    points = [Point(x, y, y, y) for x, y in pairs]
    chart = parsed(line_chart("a", [Series("one", "loss", points)], "step", share=share))
    assert all(math.isfinite(value) and -1 <= value <= WIDTH for value in numbers(chart))
    assert len(chart.all("title")) == sum(abs(x) < 1e100 and abs(y) < 1e100 for x, y in pairs)


@unhurried
@given(st.lists(st.lists(ANY_FLOAT, min_size=3, max_size=3), max_size=4))
def test_a_heat_map_takes_any_figures(values: list[list[float]]) -> None:
    chart = parsed(heat_map("a", values, chosen=(-1, 0), first_late=2.4))
    assert len(chart.all("title")) == 3 * len(values)
    assert len(chart.all("rect", class_="frame")) == bool(values)


def test_an_interval_chart_puts_shares_on_one_axis() -> None:
    rows = [Comparison("harmful", "harmful", (0.5, 0.25, 0.75), (1.0, 0.75, 1.0))]
    chart = parsed(interval_chart("a", rows))
    [before] = chart.all("line", class_="whisker harmful before")
    [after] = chart.all("line", class_="whisker harmful after")
    axis = {node.text: node.attributes["x"] for node in chart.all("text")}
    assert (before.attributes["x1"], before.attributes["x2"]) == (axis["25 %"], axis["75 %"])
    assert (after.attributes["x1"], after.attributes["x2"]) == (axis["75 %"], axis["100 %"])
    assert [node.text for node in chart.all("title")] == [
        "harmful refused before: 50 % (25 % to 75 %)",
        "harmful refused after: 100 % (75 % to 100 %)",
    ]


@pytest.mark.parametrize(("share", "width"), [(0.25, "25"), (7.0, "100"), (-1.0, "0"), (math.nan, "0")])
def test_a_bar_stays_in_its_cell(share: float, width: str) -> None:
    assert parsed(bar(share)).all("rect")[0].attributes["width"] == width


@unhurried
@given(st.text(), st.text())
def test_a_text_stays_in_its_element(inside: str, value: str) -> None:
    root = parsed(element("p", inside, title=value, class_="a"))
    [node] = [child for child in root.children if isinstance(child, Node)]
    assert (node.tag, node.attributes.keys()) == ("p", {"title", "class"})
    assert node.text == str(parsed(Markup(f"<p>{escape(inside)}</p>")).text)
    assert all(isinstance(child, str) for child in node.children)
    assert node.text == visible(inside.replace("\r\n", "\n"), lines=True)
    element("p", inside, title=value).encode("utf-8")


def test_markup_is_escaped_as_a_value_but_not_as_a_child() -> None:
    mark = element("b", "x<y")
    assert mark == "<b>x&lt;y</b>"
    assert join([mark, "<", 3]) == "<b>x&lt;y</b>&lt;3"
    assert element("p", mark, title=mark, hidden=True, id=None, lang=False) == (
        '<p title="&lt;b&gt;x&amp;lt;y&lt;/b&gt;" hidden><b>x&lt;y</b></p>'
    )


def test_tables_and_folds_escape_what_they_hold() -> None:
    root = parsed(join([table(("<i>",), [("<i>", "<i>")], "<i>"), folded("<i>", "<i>", private=True)]))
    assert not root.all("i")
    assert root.text == "<i>" * 5
