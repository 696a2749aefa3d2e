"""What the files of a run folder say, as far as they are there and whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunRecord:
    """What could be read from a run folder."""

    summary: dict[str, Any]
    series: dict[str, dict[int, float]]
    samples: dict[str, list[dict[str, Any]]]
    config: str
    environment: dict[str, Any]
    notes: tuple[str, ...]
    """What is missing or damaged, one sentence each."""


def read_run(run_dir: Path) -> RunRecord:
    """Reads whatever the folder holds; what it lacks becomes a note instead of an error."""
    notes: list[str] = []
    summary = _read_json(run_dir / "summary.json", notes)
    series = _read_metrics(run_dir / "metrics.jsonl", notes)
    samples = _read_samples(run_dir / "samples.json", notes)
    config = _read_text(run_dir / "config.toml", notes) or ""
    environment = _read_json(run_dir / "environment.json", notes)
    return RunRecord(summary, series, samples, config, environment, tuple(notes))


def _read_text(path: Path, notes: list[str]) -> str | None:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    if text is None:
        return {}
    value = _parse_object(text)
    if value is None:
        notes.append(f"{path.name} is damaged: it does not hold one JSON object.")
        return {}
    return value


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _read_metrics(path: Path, notes: list[str]) -> dict[str, dict[int, float]]:
    """Returns step -> value of each metric, by step. Of a step that a resumed run repeated, the later line counts."""
    series: dict[str, dict[int, float]] = {}
    damaged = 0
    for line in filter(str.strip, (_read_text(path, notes) or "").split("\n")):
        row = _parse_object(line)
        step = row.get("step") if row else None
        if row is None or type(step) is not int:
            damaged += 1
            continue
        for name, value in row.items():
            if "/" in name and type(value) in (int, float):
                series.setdefault(name, {})[step] = float(value)
    if damaged:
        notes.append(f"{path.name}: {damaged} damaged line{'s' * (damaged > 1)} left out.")
    return {name: dict(sorted(points.items())) for name, points in sorted(series.items())}


def _read_samples(path: Path, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    content = _read_json(path, notes)
    sets = content.get("sets", {})
    if not isinstance(sets, dict) or not all(isinstance(rows, list) for rows in sets.values()):
        notes.append(f"{path.name} is damaged: `sets` is not a table of lists.")
        return {}
    return {str(name): [row for row in rows if isinstance(row, dict)] for name, rows in sets.items() if rows}
