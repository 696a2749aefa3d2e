"""What staleness costs on the task of the demo, and what the importance weights give back, through the real `align train`.

Three arms over the same seeds: on-policy; staleness 4 with truncated weights; staleness 4 with all weights held at 1 (both
bounds at 1, since `importance = "none"` is refused there). The result of a run is the share of the initial KL divergence per
token that is gone at its end, on held-out prompts.

    python -m tests.bench.staleness [--seeds 1 2 3 4 5] [--arms on_policy corrected uncorrected]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path("deploy/runs/results/staleness.json")
RUN = Path("deploy/runs/demo.toml")
COMMON = {
    "run.steps": 60,
    "run.prompts_per_step": 16,
    "optimizer.lr": 4e-3,
    "evaluation.every": 60,
    "evaluation.max_prompts": 128,
    "checkpoint.every": 60,
}
"""The demo scaled down; a learning rate so high that staleness shows."""
ARMS: dict[str, dict[str, Any]] = {
    "on_policy": {"run.max_staleness": 0},
    "corrected": {"run.max_staleness": 4, "algorithm.importance": "truncated"},
    "uncorrected": {
        "run.max_staleness": 4,
        "algorithm.importance": "truncated",
        "algorithm.min_importance_weight": 1.0,
        "algorithm.max_importance_weight": 1.0,
    },
}
LIMIT_S = 300


def overrides(arm: str, seed: int) -> list[str]:
    """What is set on the command line, the run's folder excepted."""
    settings = COMMON | ARMS[arm] | {"run.seed": seed}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def measure(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run; its row of the table.

    Raises:
        RuntimeError: If the run failed.
    """
    arguments = ["train", str(RUN), *overrides(arm, seed)]
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--set", f"run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode != 0:
        raise RuntimeError(
            f"{arm}, seed {seed}: align ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = summary["kl_per_token_before"], summary["kl_per_token_after"]
    return {
        "arm": arm,
        "seed": seed,
        "before": before,
        "after": after,
        "closed": 1 - after / before,
        "grammatical_after": summary["grammatical_after"],
        "staleness_mean": statistics.mean(s["staleness/mean"] for s in steps if "staleness/mean" in s),
        "device": f"{platform.machine()} CPU",
        "date": datetime.now(UTC).date().isoformat(),
        "command": "align " + " ".join(arguments),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean result of each arm that was run, and relative to on-policy."""
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    closed = {arm: statistics.mean(r["closed"] for r in rows if r["arm"] == arm) for arm in arms}
    after = {arm: statistics.mean(r["after"] for r in rows if r["arm"] == arm) for arm in arms}
    on_policy = closed.get("on_policy")
    relative = {arm: value / on_policy for arm, value in closed.items()} if on_policy else {}
    return {"closed_mean": closed, "after_mean": after, "relative_to_on_policy": relative}


def main() -> None:
    """Run every arm with every seed; the file is written after each run, so that what is done stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                rows.append(measure(arm, seed, Path(folder) / f"{arm}-{seed}"))
                content = {"command": "make bench-staleness", **summarise(rows), "rows": rows}
                arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                row = rows[-1]
                print(f"{arm:12} seed {seed}: KL per token {row['before']:.3f} -> {row['after']:.4f}", flush=True)
    print(json.dumps(summarise(rows), indent=2))


if __name__ == "__main__":
    main()
