"""The time of a step from measured rates."""

from __future__ import annotations

import pytest

from cluster.capacity.rates import Rates, StepTime, read_rates
from cluster.faults import ConfigError
from tests.fakes.run_files import config

RATES = Rates(generate=100, train=400, publish_s=1, completion=50, prompt=50)


def test_on_policy_the_phases_of_a_step_follow_each_other() -> None:
    time = StepTime.of(config(run={"prompts_per_step": 8}), RATES)
    assert (time.generate_s, time.update_s, time.step_s) == (4, 2, 7)
    assert time.learner_idle == pytest.approx(5 / 7)
    assert time.actors_idle == pytest.approx(3 / 7)


def test_with_staleness_generation_and_update_overlap() -> None:
    time = StepTime.of(config(run={"prompts_per_step": 8, "max_staleness": 1}), RATES)
    assert time.step_s == 5


def test_more_actors_divide_the_time_of_generation_alone() -> None:
    time = StepTime.of(config(run={"prompts_per_step": 8}, rollout={"num_actors": 2}), RATES)
    assert (time.generate_s, time.update_s) == (2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["generate=1"], "Field required"),
        (["generate=1", "train=1", "completion=zwei"], "valid number"),
        (["generate=1", "train=1", "completion=1", "speed=3"], "not permitted"),
        (["generate"], "NAME=VALUE"),
    ],
)
def test_rates_that_cannot_be_used_are_refused_with_those_that_there_are(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_rates(settings)
    assert "publish_s (Seconds of one publication.)" in error.value.advice
