"""Trajectories written to disk: one row each, per-token columns over the sampled tokens, complete or not there."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from align.learner.learner import UpdateStats
from cluster.record import transcripts
from cluster.record.trajectories import Trajectories
from tests.fakes.transcripts import FakeTokenizer, scored_group, written


def test_a_row_says_everything_about_its_trajectory(tmp_path: Path) -> None:
    long, short = written(tmp_path / "trajectories" / "step_00006.parquet", scored_group())
    assert long == {
        "step": 6,
        "ticket": 42,
        "repeat": 0,
        "prompt_id": "p-1",
        "prompt": "ij",
        "completion": "bcd",
        "finish_reason": "length",
        "seed": 11,
        "reward": 9.0,
        "reward_parts": None,
        "token_ids": [1, 2, 3],
        "behavior_logprobs": [-0.5, -1.0, -1.5],
        "ref_logprobs": [-2.0, -3.0, -4.0],
        "rewards": [2.0, 3.0, 4.0],
        "step_ends": None,
        "advantages": None,
        "policy_logprobs": None,
        "versions": [4, 5, 5],
    }
    assert (short["repeat"], short["seed"], short["finish_reason"]) == (1, 12, "stop")
    assert (short["completion"], short["token_ids"], short["versions"]) == ("h", [7, 0], [5, 5])


def test_the_parts_of_a_composite_reward_are_kept_beside_their_sum(tmp_path: Path) -> None:
    group = scored_group()
    scores = tuple(replace(score, parts={"exact_match": 1.0, "overlong": -0.5}) for score in group.scores)
    rows = written(tmp_path / "step.parquet", replace(group, scores=scores))
    assert [row["reward_parts"] for row in rows] == [{"exact_match": 1.0, "overlong": -0.5}] * 2


def test_without_a_reference_its_column_is_empty(tmp_path: Path) -> None:
    rows = written(tmp_path / "step.parquet", scored_group(with_reference=False))
    assert [row["ref_logprobs"] for row in rows] == [None, None]


def test_all_groups_of_a_step_are_in_one_file(tmp_path: Path) -> None:
    assert len(written(tmp_path / "step.parquet", scored_group(), scored_group(with_reference=False))) == 4


def test_writing_a_step_again_replaces_it_and_leaves_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    written(path, scored_group(), scored_group())
    assert len(written(path, scored_group())) == 2
    assert os.listdir(tmp_path) == ["step.parquet"]


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(table: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"PAR1 half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        transcripts.write(tmp_path / "step.parquet", [scored_group()], FakeTokenizer(), step=6)
    assert not (tmp_path / "step.parquet").exists()


def test_after_the_update_each_token_has_its_advantage_and_the_log_ratio(tmp_path: Path) -> None:
    group = scored_group()
    advantages = torch.arange(10.0).reshape(2, 5)
    policy = torch.tensor([[0, 0, -0.5, -1.25, math.nan], [0, 0, -0.5, -3.0, 0]])
    path = tmp_path / "trajectories" / "step_00006.parquet"
    transcripts.write(path, [group], FakeTokenizer(), 6, UpdateStats([], 4, False, advantages, policy))
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["advantages"] for row in rows] == [[2, 3, 4], [7, 8]]
    assert rows[1]["policy_logprobs"] == [-0.5, -3.0]
    assert rows[0]["policy_logprobs"] == [-0.5, -1.25, pytest.approx(math.nan, nan_ok=True)], "it carried no loss"
    assert [brief.log_ratio for brief in Trajectories(tmp_path).briefs(6)] == [0.25, 2.0]
