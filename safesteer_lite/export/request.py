"""What a user asks to be exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        kind: `merged`, `gguf` or `lora-gguf`.
        weights: base to merge into, `original` or `dequantised`.
        strength: factor on the adapter.
        quants: GGUF files to write, of `convert.QUANTS`.
        prompts: prompts of each set to measure on; 0 is all.
        original: the 16-bit weights of a base that is itself in 4 bits; None if they are not at hand.
    """

    kind: str
    weights: str = "original"
    strength: float = 1.0
    quants: tuple[str, ...] = ("Q8_0",)
    prompts: int = 0
    original: Path | None = None
