"""Sizes for people."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """A size for people: 1,234,567 → "1.2 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
