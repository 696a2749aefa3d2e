"""The summary of a run and its samples, computed from what is on disk, so that a resumed run sums up as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.demo.judges import JUDGES
from cluster.loop.answer import Answer
from cluster.loop.goodput import shares
from cluster.record.folder import write_atomically

Row = Mapping[str, Any]
PHASES = ("rollout_wait", "update", "publish", "other")  # of a step, which they add up to
ROLES = ("learner", "rollout", "scorer")


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


def summarize_run(rows: Sequence[Row], samples: Mapping[str, Any]) -> dict[str, Any]:
    """The figures under their fixed keys; None where a run has no such figure.

    Args:
        rows: From `read_rows`.
        samples: The content of samples.json.
    """
    summary: dict[str, Any] = {}
    for name, suffix in (("heldout", ""), ("train", "_train")):
        kl = [row[key] for row in rows if (key := f"eval/{name}/kl_per_token") in row]
        judged = [row[key] for row in rows if (key := f"eval/{name}/grammatical") in row]
        right = [row[key] for row in rows if (key := f"eval/{name}/accuracy") in row]
        for what, values in (("kl_per_token", kl), ("grammatical", judged), ("accuracy", right)):
            summary[f"{what}_before{suffix}"] = values[0] if values else None
            summary[f"{what}_after{suffix}"] = values[-1] if values else None
        summary[f"grammatical_reference{suffix}"] = samples.get("reference_rates", {}).get(name)
    mismatches = [(row["mismatch/abs_mean"], row["tokens/generated"]) for row in rows if "mismatch/abs_mean" in row]
    num_tokens = sum(tokens for _, tokens in mismatches)
    largest = [row["mismatch/abs_max"] for row in rows if "mismatch/abs_max" in row]
    summary |= {
        "mismatch_mean": sum(mean * tokens for mean, tokens in mismatches) / num_tokens if num_tokens else None,
        "mismatch_max": max(largest, default=None),
        "peak_rss_bytes": max((row["memory/rss_bytes"] for row in rows if "memory/rss_bytes" in row), default=None),
        "generated_tokens": int(sum(row.get("tokens/generated", 0) for row in rows)),
        "trained_tokens": int(sum(row.get("tokens/trained", 0) for row in rows)),
        "steps": max((row["step"] for row in rows), default=0),
        "goodput": _shares_at_the_end(rows),
        "time": time_shares(rows) or None,
        "evaluations": [
            {key: value for key, value in row.items() if key == "step" or key.startswith("eval/")}
            for row in rows
            if any(key.startswith("eval/") for key in row)
        ],
    }
    return summary


def _shares_at_the_end(rows: Sequence[Row]) -> dict[str, float] | None:
    """Share of every fate of a sampled token; what was waiting at the last step is left."""
    counted = [row for row in rows if row.get("goodput/sampled_tokens")]
    if not counted:
        return None
    found = shares(counted[-1])
    return {**found, "left": found["left"] + found["waiting"], "waiting": 0.0}


def time_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Share of every phase of the steps' time, which add up to 1; and idle shares by role, over the time of all steps."""
    steps = [row for row in rows if "time/step_s" in row]
    total = sum(row["time/step_s"] for row in steps)
    if not total:
        return {}
    phases = {name: sum(row.get(f"time/{name}_s", 0.0) for row in steps) / total for name in PHASES}
    idle = {role: [(row.get(f"idle/{role}_fraction", 0.0), row["time/step_s"]) for row in steps] for role in ROLES}
    return phases | {f"idle_{role}": sum(share * s for share, s in pairs) / total for role, pairs in idle.items()}


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
