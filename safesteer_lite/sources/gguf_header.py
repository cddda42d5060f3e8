"""The header of a GGUF file: read no farther than the file reaches, and every value of it of the kind that it has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safesteer_lite.errors import ModelError, SafeSteerError
from safesteer_lite.sources.folder import AGAIN, brief
from safesteer_lite.sources.hub import first_line

UNREADABLE = (ValueError, LookupError, OSError, OverflowError, RecursionError)
"""What `read_header` and `value` raise where a file is no whole GGUF file."""

# No model that is read here comes near.
_MOST_LAYERS = 1000
_LARGEST_SIZE = 1 << 24
_MOST_ENTRIES = 1 << 20


def read_header(path: Path) -> Any:
    """A GGUF file as a `gguf.GGUFReader`, which reads tensors when they are asked for.

    Raises:
        UNREADABLE: it is no whole GGUF file.
    """
    import numpy
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            # Beyond its end a file has nothing to read, as often as it is asked.
            if len(found) < count:
                raise ValueError("the header names more than the file holds")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            # The type of a list's entries stands before their number. All of them are read, one by one.
            if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, numpy.uint64)[0] > _MOST_ENTRIES:
                raise ValueError("a list in the header is longer than any that is meant")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(path)


def value(reader: Any, name: str) -> Any:
    """A value of the header: a text, a number, a switch or a list of these; None where it has none of that name."""
    found = reader.get_field(name)
    return None if found is None else found.contents()


def check_header(reader: Any, kind: str, path: Path) -> None:
    """See that what a header says of a model is there and of the right kind, before libraries make anything of it.

    Args:
        reader: of the file.
        kind: its architecture, with which the names of a model's sizes begin.
        path: the file.

    Raises:
        UNREADABLE: the file is damaged.
        ModelError: names the first value that is missing or cannot be.
    """
    tokens, size, words = value(reader, "tokenizer.ggml.tokens"), _is_between(1, _LARGEST_SIZE), "tokenizer.ggml."
    is_token = _is_between(0, len(tokens) - 1 if isinstance(tokens, list) else 0)
    # What each value is like, those that have to be there, and others.
    expected: tuple[tuple[Callable[[Any], bool], tuple[str, ...], tuple[str, ...]], ...] = (
        (_is_between(1, _MOST_LAYERS), (f"{kind}.block_count",), ()),
        (
            size,
            (f"{kind}.embedding_length", f"{kind}.feed_forward_length", f"{kind}.attention.head_count"),
            (
                *(f"{kind}.context_length", f"{kind}.vocab_size", f"{kind}.rope.dimension_count"),
                *(f"{kind}.attention.head_count_kv", f"{kind}.attention.key_length"),
            ),
        ),
        (_is_positive, (), (f"{kind}.rope.freq_base", f"{kind}.attention.layer_norm_rms_epsilon")),
        (_is_list_of(str), (f"{words}tokens", f"{words}merges"), ()),
        (_is_list_of(int), (f"{words}token_type",), ()),
        (is_token, (f"{words}eos_token_id",), tuple(f"{words}{name}_token_id" for name in ("bos", "eot", "padding"))),
        (_is_text, (), ("general.name", "general.license", "tokenizer.chat_template", f"{kind}.rope.scaling.type")),
    )
    for fits, needed, others in expected:
        for name in (*needed, *others):
            found = value(reader, name)
            if found is None and name in needed:
                raise ModelError(f"{path} does not say {name}.", AGAIN)
            if found is not None and not fits(found):
                raise ModelError(f"{path} says {name} = {brief(found)}, which cannot be.", AGAIN)


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _is_between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, int) and not isinstance(found, bool) and low <= found <= high


def _is_positive(found: Any) -> bool:
    return isinstance(found, float) and 0 < found < math.inf


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, list) and all(isinstance(entry, kind) for entry in found)


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Around libraries that build what a file describes: what cannot be built makes them raise anything.

    Raises:
        ModelError: they cannot make anything of the file.
    """
    try:
        yield
    except (SafeSteerError, OSError, MemoryError):
        raise
    except Exception as error:
        why = brief(first_line(error).rstrip(".:"))
        raise ModelError(f"No model can be made of what {path} holds ({why}).", AGAIN) from error
