"""One JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class JsonLines:
    """One JSON object per line, written through at once.

    Args:
        path: The file; lines are added.
    """

    def __init__(self, path: Path) -> None:
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # by a kill; the next line must not continue it
            self._file.write("\n")

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        row = {"step": step, "wall_s": round(wall_s, 3), **{name: values[name] for name in sorted(values)}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()
