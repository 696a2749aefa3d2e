"""The canary: the gap of an engine, and its two limits."""

from __future__ import annotations

import math

import pytest

from cluster.faults import WrongWeights
from cluster.fleet.canary import Canary, canary_gap

EXPECTED = [[-1.0, -2.0], [-1.0]]


def test_a_gap_is_the_mean_over_all_tokens_and_infinite_if_one_is_not_finite() -> None:
    assert canary_gap([[-1.0, math.nan]], [[-1.0, -1.0]]) == math.inf
    assert canary_gap(EXPECTED, [[-1.5, -2.0], [-2.0]]) == pytest.approx(0.5)


@pytest.mark.parametrize(("off_by", "num_warnings"), [(0.0, 0), (0.09, 0), (0.2, 1)])
def test_a_gap_above_the_first_limit_warns(off_by: float, num_warnings: int) -> None:
    warnings: list[str] = []
    canary = Canary([[1, 2, 3], [1, 2]], (0.1, 0.3), warnings.append)
    measured = [[value + off_by for value in row] for row in EXPECTED]
    assert canary.check(measured, EXPECTED, rank=1, version=7) == pytest.approx(off_by)
    assert len(warnings) == num_warnings
    for warning in warnings:
        assert warning == (
            "version 7: rollout 1 and learner differ by 0.2 nats on the canary (warn limit 0.1, stop limit 0.3)"
        )


@pytest.mark.parametrize("measured", [[[-1.0, -2.0], [-2.0]], [[-1.0, math.nan], [-1.0]]], ids=["far off", "no number"])
def test_a_gap_above_the_second_limit_stops_the_run(measured: list[list[float]]) -> None:
    canary = Canary([[1, 2, 3], [1, 2]], (0.1, 0.3), pytest.fail)
    with pytest.raises(WrongWeights, match=r"version 7: rollout 1 and learner differ by .* the stop limit is 0\.3"):
        canary.check(measured, EXPECTED, rank=1, version=7)
