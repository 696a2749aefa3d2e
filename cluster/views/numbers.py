"""How numbers are written for people."""

from __future__ import annotations

import math


def finite(value: object) -> float | None:
    """The value when it is a number to show, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if math.isfinite(value) else None


def number(value: float | None) -> str:
    """Three digits that count, whole numbers from 100 on, with separators; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share of 1 in percent; a decimal where it would otherwise round to a false 0 % or 100 %."""
    if share is None:
        return "–"
    return f"{100 * share:.0f}%" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """Seconds as the two largest units."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    return f"{hours} h {minutes_rest:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(num_bytes: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
