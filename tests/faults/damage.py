"""What may happen to a file behind the program's back."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], str]


def flip_a_bit(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes() or b"\0")
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def cut_short(path: Path, chance: random.Random) -> str:
    size = chance.randrange(max(1, path.stat().st_size))
    os.truncate(path, size)
    return f"cut to {size} bytes"


def lengthen(path: Path, chance: random.Random) -> str:
    added = chance.choice([b"\0", b"\n", b"}", b"[" * 100_000, chance.randbytes(1000)])
    with path.open("ab") as stream:
        stream.write(added)
    return f"{added[:8]!r}... appended, {len(added)} bytes"


def remove(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "removed"


def rename(path: Path, chance: random.Random) -> str:
    path.rename(path.with_name(f"{path.name}.bak"))
    return "renamed"


def put_another_there(path: Path, chance: random.Random) -> str:
    """Another file of the same kind, as somebody does who mixes up two runs."""
    others = sorted(other for other in path.parents[1].rglob(f"*{path.suffix}") if other != path and other.is_file())
    other = chance.choice(others) if others else None
    path.write_bytes(other.read_bytes() if other else b"")
    return f"replaced by {other.name if other else 'nothing'}"


def become_a_pipe(path: Path, chance: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "replaced by a pipe"


def become_a_folder(path: Path, chance: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a folder"


def become_a_link(path: Path, chance: random.Random) -> str:
    path.unlink()
    target = chance.choice(["/dev/zero", "/nowhere", path.name])
    path.symlink_to(target)
    return f"replaced by a link to {target}"


def spoil_a_number(path: Path, chance: random.Random) -> str:
    """A value of safetensors that is no number; elsewhere, another value in the JSON."""
    if path.suffix != ".safetensors":
        return spoil_json(path, chance)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    name, entry = chance.choice(
        [(name, entry) for name, entry in json.loads(content[8 : 8 + length]).items() if name != "__metadata__"]
    )
    size = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}.get(entry["dtype"], 1)
    start, end = entry["data_offsets"]
    place = 8 + length + start + size * chance.randrange(max(1, (end - start) // size))
    content[place : place + size] = b"\xff" * (size - 1) + b"\x7f"
    path.write_bytes(content)
    return f"a value of {name} is no number"


def spoil_json(path: Path, chance: random.Random) -> str:
    """One value, anywhere, becomes something else, or is gone; what is no JSON gets a bit flipped."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return flip_a_bit(path, chance)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(child, dict | list):
                visit(child)

    if isinstance(value, dict | list):
        visit(value)
    if not places:
        return flip_a_bit(path, chance)
    node, key = chance.choice(places)
    if chance.random() < 0.2:
        del node[key]
        told = f"{key!r} is gone"
    else:
        odd: list[Any] = [
            None,
            True,
            -1,
            0,
            1 << 70,
            math.nan,
            math.inf,
            "",
            "x",
            "\x1b[2J",
            "../../x",
            [],
            {},
            [[]],
            [None],
        ]
        node[key] = chance.choice(odd)
        told = f"{key!r} is {node[key]!r}"
    path.write_text(json.dumps(value), encoding="utf-8")
    return told


def nest_deeply(path: Path, chance: random.Random) -> str:
    path.write_text("[" * 200_000, encoding="utf-8")
    return "replaced by 200,000 brackets"


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit,
    flip_a_bit,
    cut_short,
    lengthen,
    remove,
    rename,
    put_another_there,
    spoil_a_number,
    spoil_a_number,
    spoil_json,
    become_a_pipe,
    become_a_folder,
    become_a_link,
    nest_deeply,
)
