"""What a sink is, and all sinks of a run. None of them may end a run or make it wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Sink(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """Record the values of one step; `wall_s` counts from the start of the run."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class Sinks:
    """All sinks of a run. A sink that fails is left out from then on and named once; the run goes on.

    Args:
        sinks: The sinks.
        warn: Told of a sink that failed.
        started: `time.monotonic()` at the start of the run.
    """

    def __init__(self, sinks: Sequence[Sink], warn: Any, started: float) -> None:
        self._sinks = list(sinks)
        self._warn = warn
        self._started = started

    def add(self, make: Callable[[], Sink]) -> None:
        """Add a sink that may fail to start."""
        try:
            self._sinks.append(make())
        except Exception as error:  # a sink is not worth a run
            self._warn(f"a sink could not start and is left out: {error}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step to every sink."""
        wall_s = time.monotonic() - self._started
        for sink in list(self._sinks):
            try:
                sink.log(step, wall_s, values)
            except Exception as error:  # a sink is not worth a run
                self._sinks.remove(sink)
                self._warn(f"{type(sink).__name__} failed and is left out from now on: {error}")

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # as above
                self._warn(f"{type(sink).__name__} did not close: {error}")
