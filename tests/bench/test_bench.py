"""The committed tables and the programs that make them."""

from __future__ import annotations

import json
import math

import pytest

from cluster.spec.config import load_config
from tests.bench import staleness, variance


def test_the_variance_table_is_what_its_program_computes() -> None:
    names = ("whole outcome", "whole outcome - mean of the others (RLOO)", "reward-to-go - mean of the position")
    committed = json.loads(variance.RESULTS.read_text(encoding="utf-8"))["rows"]
    for row in variance.measure((2,), names):
        (found,) = [r for r in committed if (r["estimator"], r["group_size"]) == (row["estimator"], 2)]
        numbers = {key: value for key, value in row.items() if key != "estimator"}
        assert {key: found[key] for key in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-12)


def test_the_variance_table_says_what_theory_says() -> None:
    rows = json.loads(variance.RESULTS.read_text(encoding="utf-8"))["rows"]
    by = {(r["estimator"], r["group_size"]): r for r in rows}
    for g in variance.GROUP_SIZES:
        rloo, mean = (
            by[name, g] for name in ("whole outcome - mean of the others (RLOO)", "whole outcome - mean of the group")
        )
        assert mean["scale"] == pytest.approx(1 - 1 / g)
        assert rloo["scale"] == pytest.approx(1) and rloo["direction_error"] < 1e-9
        assert rloo["variance"] == pytest.approx(mean["variance"])
        assert rloo["variance_relative"] < by["whole outcome", g]["variance_relative"] == 1
        assert by["reward-to-go", g]["variance_relative"] < 1
    assert by["whole outcome", 2]["variance"] == pytest.approx(2 * by["whole outcome", 4]["variance"])
    assert all(math.isfinite(r["variance"]) for r in rows)


@pytest.mark.parametrize("arm", staleness.ARMS)
def test_the_arms_of_the_staleness_study_are_configs_that_a_run_takes(arm: str) -> None:
    settings = staleness.overrides(arm, seed=3)[1::2]
    cfg = load_config(staleness.RUN, settings)
    assert cfg.run.seed == 3
    assert cfg.run.max_staleness == (0 if arm == "on_policy" else 4)
    held = (cfg.algorithm.min_importance_weight, cfg.algorithm.max_importance_weight) == (1.0, 1.0)
    assert held == (arm == "uncorrected")


def test_the_staleness_study_is_summed_up_relative_to_on_policy() -> None:
    rows = [
        {"arm": "on_policy", "closed": 0.8, "after": 0.4},
        {"arm": "on_policy", "closed": 1.0, "after": 0.0},
        {"arm": "corrected", "closed": 0.891, "after": 0.2},
    ]
    assert staleness.summarise(rows)["relative_to_on_policy"] == pytest.approx({"on_policy": 1.0, "corrected": 0.99})
