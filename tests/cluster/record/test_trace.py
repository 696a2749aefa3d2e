"""The trace: in the Trace Event Format, whole after a kill, bounded, and its phases tile the steps."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from align.metrics import Metric, reduce
from cluster.loop.loop import run_loop
from cluster.loop.span import Span
from cluster.record.trace import Trace
from tests.fakes.loop import FakeObserver, World, complete, make_run
from tests.harness.trace_events import assert_phases_tile_the_steps, read_events, tracks

NOW = 1.7e9  # seconds since the epoch, in these times


def never(text: str) -> None:
    raise AssertionError(text)


def spans(*ends: tuple[float, float], role: str = "rollout", rank: int = 0) -> list[Span]:
    return [Span(role, rank, NOW + began, NOW + ended) for began, ended in ends]


# --- events -------------------------------------------------------------------------------------------------------


def test_work_has_its_times_in_microseconds_its_process_and_what_is_known_about_it(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", never)
    trace.span(Span("rollout", 3, NOW + 0.25, NOW + 2), "group 7", ticket=7, tokens=90)
    trace.span(Span("scorer", 3, NOW + 2, NOW + 2.5), "group 7")
    trace.counter("slots", NOW + 2.5, filled=2, empty=1)
    trace.close()
    events = read_events(tmp_path / "trace.json")
    lanes = tracks(events)
    (rollout,), (scored,) = lanes["rollout 3", "lane 0"], lanes["scorer 3", "lane 0"]
    assert (rollout["ts"], rollout["dur"]) == (1_700_000_000_250_000, 1_750_000)
    assert (rollout["name"], rollout["args"]) == ("group 7", {"ticket": 7, "tokens": 90})
    assert scored["pid"] != rollout["pid"]
    (counter,) = [event for event in events if event["ph"] == "C"]
    assert (counter["ts"], counter["args"]) == (1_700_000_002_500_000, {"filled": 2, "empty": 1})


def test_work_of_one_process_that_overlaps_gets_lanes_of_its_own_and_a_free_lane_is_used_again(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", never)
    for number, span in enumerate(spans((0, 2), (1, 3), (2, 4), (1.5, 5), (4, 6))):
        trace.span(span, f"group {number}")
    trace.span(*spans((0, 1), rank=1), "elsewhere")
    lanes = {
        place: [event["name"] for event in work] for place, work in tracks(read_events(tmp_path / "trace.json")).items()
    }
    assert lanes == {
        ("rollout 0", "lane 0"): ["group 0", "group 2", "group 4"],
        ("rollout 0", "lane 1"): ["group 1"],
        ("rollout 0", "lane 2"): ["group 3"],
        ("rollout 1", "lane 0"): ["elsewhere"],
    }


# --- kills, resumes, limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["killed", "closed", "torn", "torn at the first event", "empty"])
def test_a_trace_is_whole_after_every_event_and_goes_on_after_a_resume(end: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    first = Trace(path, never)
    num_before = 0 if end in ("torn at the first event", "empty") else 2
    for span in spans((0, 1), (2, 3))[:num_before]:
        first.span(span, "before")
        read_events(path)
    if end == "closed":
        first.close()
    if end.startswith("torn"):
        with path.open("a") as file:
            file.write((",\n" if num_before else "[\n") + '{"name": "to')
    second = Trace(path, never)
    second.span(*spans((4, 5)), "after")
    second.close()
    (work,) = tracks(read_events(path)).values()
    assert [event["name"] for event in work] == ["before"] * num_before + ["after"]


def test_a_trace_that_is_full_says_so_once_and_stays_whole(tmp_path: Path) -> None:
    warnings: list[str] = []
    trace = Trace(tmp_path / "trace.json", warnings.append, max_bytes=2000)
    for number in range(100):
        trace.span(*spans((number, number + 1)), f"group {number}")
    trace.close()
    assert len(warnings) == 1
    assert "the run goes on" in warnings[0]
    assert 1000 < (tmp_path / "trace.json").stat().st_size <= 2010
    assert len(read_events(tmp_path / "trace.json")) > 5


def test_a_disk_that_is_full_ends_the_trace_alone() -> None:
    warnings: list[str] = []
    trace = Trace(Path("/dev/full"), warnings.append)
    for span in spans((0, 1), (1, 2)):
        trace.span(span, "group")
    trace.close()
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


# --- the loop -----------------------------------------------------------------------------------------------------


class TracingObserver(FakeObserver):
    """Gives the loop's metrics to a trace, as a run does."""

    trace: Trace

    async def after_step(self, step: int, metrics: list[Metric]) -> None:
        self.trace.step(step, reduce(metrics), time.time())
        began_s = time.time()
        await super().after_step(step, metrics)
        self.trace.beside("evaluation", began_s, time.time(), step)


def test_the_phases_of_the_loop_tile_its_steps_and_what_is_beside_lies_between_two_updates(tmp_path: Path) -> None:
    async def evaluate(step: int) -> None:
        await asyncio.sleep(0.02)

    world = World(hooks={"after_step": evaluate})
    run = make_run(world, steps=3)
    observer = TracingObserver(world)
    observer.trace, run.observer = Trace(tmp_path / "trace.json", never), observer
    complete(run_loop(run))
    events = read_events(tmp_path / "trace.json")
    lanes = tracks(events)
    assert_phases_tile_the_steps(lanes)
    assert [event["name"] for event in events if event["ph"] == "i"] == ["version 1", "version 2", "version 3"]
    others = [phase for phase in lanes["loop", "phases"] if phase["name"] == "other"]
    for evaluation, other in zip(lanes["loop", "beside training"], others[1:], strict=False):
        assert other["ts"] - 2000 <= evaluation["ts"], "clocks of this machine, 2 ms"
        assert evaluation["ts"] + evaluation["dur"] <= other["ts"] + other["dur"] + 2000
