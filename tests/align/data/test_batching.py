"""Collation puts every number where it belongs; micro-batches lose no row and keep the budget."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.batching import Batch, collate, micro_batches
from align.data.types import FinishReason, ScoredGroup, TokenRewards, TopTokens, Trajectory, VersionSpan
from tests.fakes.trajectories import make_group, make_scored, make_trajectory

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def two_groups() -> list[ScoredGroup]:
    first = make_trajectory([10, 11], [12, 13], [-0.25, -0.5], version=3)
    second = Trajectory.from_completion(
        [10], [21, 22, 23], [-1, -2, -3], [VersionSpan(2, 0, 1), VersionSpan(3, 1, 3)], FinishReason.LENGTH, seed=0
    )
    third = dataclasses.replace(make_trajectory([30], [31], [-4.0], version=4), finish_reason=FinishReason.ABORT)
    without_reference = make_scored([first, second], [[1, 2], [3, 4, 5]])
    scores = TokenRewards(np.array([0, 6], np.float32), ref_logprobs=np.array([0, -7], np.float32))
    return [without_reference, ScoredGroup(make_group([third], number=1), (scores,))]


def test_collate_puts_every_number_where_it_belongs() -> None:
    batch = collate(two_groups())
    nan = math.nan
    expected = {
        "token_ids": [[10, 11, 12, 13], [10, 21, 22, 23], [30, 31, 0, 0]],
        "lengths": [4, 4, 2],
        "loss_mask": [[False, False, True, True], [False, True, True, True], [False, True, False, False]],
        "behavior_logprobs": [[0, 0, -0.25, -0.5], [0, -1, -2, -3], [0, -4, 0, 0]],
        "rewards": [[0, 0, 1, 2], [0, 3, 4, 5], [0, 6, 0, 0]],
        "ref_logprobs": [[nan] * 4, [nan] * 4, [0, -7, nan, nan]],
        "versions": [[-1, -1, 3, 3], [-1, 2, 3, 3], [-1, 4, -1, -1]],
        "group_index": [0, 0, 1],
        "overlong": [False, True, False],
    }
    by_the_learner = {"old_logprobs", "old_values", "value_targets"}
    not_asked_for = {"step_ends", "guarded", "ref_top_ids", "ref_top_logprobs"} | by_the_learner
    assert {f.name for f in fields(Batch)} == set(expected) | not_asked_for
    assert [getattr(batch, name) for name in sorted(not_asked_for)] == [None] * 7
    for name, values in expected.items():
        actual = getattr(batch, name)
        torch.testing.assert_close(actual, torch.tensor(values, dtype=actual.dtype), rtol=0, atol=0, equal_nan=True)
    assert (batch.num_trajectories, batch.num_loss_tokens) == (3, 6)


def test_collating_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one trajectory"):
        collate([])


def test_rows_are_picked_in_the_order_asked_for_and_cut_to_the_longest() -> None:
    batch = collate(two_groups())
    short = batch.rows([2])
    assert short.token_ids.tolist() == [[30, 31]]
    assert short.rewards.tolist() == [[0, 6]]
    swapped = batch.rows([2, 0])
    assert swapped.token_ids.tolist() == [[30, 31, 0, 0], [10, 11, 12, 13]]
    assert swapped.group_index.tolist() == [1, 0]


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = with_likeliest_tokens()
    numbers = dict.fromkeys(("old_logprobs", "old_values", "value_targets"), batch.rewards)
    moved = dataclasses.replace(batch, guarded=batch.loss_mask, **numbers).to("meta")
    assert {getattr(moved, f.name).device.type for f in fields(Batch)} == {"meta"}


def with_likeliest_tokens() -> Batch:
    """A trajectory of one step in two tokens, and one of one token without steps; two likeliest tokens each."""
    group = make_group([make_trajectory([10, 11], [12, 13]), make_trajectory([10], [14])])
    tops = [
        TopTokens(np.array([[5, 6], [7, 8]], np.int32), np.array([[-1, -2], [-3, -4]], np.float32)),
        TopTokens(np.array([[9, 5]], np.int32), np.array([[-5, -6]], np.float32)),
    ]
    first = TokenRewards(np.array([0, 0, 0, 2], np.float32), None, tops[0], np.array([False, False, False, True]))
    return collate([ScoredGroup(group, (first, TokenRewards(np.array([0, 3], np.float32), None, tops[1])))])


def test_likeliest_tokens_and_step_ends_stand_at_the_tokens_they_are_about() -> None:
    batch = with_likeliest_tokens()
    assert batch.ref_top_ids.tolist() == [[[0, 0], [0, 0], [5, 6], [7, 8]], [[0, 0], [9, 5], [0, 0], [0, 0]]]
    assert batch.ref_top_logprobs.tolist() == [[[0, 0], [0, 0], [-1, -2], [-3, -4]], [[0, 0], [-5, -6], [0, 0], [0, 0]]]
    assert batch.step_ends.tolist() == [[False, False, False, True], [False, True, False, False]]
    assert batch.rows([1]).ref_top_ids.tolist() == [[[0, 0], [9, 5]]]


def test_likeliest_tokens_of_some_trajectories_alone_are_refused() -> None:
    group = make_group([make_trajectory([10], [12]), make_trajectory([10], [14])])
    top = TopTokens(np.array([[5]], np.int32), np.array([[-1]], np.float32))
    scores = (TokenRewards(np.zeros(2, np.float32), None, top), TokenRewards(np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match="1 of 2 trajectories have the reference's likeliest tokens"):
        collate([ScoredGroup(group, scores)])


def test_a_reward_between_the_ends_of_steps_is_refused() -> None:
    score = TokenRewards(np.array([0, 1, 1], np.float32), step_ends=np.array([False, False, True]))
    with pytest.raises(ValueError, match="a token that ends no step has a reward"):
        ScoredGroup(make_group([make_trajectory([10], [12, 13])]), (score,))


@given(LENGTHS, st.integers(1, 200))
def test_every_row_is_in_exactly_one_micro_batch(lengths: list[int], max_tokens: int) -> None:
    parts = micro_batches(lengths, max_tokens)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 200))
def test_the_padded_size_keeps_the_budget_unless_one_row_alone_exceeds_it(lengths: list[int], max_tokens: int) -> None:
    for part in micro_batches(lengths, max_tokens):
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= max_tokens


@given(LENGTHS, st.integers(1, 200))
def test_two_neighbouring_micro_batches_never_fit_into_one(lengths: list[int], max_tokens: int) -> None:
    parts = micro_batches(lengths, max_tokens)
    for first, second in itertools.pairwise(parts):
        assert (len(first) + 1) * max(lengths[row] for row in first) > max_tokens
        assert min(lengths[row] for row in first) >= max(lengths[row] for row in second)


def test_micro_batches_of_a_case_done_by_hand() -> None:
    assert micro_batches([3, 9, 4, 3], max_tokens=8) == [[1], [2, 0], [3]]
    assert micro_batches([2, 2, 2], max_tokens=100) == [[0, 1, 2]]
    assert micro_batches([2, 2, 2], max_tokens=1) == [[0], [1], [2]]
