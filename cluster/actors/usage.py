"""How much of its time a process has work in hand, measured in the process itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class BusyClock:
    """Time with at least one piece of work in hand, of a process that does several at once; none counts while it is paused.

    `idle share = 1 - busy / elapsed`, both since the last reading.

    Args:
        now: Seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = self._since = now()
        self._busy_s = 0.0
        self._in_hand = 0
        self._paused = False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A piece of work is in hand until the end of the block."""
        self._settle()
        self._in_hand += 1
        try:
            yield
        finally:
            self._settle()
            self._in_hand -= 1

    def pause(self, paused: bool) -> None:
        """Work stands still from now on, or goes on."""
        self._settle()
        self._paused = paused

    def read(self) -> tuple[float, float]:
        """Busy and elapsed seconds since the last reading."""
        self._settle()
        busy_s, elapsed_s = self._busy_s, self._since - self._began
        self._began, self._busy_s = self._since, 0.0
        return busy_s, elapsed_s

    def _settle(self) -> None:
        now = self._now()
        if self._in_hand and not self._paused:
            self._busy_s += now - self._since
        self._since = now
