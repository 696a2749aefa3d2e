"""How numbers stand on the pages: aligned in columns, with a true minus sign."""

from __future__ import annotations


def exact(value: float | None) -> str:
    """Three digits after the point, so that a column of numbers is aligned; a dash for None."""
    return "–" if value is None else minus(f"{value:z.3f}")


def scientific(value: float | None, signed: bool = True) -> str:
    """Two digits and a power of ten; a dash for None."""
    if value is None or value == 0:
        return "–" if value is None else "0"
    return minus(f"{value:{'+' if signed else ''}.1e}")


def minus(text: str) -> str:
    """With true minus signs."""
    return text.replace("-", "\u2212")
