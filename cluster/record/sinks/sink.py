"""What a sink is, and all sinks of a run. None of them may end a run or make it wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from cluster.record.alerts import Alert


class Sink(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """Record the values of one step; `wall_s` counts from the start of the run."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


@runtime_checkable
class AlertSink(Protocol):
    """A sink that takes alerts too."""

    def alert(self, alert: Alert) -> None:
        """Record it, or show it."""
        ...


@runtime_checkable
class ArtifactSink(Protocol):
    """A sink that takes note of what the run wrote."""

    def artifact(self, kind: str, folder: Path, step: int) -> None:
        """Record a folder of weights: kind "checkpoints" or "policy"."""
        ...


S = TypeVar("S", bound=Sink)


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

    def add(self, make: Callable[[], S]) -> S | None:
        """Add a sink that may fail to start; returns it if it did not."""
        try:
            sink = make()
        except Exception as error:  # a sink is not worth a run
            self._warn(f"a sink could not start and is left out: {error}")
            return None
        self._sinks.append(sink)
        return sink

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step to every sink."""
        wall_s = time.monotonic() - self._started
        for sink in list(self._sinks):
            self._try(sink, partial(sink.log, step, wall_s, values))

    def alert(self, alert: Alert) -> None:
        """Send an alert to every sink that takes them."""
        for sink in list(self._sinks):
            if isinstance(sink, AlertSink):
                self._try(sink, partial(sink.alert, alert))

    def artifact(self, kind: str, folder: Path, step: int) -> None:
        """Tell every sink that takes note of them of a folder of weights."""
        for sink in list(self._sinks):
            if isinstance(sink, ArtifactSink):
                self._try(sink, partial(sink.artifact, kind, folder, step))

    def _try(self, sink: Sink, send: Callable[[], None]) -> None:
        try:
            send()
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
