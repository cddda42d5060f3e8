"""Sizes and durations as a user reads them. Sizes are bytes, shown in decimal units (1 GB = 1e9 bytes)."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """A size for people: `1.0 GB`, decimal units, one digit after the point."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.95:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_estimate(seconds: float) -> str:
    """A duration no more exact than an estimate is, from 10 seconds: steps of a minute from 90 seconds, of 5 minutes from half
    an hour, of half an hour from 5 hours."""
    step = next(
        step for least, step in ((18000, 1800), (1800, 300), (90, 60), (0, 10)) if seconds >= least or not least
    )
    return format_duration(max(round(seconds / step) * step, step))


def format_duration(seconds: float) -> str:
    """A duration for people: the two largest units, `2 h 5 min`."""
    whole = max(round(seconds), 0)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for index, (name, length) in enumerate(units):
        if whole >= length:
            smaller_name, smaller = units[min(index + 1, 3)]
            rest = whole % length // smaller
            return f"{whole // length} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return "0 s"
