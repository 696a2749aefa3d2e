"""The summary of a run, computed from what is on disk, so that a resumed run sums up as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.loop.goodput import shares

Row = Mapping[str, Any]
PHASES = ("rollout_wait", "update", "publish", "other")  # of a step, which they add up to
ROLES = ("learner", "rollout", "scorer")


def summarize_run(rows: Sequence[Row], samples: Mapping[str, Any]) -> dict[str, Any]:
    """The figures under their fixed keys; None where a run has no such figure.

    Args:
        rows: From `history.read_rows`.
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
