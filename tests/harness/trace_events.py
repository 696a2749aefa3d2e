"""Reads a trace as its viewers do, and checks it against the Trace Event Format."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = dict[str, Any]
FIELDS = {"X": {"ts", "dur", "args"}, "C": {"ts", "args"}, "i": {"ts", "s"}, "M": {"ts", "args"}}


def read_events(path: Path) -> list[Event]:
    """All events; the closing bracket may be missing."""
    text = path.read_text().rstrip()
    events: list[Event] = json.loads(text if text.endswith("]") else text + "]")
    for event in events:
        assert {"name", "ph", "pid", "tid"} | FIELDS[event["ph"]] == set(event), event
        assert all(isinstance(event[key], int) for key in ("pid", "tid", "ts"))
        assert isinstance(event["name"], str) and event.get("dur", 0) >= 0
    return events


def tracks(events: list[Event]) -> dict[tuple[str, str], list[Event]]:
    """The work of each lane by the names of process and lane; every lane has both, and no two pieces of one overlap."""
    names: dict[tuple[str, int, int], str] = {
        (e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"
    }
    found: defaultdict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            place = event["pid"], event["tid"]
            found[names["process_name", *place], names["thread_name", *place]].append(event)
    for work in found.values():
        work.sort(key=lambda event: event["ts"])
        for one, following in pairwise(work):
            assert one["ts"] + one["dur"] <= following["ts"], (one, following)
    return dict(found)


def assert_phases_tile_the_steps(lanes: dict[tuple[str, str], list[Event]]) -> None:
    """To the microsecond."""
    steps, phases = lanes["loop", "steps"], lanes["loop", "phases"]
    for step in steps:
        own = [phase for phase in phases if phase["args"]["step"] == step["args"]["step"]]
        assert [phase["name"] for phase in own] == ["other", "rollout_wait", "update", "publish"]
        edges = [phase["ts"] for phase in own] + [own[-1]["ts"] + own[-1]["dur"]]
        assert (edges[0], edges[-1]) == (step["ts"], step["ts"] + step["dur"])
        assert [phase["ts"] + phase["dur"] for phase in own] == edges[1:]
