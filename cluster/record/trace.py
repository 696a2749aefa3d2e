"""A trace of a run: what every process did when, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.loop.span import Span

MAX_BYTES = 256 << 20  # viewers in a browser take little more
_FIRST_PID = {"loop": 1, "rollout": 1_000, "scorer": 1_000_000}  # a number of a track in the trace, not of a process
_PHASES = ("other", "rollout_wait", "update", "publish")  # of a step, in their order
_END = "\n]\n"


class Trace:
    """Writes trace events as they happen, each at once and whole, so that a killed run leaves a trace that can be read.

    The file is the JSON array of Chrome's Trace Event Format, in which the closing bracket may be missing: complete events "X"
    for work, counters "C", instants "i", names "M"; times in microseconds. A resumed run goes on in the same file.

    There is one clock, `time.time`, in all processes. Between machines it is as good as their synchronisation: if the clock of a
    node is 10 ms late, so are its tracks, while lengths stay right.

    Source: Chrome's Trace Event Format (the document of that name), sections "JSON Array Format" and "Event Descriptions".

    Args:
        path: The file.
        warn: Told once if the trace ends before the run, since it is full or cannot be written; the run goes on.
        max_bytes: Size at which it is full.
    """

    def __init__(self, path: Path, warn: Callable[[str], None], max_bytes: int = MAX_BYTES) -> None:
        self._warn, self._max_bytes, self._ended = warn, max_bytes, False
        content = path.read_bytes() if path.is_file() else b""
        self._size = _size_of_whole_events(content)
        self._file = path.open("r+b" if content else "wb", buffering=0)
        if content:
            self._file.truncate(self._size)
            self._file.seek(self._size)
        self._step_ended_s = 0.0
        self._named: set[tuple[int, int]] = set()
        self._busy_until: dict[tuple[int, int], float] = {}  # the end of the last span by (pid, tid)

    def span(self, span: Span, name: str, **arguments: Any) -> None:
        """A piece of work. Those of one process that overlap get lanes of their own."""
        pid, lane = _FIRST_PID[span.role] + span.rank, 0
        while self._busy_until.get((pid, lane), 0.0) > span.began_s:
            lane += 1
        self._busy_until[pid, lane] = span.ended_s
        self._phase(span, lane, name, arguments)

    def step(self, step: int, values: Mapping[str, float], ended_s: float) -> None:
        """A step with its phases, which tile it, and the version that it published; from its metrics and its end."""
        began_s = max(ended_s - values["time/step_s"], self._step_ended_s)  # two clocks: they differ by microseconds
        self._step_ended_s = ended_s
        self._phase(Span("loop", 0, began_s, ended_s), 0, f"step {step}", {"step": step})
        left_s = values["time/step_s"]
        for phase in _PHASES:
            left_s -= values[f"time/{phase}_s"]
            until_s = ended_s if phase == _PHASES[-1] else max(ended_s - left_s, began_s)
            self._phase(Span("loop", 0, began_s, until_s), 1, phase, {"step": step})
            began_s = until_s
        self._write("i", _FIRST_PID["loop"], 0, f"version {step}", ts=_us(ended_s), s="g")

    def beside(self, name: str, began_s: float, ended_s: float, step: int) -> None:
        """What happens beside training after a step: an evaluation or a checkpoint."""
        self._phase(Span("loop", 0, began_s, ended_s), 2, name, {"step": step})

    def counter(self, name: str, at_s: float, **values: float) -> None:
        """Values of the loop from now on."""
        self._write("C", _FIRST_PID["loop"], 0, name, ts=_us(at_s), args=values)

    def close(self) -> None:
        """Close the array."""
        with contextlib.suppress(OSError):  # a full disk; the bracket may be missing
            self._file.write(_END.encode() if self._size else b"")
            self._file.close()

    def _phase(self, span: Span, lane: int, name: str, arguments: Mapping[str, Any]) -> None:
        pid = _FIRST_PID[span.role] + span.rank
        self._name(pid, lane, span)
        began = _us(span.began_s)
        self._write("X", pid, lane, name, ts=began, dur=max(_us(span.ended_s) - began, 0), args=dict(arguments))

    def _name(self, pid: int, lane: int, span: Span) -> None:
        """Name a process and its lane at their first event."""
        if (pid, lane) in self._named:
            return
        self._named.add((pid, lane))
        lanes = ("steps", "phases", "beside training") if span.role == "loop" else ()
        process = span.role if span.role == "loop" else f"{span.role} {span.rank}"
        self._write("M", pid, lane, "process_name", ts=0, args={"name": process})
        self._write("M", pid, lane, "thread_name", ts=0, args={"name": lanes[lane] if lanes else f"lane {lane}"})

    def _write(self, kind: str, pid: int, tid: int, name: str, **fields: Any) -> None:
        event = {"name": name, "ph": kind, "pid": pid, "tid": tid, **fields}
        line = (",\n" if self._size else "[\n") + json.dumps(event)
        if self._ended:
            return
        try:
            if self._size + len(line) > self._max_bytes:
                raise OSError(f"it has reached {self._max_bytes >> 20} MiB")
            self._size += self._file.write(line.encode())
        except OSError as error:
            self._ended = True
            self._warn(f"the trace ends here, the run goes on: {error}")


def _size_of_whole_events(content: bytes) -> int:
    """Bytes up to the last whole event of a trace that an earlier process wrote: without its end, or what a crash tore."""
    content = content.removesuffix(_END.encode())
    before, _, last = content.rpartition(b"\n")
    try:
        json.loads(last)
    except ValueError:
        return len(before.removesuffix(b",").removesuffix(b"["))
    return len(content)


def _us(seconds: float) -> int:
    return round(1e6 * seconds)
