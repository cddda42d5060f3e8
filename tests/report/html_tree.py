"""A page as a tree, read strictly: what is not closed in its order fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass(eq=False)
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str | None]
    # Told with its parents, each of which tells its children, a failed assertion would fill the memory.
    parents: tuple[Node, ...] = field(repr=False)
    children: list[Node | str] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, **attributes: str) -> list[Node]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [node for node in self.walk() if node.tag == tag and wanted.items() <= node.attributes.items()]


class Tree(HTMLParser):
    """Reads a page whose every element must be closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("root", {}, ())
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs), tuple(self.open))
        self.open[-1].children.append(node)
        if tag != "meta":
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError("the page has a comment")


def parsed(markup: str) -> Node:
    tree = Tree()
    tree.feed(markup)
    tree.close()
    assert tree.open == [tree.root]
    return tree.root


def rows(node: Node) -> list[list[str]]:
    """The cells of all tables under a node, without hard spaces."""
    lines = [[cell.text for cell in line.children if isinstance(cell, Node)] for line in node.all("tr")]
    return [[cell.replace("\u00a0", " ") for cell in line] for line in lines]
