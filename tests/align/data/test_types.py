"""The data types refuse what is inconsistent, and join prompts and completions at the right places."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from align.data.types import FinishReason, Prompt, ScoredGroup, TokenRewards, Trajectory, VersionSpan
from tests.fakes.trajectories import make_group, make_trajectory


def trajectory(**changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "token_ids": np.array([5, 6, 7, 8]),
        "loss_mask": np.array([False, False, True, True]),
        "behavior_logprobs": np.array([0, 0, -0.5, -1.5], np.float32),
        "versions": (VersionSpan(3, 2, 4),),
        "finish_reason": FinishReason.STOP,
        "seed": 1,
    }
    return Trajectory(**{**fields, **changes})


def test_a_prompt_without_tokens_is_refused_by_its_id() -> None:
    with pytest.raises(ValueError, match="'empty-one' has no tokens"):
        Prompt("empty-one", "", ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_mask", np.array([False, False, True, True, False])),
        ("behavior_logprobs", np.zeros(3, np.float32)),
        ("behavior_logprobs", np.zeros((4, 1), np.float32)),
    ],
)
def test_per_token_arrays_of_another_length_are_refused(field: str, value: np.ndarray) -> None:
    with pytest.raises(ValueError, match=rf"{field} has shape .* token_ids has 4 tokens"):
        trajectory(**{field: value})


def test_position_0_cannot_carry_loss() -> None:
    with pytest.raises(ValueError, match="position 0 is in loss_mask"):
        trajectory(loss_mask=np.array([True, False, True, True]), versions=(VersionSpan(0, 1, 4),))


@pytest.mark.parametrize(
    "spans",
    [
        (),
        (VersionSpan(3, 2, 3),),
        (VersionSpan(3, 2, 5),),
        (VersionSpan(3, 0, 2),),  # as many tokens as were sampled, but the prompt's
        (VersionSpan(3, 2, 3), VersionSpan(4, 2, 3)),  # one token twice, the other by nobody
        (VersionSpan(4, 3, 4), VersionSpan(3, 2, 3)),  # out of order
    ],
)
def test_version_spans_must_cover_exactly_the_sampled_tokens_in_order(spans: tuple[VersionSpan, ...]) -> None:
    with pytest.raises(ValueError, match="do not cover the 2 sampled tokens"):
        trajectory(versions=spans)


def test_a_mask_with_a_hole_takes_one_span_for_each_side() -> None:
    mask = np.array([False, True, False, True])
    spans = (VersionSpan(7, 1, 2), VersionSpan(5, 3, 4))
    assert trajectory(loss_mask=mask, versions=spans).oldest_version == 5
    with pytest.raises(ValueError, match="do not cover"):
        trajectory(loss_mask=mask, versions=(VersionSpan(7, 1, 3),))


def test_from_completion_puts_the_completion_behind_the_prompt_and_shifts_the_spans() -> None:
    joined = Trajectory.from_completion(
        prompt_ids=[10, 11, 12],
        completion_ids=[20, 21],
        completion_logprobs=[-0.25, -0.75],
        completion_versions=[VersionSpan(4, 0, 1), VersionSpan(5, 1, 2)],
        finish_reason=FinishReason.LENGTH,
        seed=99,
    )
    assert joined.token_ids.tolist() == [10, 11, 12, 20, 21]
    assert joined.loss_mask.tolist() == [False, False, False, True, True]
    assert joined.behavior_logprobs.tolist() == [0, 0, 0, -0.25, -0.75]
    assert joined.versions == (VersionSpan(4, 3, 4), VersionSpan(5, 4, 5))
    assert (joined.finish_reason, joined.seed) == (FinishReason.LENGTH, 99)
    assert joined.num_completion_tokens == 2
    assert joined.oldest_version == 4


def test_a_group_has_one_trajectory_for_each_seed() -> None:
    group = make_group([make_trajectory([1], [2]), make_trajectory([1], [3])])
    with pytest.raises(ValueError, match="1 trajectories for 2 seeds"):
        dataclasses.replace(group, trajectories=group.trajectories[:1])


def test_scores_must_match_their_trajectories_in_number_and_length() -> None:
    group = make_group([make_trajectory([1], [2, 3]), make_trajectory([1], [3])])
    good = (TokenRewards(np.zeros(3, np.float32)), TokenRewards(np.zeros(2, np.float32)))
    assert ScoredGroup(group, good).scores == good
    with pytest.raises(ValueError, match="shorter"):
        ScoredGroup(group, good[:1])
    with pytest.raises(ValueError, match=r"rewards of shape \(2,\) for \(3,\) tokens"):
        ScoredGroup(group, good[::-1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_refused_by_the_prompts_id(bad: float) -> None:
    group = make_group([make_trajectory([1], [2])], number=17)
    with pytest.raises(ValueError, match="'prompt-17': a reward is not finite"):
        ScoredGroup(group, (TokenRewards(np.array([0, bad], np.float32)),))


def test_the_types_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory().seed = 2  # type: ignore[misc]
