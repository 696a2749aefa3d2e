"""Where things of the repository lie, for tests in any room."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "deploy"
RUNS = DEPLOY / "runs"
RESULTS = RUNS / "results"
