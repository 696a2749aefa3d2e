"""Metrics on disk: lines that can be read at once, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.record.history import read_rows
from cluster.record.sinks.jsonl import JsonLines


def test_a_line_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for step in (1, 2):
        sink.log(step, 0.12345, {"b": 2.0, "a": step})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[-1] == {"step": step, "wall_s": 0.123, "a": step, "b": 2.0}
        assert len(rows) == step
    sink.close()


def test_a_resumed_run_adds_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonLines(path)
        sink.log(step, 0.0, {})
        sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_the_first_line_after_a_kill_is_not_glued_to_the_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    sink = JsonLines(path)
    sink.log(2, 0.0, {"a": 2})
    sink.close()
    assert [(row["step"], row["a"]) for row in read_rows(path)] == [(1, 1), (2, 2)]
