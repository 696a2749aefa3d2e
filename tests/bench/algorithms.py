"""Trains every bundle on the demo's task, three seeds each, and keeps the table deploy/runs/results/algorithms.json.

    python -m tests.bench.algorithms [--again] [BUNDLE ...]

Each row is one run of the command that it names, read from the run's summary.json. A row of the run file as it is now is
kept, so an interrupted table goes on where it was; `--again` makes the rows of the named bundles (or of all) anew.
The exit code is 1 if a goal was missed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster.record.files import write_atomically
from tests.harness.commands import align, summary
from tests.places import REPOSITORY

RUN_FILES = REPOSITORY / "deploy" / "runs" / "algorithms"
RESULTS = REPOSITORY / "deploy" / "runs" / "results" / "algorithms.json"
SEEDS = (1, 2, 3)
TIMEOUT_S = 900
VERDICT = {True: "met", False: "MISSED"}

Row = dict[str, Any]
Table = dict[tuple[str, int], Row]
Figures = Mapping[str, float]


class Goal(NamedTuple):
    """What a bundle reaches with every seed, on held-out prompts.

    Attributes:
        grammatical: Least share of grammatical texts after training.
        kl_per_token_fall: KL per token to the reference before training over that after it, at least.
    """

    grammatical: float
    kl_per_token_fall: float

    def __str__(self) -> str:
        return f"grammatical at least {self.grammatical:.0%}, KL per token at least {self.kl_per_token_fall:g} times smaller"

    def met(self, before: Figures, after: Figures) -> bool:
        """Whether these figures reach it."""
        fell = before["kl_per_token"] >= self.kl_per_token_fall * after["kl_per_token"]
        return after["grammatical"] >= self.grammatical and fell


GOALS: Mapping[str, Goal] = {
    "reinforce": Goal(0.75, 14),
    "reinforce++": Goal(0.75, 16),
    "rloo": Goal(0.75, 14),
    "grpo": Goal(0.75, 18),
    "dr_grpo": Goal(0.7, 10),
    "dapo": Goal(0.7, 12),
    "gspo": Goal(0.7, 10),
    "cispo": Goal(0.7, 12),
    "ppo": Goal(0.8, 30),
    "scalerl": Goal(0.7, 12),
    "on_policy_distillation": Goal(0.8, 40),
}


def run_file(bundle: str) -> Path:
    """The run file of a bundle."""
    return RUN_FILES / f"{bundle}.toml"


def fingerprint(path: Path) -> str:
    """SHA-256 of what a run file says, comments and layout aside."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def rows() -> list[Row]:
    """The rows of the table as it is."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def device() -> str:
    """The processor that the runs use; none of the run files asks for a GPU."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    return f"CPU, {os.cpu_count()} cores, {names[0] if names else platform.machine()}"


def train(bundle: str, seed: int) -> Row:
    """One run, as a row of the table."""
    path = run_file(bundle)
    command = ["train", str(path.relative_to(REPOSITORY)), "--set", f"run.seed={seed}", "--set", "wandb.mode=disabled"]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        code, console = align(*command, "--set", f"run.dir={run_dir}", timeout_s=TIMEOUT_S)
        if code != 0:
            raise RuntimeError(f"align {shlex.join(command)} ended with code {code}:\n{console[-4000:]}")
        figures = summary(run_dir)
    before, after = (
        {key: figures[f"{key}_{when}"] for key in ("kl_per_token", "grammatical")} for when in ("before", "after")
    )
    row = {
        "bundle": bundle,
        "task": "models/tiny",
        "seed": seed,
        "before": before,
        "after": after,
        "command": f"align {shlex.join(command)}",
        "device": device(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "steps": figures["steps"],
        "wall_s": figures["wall_s"],
        "run_file_sha256": fingerprint(path),
    }
    return judged(row)


def keep(table: Table) -> None:
    """Write the table, in the order of the goals."""
    ordered = [table[key] for bundle in GOALS for seed in SEEDS if (key := (bundle, seed)) in table]
    write_atomically(RESULTS, json.dumps(ordered, indent=1) + "\n")


def judged(row: Row) -> Row:
    """The row with the bundle's goal as it is now, and whether it is met."""
    goal = GOALS[row["bundle"]]
    return row | {"goal": goal._asdict(), "met": goal.met(row["before"], row["after"])}


def line(row: Row) -> str:
    """The row for the console."""
    before, after = row["before"], row["after"]
    kl = f"{before['kl_per_token']:.2f} -> {after['kl_per_token']:.4f}"
    fall = f"{before['kl_per_token'] / after['kl_per_token']:.0f} times smaller"
    grammatical = f"{before['grammatical']:.1%} -> {after['grammatical']:.1%}"
    return (
        f"{row['bundle']:<24}{row['seed']:>3}  KL {kl}, {fall:<18} grammatical {grammatical:<17} {VERDICT[row['met']]}"
    )


def fill(table: Table, bundles: Iterable[str], again: bool, make: Callable[[str, int], Row] = train) -> Iterator[Row]:
    """Every row of these bundles; those that are missing or of another run file, or with `again` all, are made first."""
    for bundle in bundles:
        for seed in SEEDS:
            row = table.get((bundle, seed))
            if row is None or again or row["run_file_sha256"] != fingerprint(run_file(bundle)):
                row = table[bundle, seed] = make(bundle, seed)
            yield row


def main() -> int:
    """Make the rows that are missing; see the module."""
    parser = argparse.ArgumentParser(description="Train every bundle on the demo's task, three seeds each.")
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help="bundles to train; left out: all")
    parser.add_argument("--again", action="store_true", help="make rows anew that are there already")
    arguments = parser.parse_args()
    if unknown := set(arguments.bundles) - set(GOALS):
        parser.error(f"no bundle {', '.join(sorted(unknown))}; there are: {', '.join(GOALS)}")
    table = {(row["bundle"], row["seed"]): judged(row) for row in rows() if row["bundle"] in GOALS}
    for row in fill(table, arguments.bundles or GOALS, arguments.again):
        print(line(row), flush=True)
        keep(table)
    return 0 if all(row["met"] for row in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
