"""The real vLLM engine: log-probabilities, versions, weights. One probe measures, each test judges one figure."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.integration


@pytest.fixture
def found(weights_engine: dict[str, Any]) -> dict[str, Any]:
    return weights_engine


@pytest.fixture(params=["weights_engine", "adapter_engine"])
def each(request: pytest.FixtureRequest) -> dict[str, Any]:
    """An engine that is given weights, and one that is given adapters alone."""
    measured: dict[str, Any] = request.getfixturevalue(request.param)
    return measured


def test_engine_and_learner_agree_at_equal_version(each: dict[str, Any]) -> None:
    print(f"|behaviour - policy| mean {each['mismatch_mean']:.2e}, largest {each['mismatch_max']:.2e}")
    assert 0 < each["mismatch_mean"] <= 1e-5
    assert each["mismatch_max"] <= 1e-3


def test_logprobs_are_those_of_the_truncated_distribution(found: dict[str, Any]) -> None:
    assert found["truncated_max"] <= 1e-4
    assert found["truncated_against_learner_max"] <= 1e-4
    assert found["truncated_against_full_max"] > 0.01, "top-k and top-p were not at work, the test shows nothing"


def test_completions_end_by_an_end_token_or_by_length(found: dict[str, Any]) -> None:
    assert found["finish_reasons"] == ["length", "stop"]


def test_a_seed_repeats_its_tokens_bit_for_bit_whatever_runs_beside_it(found: dict[str, Any]) -> None:
    assert found["seed_repeats"]


def test_different_seeds_give_different_samples(found: dict[str, Any]) -> None:
    assert found["distinct_of_32"] == 32


def test_per_request_seeds_survive_more_prompt_tokens_than_one_step_takes(found: dict[str, Any]) -> None:
    assert found["long_prompts_done"] == found["long_prompts"]


def test_one_flipped_bit_is_refused_and_the_old_weights_go_on_serving(each: dict[str, Any]) -> None:
    assert "arrived damaged" in each["damaged_refused"]
    assert each["damaged_version"] == 0
    assert each["damaged_still_serves"]
    assert each["staged_files_left"] == []


def test_a_load_between_two_steps_leaves_running_requests_alive_and_labels_every_token(each: dict[str, Any]) -> None:
    assert [0, 1] in each["in_flight_spans"], "no request ran across the load, the test shows nothing"
    assert each["in_flight_max"] <= 1e-3
    assert each["in_flight_version"] == 1


def test_keys_and_values_of_old_weights_are_not_used_after_a_load(each: dict[str, Any]) -> None:
    assert each["prefix_cleared"] <= 1e-3
    assert each["prefix_kept"] > 0.1, "without clearing nothing went wrong, the test shows nothing"


def test_the_canary_sees_a_tied_head_that_stayed_behind(found: dict[str, Any]) -> None:
    from cluster.actors.weights import WeightsConfig

    _, stop = WeightsConfig().canary_limits("float32")
    assert found["stale_head_gap"] > 10 * stop


def test_a_plain_load_of_weights_fails_on_packed_layers(found: dict[str, Any]) -> None:
    assert found["naive_load_error"]


def test_a_step_in_the_middle_of_an_update_kills_the_engine_hence_the_pause(found: dict[str, Any]) -> None:
    assert found["unpaused_update_kills"]
