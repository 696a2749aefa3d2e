"""How far a metric has come from its start."""

from __future__ import annotations

from collections import deque
from statistics import fmean


class Trend:
    """Mean of the first values of a metric, and of the last ones.

    Args:
        window: How many values are averaged.
    """

    def __init__(self, window: int) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=window)
        self._window = window

    def add(self, value: float) -> bool:
        """Take a value; true once there is a start and a window of values behind it."""
        if len(self._first) < self._window:
            self._first.append(value)
            return False
        self._last.append(value)
        return len(self._last) == self._window

    def __str__(self) -> str:
        return f"{self.start:.3g} at the start, {self.now:.3g}"

    @property
    def start(self) -> float:
        """Mean of the first values."""
        return fmean(self._first)

    @property
    def now(self) -> float:
        """Mean of the last values."""
        return fmean(self._last)
