"""What was measured, as tables: algorithms, estimators, staleness, the head; from the files in deploy/runs/results/."""

from __future__ import annotations

import json
from typing import Any

from tests.docs.documents import table
from tests.places import RESULTS


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def algorithms() -> str:
    """The committed table of the bundles: all seeds of a bundle in a row."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result("algorithms"):
        rows.setdefault(row["bundle"], []).append(row)
    lines = [_bundle(bundle, seeds) for bundle, seeds in rows.items()]
    return table("| bundle | KL per token, held-out prompts | grammatical | goal |", lines)


def _bundle(bundle: str, seeds: list[dict[str, Any]]) -> str:
    before, goal = seeds[0]["before"], seeds[0]["goal"]
    kl = ", ".join(f"{seed['after']['kl_per_token']:.3f}" for seed in seeds)
    grammatical = ", ".join(f"{seed['after']['grammatical']:.0%}" for seed in seeds)
    return (
        f"| `{bundle}` | {before['kl_per_token']:.2f} → {kl} | {before['grammatical']:.0%} → {grammatical} "
        f"| {goal['grammatical']:.0%}, {goal['kl_per_token_fall']:g}x |"
    )


def variance() -> str:
    """What baselines do to the gradient."""
    rows = [
        f"| {row['estimator']} | {row['scale']:.3f} | {row['direction_error']:.1%} | {row['variance_relative']:.1%} |"
        for row in result("variance")["rows"]
        if row["group_size"] == 4
    ]
    return table("| estimator, groups of 4 | scale of the gradient | error of its direction | variance |", rows)


def head() -> str:
    """Time and memory of the head, each way."""
    ways = {"naive": "all logits at once", "recompute": "chunks, computed again", "formed": "ours"}
    rows = []
    for name in ("head", "head_1024"):
        report = result(name)
        num_gradients = report["hidden_size"] * (report["vocab_size"] + report["num_tokens"])
        for way, words in ways.items():
            found = report["median"][way]
            peak, rest = found["peak_bytes"] / 1e9, (found["peak_bytes"] - 4 * num_gradients) / 1e9
            cells = f"{words} | {peak:.2f} GB | {rest:.2f} GB | {found['cpu_s']:.1f} s"
            rows.append(f"| {report['hidden_size']:,} | {cells} |")
    return table("| hidden units | way | peak memory | without the gradients | CPU time |", rows)


def staleness() -> str:
    """What staleness costs with and without its correction."""
    report = result("staleness")
    words = {"on_policy": "on-policy", "corrected": "staleness 4, corrected", "uncorrected": "staleness 4, uncorrected"}
    lines = []
    for arm, name in words.items():
        rows = [row for row in report["rows"] if row["arm"] == arm]
        after = ", ".join(f"{row['after']:.3f}" for row in rows)
        closed, relative = report["closed_mean"][arm], report["relative_to_on_policy"][arm]
        lines.append(f"| {name} | {rows[0]['before']:.2f} → {after} | {closed:.2%} | {relative:.2%} |")
    return table("| run | KL per token, five seeds | share of the KL gone | of on-policy's |", lines)
