"""The timeline of a run: its groups, steps and what is beside them in one trace; nothing where none is asked for."""

from __future__ import annotations

from pathlib import Path

from align.data.types import Ticket
from align.metrics import Metric
from cluster.loop.buffer import Buffer
from cluster.loop.rollout import Rollout
from cluster.loop.span import Span
from cluster.run.timeline import Timeline
from tests.fakes.loop import PROMPTS
from tests.harness.trace_events import read_events, tracks

NOW = 1.7e9
STEP = {
    "time/step_s": 1.0,
    "time/other_s": 0.0,
    "time/rollout_wait_s": 0.5,
    "time/update_s": 0.3,
    "time/publish_s": 0.2,
}
ROLLOUT = Rollout(Ticket(7, PROMPTS[0], (1, 2)), 3, 90, 1, "group", spans=(Span("rollout", 2, NOW, NOW + 1),))


def record(timeline: Timeline) -> float:
    """A group, a step and a checkpoint; returns how long the last one took."""
    buffer: Buffer[Rollout] = Buffer(2, 1)
    timeline.group(ROLLOUT, buffer)
    timeline.step(4, [Metric(name, value) for name, value in STEP.items()], buffer)
    with timeline.timed("checkpoint", 4) as timed:
        assert timed() == 0.0, "it is not over yet"
    timeline.close()
    return timed()


def test_groups_steps_and_what_is_beside_them_have_tracks_of_their_own(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert record(Timeline.open(tmp_path / "trace.json", warnings.append)) > 0
    events = read_events(tmp_path / "trace.json")
    lanes = tracks(events)
    (group,) = lanes["rollout 2", "lane 0"]
    assert (group["name"], group["args"]) == ("group 7", {"ticket": 7, "prompt": "p0", "version": 3, "tokens": 90})
    assert [event["name"] for event in lanes["loop", "steps"]] == ["step 4"]
    assert [(event["name"], event["args"]) for event in lanes["loop", "beside training"]] == [
        ("checkpoint", {"step": 4})
    ]
    assert [event["args"] for event in events if event["ph"] == "C"] == [{"filled": 0, "empty": 0}] * 2
    assert warnings == []


def test_without_a_trace_times_are_told_all_the_same() -> None:
    assert record(Timeline(None)) > 0


def test_a_trace_that_cannot_be_opened_is_a_warning_and_none(tmp_path: Path) -> None:
    warnings: list[str] = []
    record(Timeline.open(tmp_path / "missing" / "trace.json", warnings.append))
    (warning,) = warnings
    assert warning.startswith("no trace is written: ")
    assert list(tmp_path.iterdir()) == []
