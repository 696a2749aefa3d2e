"""Which baseline takes away how much variance: computed, not sampled, on the process of `tests/oracles/enumeration.py`.

Every batch of G trajectories that the policy can sample is enumerated and sent through the configured objective; the variance is
the sum over all entries of the gradient. A baseline that scales the expected gradient is compared after that scale is taken out,
or its variance would look smaller than it is.

    python -m tests.bench.variance [--output deploy/runs/results/variance.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from align.algorithm.config import AlgorithmConfig
from tests.oracles.enumeration import Process

RESULTS = Path("deploy/runs/results/variance.json")
GROUP_SIZES = (2, 4)
TOKEN: dict[str, Any] = {"rewards": "token"}
OUTCOME: dict[str, Any] = {"rewards": "outcome"}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "whole outcome": OUTCOME,
    "whole outcome - mean of the group": OUTCOME | {"baseline": "group_outcome_mean"},
    "whole outcome - mean of the others (RLOO)": OUTCOME | {"baseline": "leave_one_out"},
    "whole outcome - mean of the group, over its std (GRPO)": OUTCOME
    | {"baseline": "group_outcome_mean", "group_std": True},
    "whole outcome, whitened": OUTCOME | {"whiten": True},
    "reward-to-go": TOKEN,
    "reward-to-go - mean of the batch": TOKEN | {"baseline": "batch_mean"},
    "reward-to-go - mean of the position": TOKEN | {"baseline": "position_mean"},
    "reward-to-go, whitened": TOKEN | {"whiten": True},
    "immediate reward (discount 0)": TOKEN | {"discount": 0.0},
}


def row(name: str, group_size: int, case: Process) -> dict[str, Any]:
    """Scale, error of direction and variance of one estimator."""
    cfg = AlgorithmConfig(aggregation="trajectory_mean", importance="none", **ESTIMATORS[name])
    mean, variance = case.moments(cfg, group_size)
    exact = case.gradient()
    scale = float((mean * exact).sum() / exact.square().sum())
    return {
        "estimator": name,
        "group_size": group_size,
        "scale": scale,
        "direction_error": float((mean / scale - exact).norm() / exact.norm()),
        "variance": variance / scale**2,
    }


def measure(
    group_sizes: tuple[int, ...] = GROUP_SIZES, names: tuple[str, ...] = tuple(ESTIMATORS)
) -> list[dict[str, Any]]:
    """All rows; the variance also relative to that of the whole outcome without a baseline, at the same group size."""
    case, rows = Process.new(), []
    for group_size in group_sizes:
        found = [row(name, group_size, case) for name in names]
        rows += [r | {"variance_relative": r["variance"] / found[0]["variance"]} for r in found]
    return rows


def main() -> None:
    """Write the table as JSON and print it as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    rows = measure()
    content = {
        "what": "exact variance of the gradient estimate over all batches; 15 trajectories, 13 states; rewards 1 +- 1",
        "command": "make bench-variance",
        "device": "CPU; enumerated in float64, so it does not depend on the machine",
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, one line for each estimator."""
    sizes = sorted({r["group_size"] for r in rows})
    titles = [f"G = {g}: {what}" for g in sizes for what in ("scale", "direction", "variance")]
    lines = ["| estimator | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for name in dict.fromkeys(r["estimator"] for r in rows):
        found = {r["group_size"]: r for r in rows if r["estimator"] == name}
        cells = [
            cell
            for g in sizes
            for cell in (
                f"{found[g]['scale']:.3f}",
                f"{100 * found[g]['direction_error']:.1f}%",
                f"{100 * found[g]['variance_relative']:.1f}%",
            )
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
