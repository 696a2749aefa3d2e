"""Resident memory of all processes of a run on this machine."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil


class MemoryMeter:
    """Samples the memory of this process and all its descendants in a thread.

    The sum of resident sizes counts shared pages once per process: it is an upper bound.

    Args:
        period_s: Seconds between samples.
    """

    def __init__(self, period_s: float = 1.0) -> None:
        self.peak_bytes = 0
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def resident_bytes() -> int:
    """Sum of the resident sizes of this process and its descendants."""
    total = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_info().rss
    return total
