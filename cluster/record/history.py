"""What metrics.jsonl holds of a run and of all its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, one per step; of a step that was logged twice (around a resume) the later one counts."""
    rows: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        rows[line["step"]] = rows.get(line["step"], {}) | line
    return [rows[step] for step in sorted(rows)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl as they were logged, without those that a kill tore."""
    return [line for line in map(_parse, path.read_text(encoding="utf-8").splitlines()) if line]


def _parse(line: str) -> dict[str, Any]:
    """A row; nothing for a line that was torn by a kill."""
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return row


def seconds_so_far(path: Path) -> float:
    """Wall time of all earlier processes of a run: each counts from 0, so a fall begins a new one."""
    times = [line["wall_s"] for line in read_lines(path)]
    following = [*times[1:], 0.0]
    return float(sum(now for now, later in zip(times, following, strict=False) if later < now))
