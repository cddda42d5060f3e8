"""Markup that cannot be broken by what it shows: elements of HTML and SVG whose texts are escaped unless they are markup."""

from __future__ import annotations

import html
from collections.abc import Sequence

from safesteer_lite.text import visible


class Markup(str):
    """Text that is markup already; every other text is escaped on its way into a page."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Any text as markup that shows it, whatever it holds.

    HTML has no place for control characters, UTF-8 none for half a surrogate pair, and a page none for text that turns
    itself around: they are written out.
    """
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(visible(str(text).replace("\r\n", "\n"), lines=True)))


def join(parts: Sequence[object]) -> Markup:
    """Texts and markup one after the other, the texts escaped."""
    return Markup("".join(map(escape, parts)))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """One element of HTML or SVG.

    Args:
        tag: its name.
        children: what is inside, in order; whatever is no `Markup` is escaped.
        attributes: their values, always escaped; `class_` means `class`, other underscores mean hyphens, true stands for
            an attribute without a value, and None and false for none at all.
    """
    told = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(_number(value)))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{told}>{join(children)}</{tag}>")


def _number(value: object) -> object:
    # A tenth of a unit is finer than any screen shows, and keeps the page small.
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def noted(name: str, note: str) -> Markup:
    """A name, with a note in small print."""
    return join([name, element("small", note)])


def paragraph(text: object, class_: str | None = None) -> Markup:
    """One paragraph."""
    return element("p", text, class_=class_)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], class_: str | None = None) -> Markup:
    """A table, as wide as it needs, whose first column names the row."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    whole = element("table", element("thead", head), element("tbody", *body), class_=class_)
    return element("div", whole, class_="wide")


def figure(chart: Markup, caption: str) -> Markup:
    """A chart with the sentence that explains it."""
    return element("figure", chart, element("figcaption", caption))


def folded(summary: object, *inside: object, private: bool = False) -> Markup:
    """Something to unfold; on paper it is shown, unless it is private."""
    return element("details", element("summary", summary), *inside, class_="private" if private else None)
