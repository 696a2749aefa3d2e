"""Metrics and alerts on disk, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.record.alerts import Alert


class JsonLines:
    """One JSON object per line, written through at once.

    Args:
        path: The file of the metrics; lines are added. Alerts go to events.jsonl beside it.
    """

    def __init__(self, path: Path) -> None:
        self._events = path.with_name("events.jsonl")
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # by a kill; the next line must not continue it
            self._file.write("\n")

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        row = {"step": step, "wall_s": round(wall_s, 3), **{name: values[name] for name in sorted(values)}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def alert(self, alert: Alert) -> None:
        """See `AlertSink`."""
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": "alert", **asdict(alert)}
        with self._events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()
