"""The run files of deploy/runs/, a line for each."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.spec.config import RunConfig, load_config
from tests.docs.documents import table
from tests.places import RUNS


def run_files() -> str:
    """What each run file is, in the first sentence of its header; its size; its GPUs."""
    paths = [*sorted(RUNS.glob("*.toml")), *sorted((RUNS / "algorithms").glob("*.toml"))]
    rows = [_row(path, load_config(path)) for path in sorted(paths, key=lambda path: (len(path.parts), _gpus(path)))]
    return table("| run file | what it is | steps x prompts x trajectories | GPUs |", rows)


def _row(path: Path, cfg: RunConfig) -> str:
    name, run = path.relative_to(RUNS), cfg.run
    return (
        f"| `{name}` | {about(path)} | {run.steps} x {run.prompts_per_step} x {run.group_size} | {_gpus(path) or '–'} |"
    )


def _gpus(path: Path) -> int:
    """GPUs that the processes of a run need; where learner and engine share one, it counts once."""
    cfg = load_config(path)
    learner, engines = cfg.learner.num_ranks * cfg.learner.num_gpus, cfg.rollout.num_actors * cfg.rollout.num_gpus
    scorers = int(cfg.scorer.num_actors * cfg.scorer.num_gpus)
    return max(learner, engines) if cfg.weights.transport == "ipc" else learner + engines + scorers


def about(path: Path) -> str:
    """The first sentence of the comment that a run file begins with."""
    lines = path.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<!Dr)\. ", text, maxsplit=1)[0].removesuffix(".") + "."
