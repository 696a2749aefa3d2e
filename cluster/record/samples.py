"""Answers before, after and of the reference, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.demo.judges import JUDGES
from cluster.loop.answer import Answer
from cluster.record.files import write_atomically


class Samples:
    """samples.json: answers before, after and of the reference, side by side.

    Args:
        path: The file; what an interrupted run wrote there is taken up.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.content: dict[str, Any] = found if found.get("begun") else {"begun": False, "sets": {}}

    @property
    def begun(self) -> bool:
        """Whether all answers before training, those of the reference included, are there; fewer do not count."""
        return bool(self.content["begun"])

    def mark_begun(self) -> None:
        """All answers before training are there."""
        self.content["begun"] = True
        self._write()

    def add(self, name: str, answers: Sequence[Answer], num: int) -> None:
        """Answers of an evaluation: the first are "before", the newest "after"."""
        rows = self.content["sets"].setdefault(name, [{"prompt": a.prompt} for a in answers[:num]])
        for row, answer in zip(rows, answers, strict=False):
            when = "after" if "before" in row else "before"
            row[when] = answer.completion
            row[f"grammatical_{when}"] = answer.judged
            row[f"accuracy_{when}"] = answer.accuracy
        self._write()

    def add_reference(self, name: str, prompts: Sequence[str], texts: Sequence[str], judge: str | None) -> None:
        """Answers of the reference, and the share of them that the judge accepts."""
        verdicts = [
            JUDGES[judge](prompt + text) if judge else None for prompt, text in zip(prompts, texts, strict=True)
        ]
        for row, text, verdict in zip(self.content["sets"][name], texts, verdicts, strict=False):
            row["reference"], row["grammatical_reference"] = text, verdict
        if judge:
            rate = sum(bool(v) for v in verdicts) / len(verdicts)
            self.content.setdefault("reference_rates", {})[name] = rate
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self.content, indent=1, ensure_ascii=False))
