"""GGUF files whose header has been tampered with: values of other types, counts that no file holds, bytes at random."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader, GGUFValueType

_MANY = 1 << 60


@dataclass
class Header:
    """A GGUF file in pieces: each value and each tensor's entry as its bytes, without its name.

    Attributes:
        values: name, type and content of each value of the header.
        tensors: name and entry (count of sizes, sizes, type, offset) of each tensor.
        data: all that follows.
    """

    values: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, bytes]]
    data: bytes

    def written(self) -> bytes:
        """The file."""
        out = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.values))
        out += b"".join(text(name) + struct.pack("<I", kind) + content for name, kind, content in self.values)
        out += b"".join(text(name) + entry for name, entry in self.tensors)
        return out + bytes(-len(out) % 32) + self.data


def text(content: bytes) -> bytes:
    """A text as such files have it: its length and its bytes."""
    return struct.pack("<Q", len(content)) + content


def read_header(path: Path) -> Header:
    """A whole GGUF file in pieces."""
    reader = GGUFReader(path)
    values = [
        (field.name.encode(), int(field.types[0]), b"".join(part.tobytes() for part in field.parts[3:]))
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.")
    ]
    tensors = [
        (tensor.name.encode(), b"".join(part.tobytes() for part in tensor.field.parts[2:])) for tensor in reader.tensors
    ]
    return Header(values, tensors, path.read_bytes()[reader.data_offset :])


def _some_value(chance: random.Random) -> tuple[int, bytes]:
    """A type and a value of it that few readers expect."""
    kinds = GGUFValueType
    number = chance.choice([0, 1, 3, 65535, (1 << 31) - 1, (1 << 32) - 1])
    return chance.choice(
        [
            (kinds.UINT32, struct.pack("<I", number)),
            (kinds.INT32, struct.pack("<i", -chance.randint(1, 9))),
            (kinds.UINT64, struct.pack("<Q", _MANY * chance.randint(1, 15))),
            (kinds.FLOAT32, struct.pack("<f", chance.choice([0.0, -1.5, 2.5, float("inf"), float("nan")]))),
            (kinds.BOOL, bytes([chance.randint(0, 1)])),
            (kinds.STRING, text(chance.choice([b"", b"none", b"12", b"\xff\xfe", b"qwen2", b"\x1b[2J" * 40]))),
            (kinds.ARRAY, struct.pack("<IQ", kinds.UINT32, 0)),
            (kinds.ARRAY, struct.pack("<IQIII", kinds.UINT32, 3, 1, number, 3)),
            (kinds.ARRAY, struct.pack("<IQ", kinds.STRING, 2) + text(b"a") + text(b"a")),
            (kinds.ARRAY, struct.pack("<IQf", kinds.FLOAT32, 1, 1.5)),
            (kinds.ARRAY, struct.pack("<IQ", chance.choice([kinds.UINT8, kinds.BOOL, kinds.STRING]), _MANY)),
            (kinds.ARRAY, struct.pack("<IQ", kinds.ARRAY, 1) * chance.choice([2, 5000])),
            (chance.randint(13, 99), bytes(8)),
        ]
    )


def _another_value(header: Header, chance: random.Random) -> str:
    place = chance.randrange(len(header.values))
    name = header.values[place][0]
    header.values[place] = (name, *_some_value(chance))
    return f"{name.decode()} = {header.values[place][1:]!r:.80}"


def _drop_value(header: Header, chance: random.Random) -> str:
    return f"without {header.values.pop(chance.randrange(len(header.values)))[0].decode()}"


def _twice(header: Header, chance: random.Random) -> str:
    header.values.append(chance.choice(header.values))
    return f"{header.values[-1][0].decode()} twice"


def _more(header: Header, chance: random.Random) -> str:
    names = ("general.alignment", "split.count", "general.type", "tokenizer.ggml.scores", "tokenizer.ggml.eot_token_id")
    sizes = ("qwen2.vocab_size", "qwen2.rope.scaling.type", "qwen2.rope.dimension_count", "\xff")
    name = chance.choice([*names, *sizes]).encode("latin-1")
    header.values.append((name, *_some_value(chance)))
    return f"more: {name!r} = {header.values[-1][1:]!r:.80}"


def _another_entry(header: Header, chance: random.Random) -> str:
    place = chance.randrange(len(header.tensors))
    name, entry = header.tensors[place]
    sizes = [chance.choice([0, 1, 32, 64, 1 << 32, _MANY]) for _ in range(chance.choice([0, 1, 2, 3]))]
    kind, offset = struct.unpack("<IQ", entry[-12:])
    match chance.randrange(4):
        case 0:
            entry = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + entry[-12:]
        case 1:
            entry = entry[:-12] + struct.pack("<IQ", chance.choice([1, 2, 16, 24, 28, 30, 36, 1000]), offset)
        case 2:
            entry = entry[:-12] + struct.pack("<IQ", kind, chance.choice([1, 32, 1 << 20, _MANY]))
        case _:
            entry = struct.pack("<I", chance.choice([7, 1 << 31])) + entry[4:]
    header.tensors[place] = (name, entry)
    return f"{name.decode()}: {entry!r:.80}"


_CHANGES: list[Callable[[Header, random.Random], str]] = [
    *[_another_value] * 5,
    _drop_value,
    _twice,
    _more,
    _another_entry,
]


def tamper(source: Path, path: Path, seed: int) -> str:
    """Write a GGUF file with one change in its header, or some of its bytes at random.

    Args:
        source: a whole file.
        path: where to write.
        seed: decides what is changed.

    Returns:
        What was changed.
    """
    chance, header = random.Random(seed), read_header(source)
    if chance.random() < 0.15:
        content = bytearray(header.written())
        places = [chance.randrange(len(content) - len(header.data)) for _ in range(chance.randint(1, 4))]
        for place in places:
            content[place] = chance.randrange(256)
        path.write_bytes(content)
        return f"bytes {places}"
    told = chance.choice(_CHANGES)(header, chance)
    path.write_bytes(header.written())
    return told
