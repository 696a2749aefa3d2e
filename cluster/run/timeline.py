"""The trace of one run, where one is asked for: what the loop hands over becomes spans and counters of trace.json."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from align.metrics import Metric, reduce
from cluster.loop.buffer import Buffer
from cluster.loop.rollout import Rollout
from cluster.record.trace import Trace


class Timeline:
    """Writes the run's trace; without one, it writes nothing.

    Args:
        trace: The trace, or None.
    """

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace

    @classmethod
    def open(cls, path: Path, warn: Callable[[str], None]) -> Timeline:
        """Begin the trace at `path`, or go on with it; where that fails there is a warning and none."""
        try:
            return cls(Trace(path, warn))
        except OSError as error:
            warn(f"no trace is written: {error}")
            return cls(None)

    def group(self, rollout: Rollout, buffer: Buffer[Rollout]) -> None:
        """A group is scored, and its slot filled or given back."""
        if self._trace is None:
            return
        ticket = rollout.ticket
        known = {"ticket": ticket.number, "prompt": ticket.prompt.id, "version": rollout.oldest_version}
        for span in rollout.spans:
            self._trace.span(span, f"group {ticket.number}", **known, tokens=rollout.num_tokens)
        _count_slots(self._trace, buffer)

    def step(self, step: int, metrics: Sequence[Metric], buffer: Buffer[Rollout]) -> None:
        """A step is trained and published."""
        if self._trace is not None:
            self._trace.step(step, reduce(metrics), time.time())
            _count_slots(self._trace, buffer)

    @contextlib.contextmanager
    def timed(self, name: str, step: int) -> Iterator[Callable[[], float]]:
        """Time what happens beside training, in the trace too; gives what says how many seconds it took."""
        began_s, began = time.time(), time.perf_counter()
        elapsed_s = 0.0
        yield lambda: elapsed_s
        elapsed_s = time.perf_counter() - began
        if self._trace is not None:
            self._trace.beside(name, began_s, began_s + elapsed_s, step)

    def close(self) -> None:
        """End the file."""
        if self._trace is not None:
            self._trace.close()


def _count_slots(trace: Trace, buffer: Buffer[Rollout]) -> None:
    used = buffer.num_slots - buffer.num_free
    trace.counter("slots", time.time(), filled=buffer.num_filled, empty=used - buffer.num_filled)
