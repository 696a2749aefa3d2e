"""All sinks of a run: each gets everything, and none of them can end it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.record.alerts import Alert
from cluster.record.sinks.jsonl import JsonLines
from cluster.record.sinks.sink import Sinks
from tests.fakes.consoles import console


class ListSink:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.walls: list[float] = []
        self.closed = False

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))
        self.walls.append(wall_s)

    def close(self) -> None:
        self.closed = True


class FailingSink(ListSink):
    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        super().log(step, wall_s, values)
        raise OSError("No space left on device")

    def close(self) -> None:
        raise OSError("still no space")


def test_every_sink_gets_every_step_with_the_time_since_the_start() -> None:
    one, two = ListSink(), ListSink()
    sinks = Sinks([one, two], warn=pytest.fail, started=time.monotonic() - 100)
    sinks.log(1, {"a": 1.0})
    sinks.log(2, {"a": 2.0})
    sinks.close()
    assert one.rows == two.rows == [(1, {"a": 1.0}), (2, {"a": 2.0})]
    assert 100 <= one.walls[0] <= one.walls[1] < 1000
    assert one.closed and two.closed


def test_a_sink_that_fails_is_left_out_and_named_once_while_the_others_go_on() -> None:
    failing, good, warnings = FailingSink(), ListSink(), list[str]()
    sinks = Sinks([failing, good], warnings.append, time.monotonic())
    for step in (1, 2, 3):
        sinks.log(step, {})
    sinks.close()
    assert [step for step, _ in good.rows] == [1, 2, 3]
    assert [step for step, _ in failing.rows] == [1]
    assert warnings == ["FailingSink failed and is left out from now on: No space left on device"]


def test_an_alert_reaches_the_sinks_that_take_alerts_the_disk_and_the_console(tmp_path: Path) -> None:
    screen, file = console()
    disk = JsonLines(tmp_path / "metrics.jsonl")
    sinks = Sinks([screen, disk, ListSink()], pytest.fail, time.monotonic())
    sinks.alert(Alert("stall", "warn", 3, "stalled", "no step for 600 s"))
    sinks.alert(Alert("failure", "error", 3, "failed: RUN", "[RUN] gone"))
    sinks.close()
    assert file.getvalue() == "warning: stalled: no step for 600 s\n", "the error is the last line of the run anyway"
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(row["event"], row["cause"], row["level"], row["step"], row["title"], row["text"]) for row in rows] == [
        ("alert", "stall", "warn", 3, "stalled", "no step for 600 s"),
        ("alert", "failure", "error", 3, "failed: RUN", "[RUN] gone"),
    ]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_sink_that_does_not_close_is_named_and_the_others_are_closed() -> None:
    class FailingClose(ListSink):
        def close(self) -> None:
            raise OSError("no space")

    good, warnings = ListSink(), list[str]()
    Sinks([FailingClose(), good], warnings.append, time.monotonic()).close()
    assert good.closed
    assert warnings == ["FailingClose did not close: no space"]


def test_a_sink_that_cannot_start_is_named_and_the_others_go_on() -> None:
    def refuse() -> ListSink:
        raise OSError("no space")

    good, late, warnings = ListSink(), ListSink(), list[str]()
    sinks = Sinks([good], warnings.append, time.monotonic())
    sinks.add(refuse)
    sinks.add(lambda: late)
    sinks.log(1, {})
    sinks.close()
    assert [step for step, _ in good.rows] == [step for step, _ in late.rows] == [1]
    assert good.closed and late.closed
    assert warnings == ["a sink could not start and is left out: no space"]
