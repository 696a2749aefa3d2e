"""Every bundle has a run file of its own and three committed runs that reach its goal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from align.algorithm.bundles import BUNDLES
from cluster.spec.config import load_config
from tests.bench.algorithms import (
    GOALS,
    RESULTS,
    RUN_FILES,
    SEEDS,
    Goal,
    Row,
    Table,
    fill,
    fingerprint,
    judged,
    line,
    rows,
    run_file,
)

COMMITTED = pytest.mark.skipif(not RESULTS.is_file(), reason="make bench-algorithms has not been run: no table yet")


def header(bundle: str) -> str:
    """The comment that a run file begins with, as one line."""
    lines = run_file(bundle).read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    assert all(row.startswith("#") for row in lines)
    return " ".join(row.removeprefix("#").strip() for row in lines)


def test_every_bundle_has_a_run_file_and_a_goal_and_there_are_no_others() -> None:
    assert {path.stem for path in RUN_FILES.iterdir()} == set(BUNDLES)
    assert set(GOALS) == set(BUNDLES)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_run_file_loads_and_trains_its_bundle(bundle: str) -> None:
    cfg = load_config(run_file(bundle))
    assert cfg.algorithm.name == bundle
    assert cfg.evaluation.judge == "grammatical"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_a_run_file_sets_otherwise_than_its_bundle_is_said_in_its_header(bundle: str) -> None:
    algorithm = load_config(run_file(bundle)).algorithm
    changed = [key for key, value in BUNDLES[bundle].items() if getattr(algorithm, key) != value]
    assert [key for key in changed if key not in header(bundle)] == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_run_file_is_headed_by_paper_formula_departures_and_goal(bundle: str) -> None:
    text = header(bundle)
    parts = [
        text.find(part) for part in (" Paper: ", " Differs from the paper: ", " Task: ", f" Goal: {GOALS[bundle]},")
    ]
    assert -1 not in parts
    assert parts == sorted(parts)
    assert " Objective: " in text or " Gradient: " in text


def test_a_goal_is_met_at_its_bounds_and_missed_below_each() -> None:
    goal = Goal(grammatical=0.75, kl_per_token_fall=10)
    before = {"kl_per_token": 2.0, "grammatical": 0.1}
    assert goal.met(before, {"kl_per_token": 0.2, "grammatical": 0.75})
    assert not goal.met(before, {"kl_per_token": 0.21, "grammatical": 0.9})
    assert not goal.met(before, {"kl_per_token": 0.1, "grammatical": 0.74})
    assert not goal.met(before, {"kl_per_token": math.nan, "grammatical": 0.9})


def test_a_row_is_judged_by_the_goal_of_today() -> None:
    before, after = {"kl_per_token": 2.0, "grammatical": 0.1}, {"kl_per_token": 1.9, "grammatical": 0.2}
    row = judged({"bundle": "grpo", "seed": 1, "before": before, "after": after, "goal": {}, "met": True})
    assert row["goal"] == GOALS["grpo"]._asdict()
    assert row["met"] is False
    assert "MISSED" in line(row)


def test_the_fingerprint_of_a_run_file_is_that_of_its_values_and_not_of_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    prints = []
    for text in ("[run]\nsteps = 3\n", "# three\n[run]\nsteps = 3 # so\n", "[run]\nsteps = 4\n"):
        path.write_text(text)
        prints.append(fingerprint(path))
    assert prints[0] == prints[1] != prints[2]


def test_rows_of_the_run_file_as_it_is_are_kept_and_the_others_are_made() -> None:
    current = {"run_file_sha256": fingerprint(run_file("grpo"))}
    table: Table = {("grpo", 1): current, ("grpo", 2): {"run_file_sha256": "of an earlier file"}}
    made: list[tuple[str, int]] = []

    def make(bundle: str, seed: int) -> Row:
        made.append((bundle, seed))
        return dict(current)

    assert list(fill(table, ["grpo"], again=False, make=make)) == [current] * 3
    assert made == [("grpo", 2), ("grpo", 3)]
    assert set(table) == {("grpo", 1), ("grpo", 2), ("grpo", 3)}
    list(fill(table, ["grpo"], again=False, make=make))
    assert len(made) == 2
    list(fill(table, ["grpo"], again=True, make=make))
    assert made[2:] == [("grpo", 1), ("grpo", 2), ("grpo", 3)]


@COMMITTED
def test_the_table_has_three_runs_of_every_bundle_by_its_run_file_as_it_is() -> None:
    found = [(row["bundle"], row["seed"], row["run_file_sha256"]) for row in rows()]
    assert found == [(bundle, seed, fingerprint(run_file(bundle))) for bundle in GOALS for seed in SEEDS]
    for row in rows():
        cfg = load_config(run_file(row["bundle"]))
        assert row["steps"] == cfg.run.steps
        assert row["command"].startswith(f"align train deploy/runs/algorithms/{row['bundle']}.toml ")
        assert f"run.seed={row['seed']}" in row["command"].split()
        assert row["device"] and row["date"]


@COMMITTED
def test_every_run_of_the_table_reached_its_goal() -> None:
    assert [row for row in rows() if row != judged(row)] == []
    assert [line(row) for row in rows() if not row["met"]] == []
