"""Trajectories on disk: one row each, per-token columns over the sampled tokens, complete or not there."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from align.data.types import FinishReason, Group, Prompt, ScoredGroup, Ticket, TokenRewards, Trajectory, VersionSpan
from align.learner.learner import UpdateStats
from cluster.record import transcripts


class FakeTokenizer:
    """Token 0 is special, the others are letters."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(ord("a") + token) for token in token_ids if token)


def trajectory(completion: list[int], spans: list[VersionSpan], reason: FinishReason, seed: int) -> Trajectory:
    logprobs = [-0.5 * (i + 1) for i in range(len(completion))]
    return Trajectory.from_completion([8, 9], completion, logprobs, spans, reason, seed)


def scored_group(with_reference: bool = True) -> ScoredGroup:
    prompt = Prompt("p-1", "ij", (8, 9))
    long = trajectory([1, 2, 3], [VersionSpan(4, 0, 1), VersionSpan(5, 1, 3)], FinishReason.LENGTH, seed=11)
    short = trajectory([7, 0], [VersionSpan(5, 0, 2)], FinishReason.STOP, seed=12)
    scores = []
    for one in (long, short):
        rewards = np.where(one.loss_mask, np.arange(len(one.token_ids)), 0).astype(np.float32)
        scores.append(TokenRewards(rewards, -rewards if with_reference else None))
    return ScoredGroup(Group(Ticket(42, prompt, (11, 12)), (long, short)), tuple(scores))


def written(path: Path, *groups: ScoredGroup) -> list[dict[str, Any]]:
    transcripts.write(path, groups, FakeTokenizer(), step=6)
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


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


def test_in_brief_a_trajectory_says_what_a_list_needs(tmp_path: Path) -> None:
    written(tmp_path / "trajectories" / "step_00006.parquet", scored_group(), scored_group(with_reference=False))
    long, short, unreferenced, _ = transcripts.Trajectories(tmp_path).briefs(6)
    assert (long.step, long.ticket, long.repeat, long.prompt_id, long.prompt, long.excerpt) == (
        6,
        42,
        0,
        "p-1",
        "ij",
        "bcd",
    )
    assert (long.finish_reason, long.reward, long.num_tokens) == ("length", 9.0, 3)
    assert (long.staleness, short.staleness) == (1, 0), (
        "step 6 makes version 6 of version 5; the oldest tokens are of 4 and 5"
    )
    assert long.ref_gap == pytest.approx((-0.5 - 1.0 - 1.5 + 2 + 3 + 4) / 3)
    assert short.ref_gap == pytest.approx((-0.5 - 1.0 + 2 + 3) / 2)
    assert unreferenced.ref_gap is None
    assert long.log_ratio is None, "the update has not ended"


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
    assert [brief.log_ratio for brief in transcripts.Trajectories(tmp_path).briefs(6)] == [0.25, 2.0]


def test_where_no_trajectory_was_judged_by_a_reference_none_is_far_from_it(tmp_path: Path) -> None:
    written(tmp_path / "trajectories" / "step_00001.parquet", scored_group(with_reference=False))
    assert [brief.ref_gap for brief in transcripts.Trajectories(tmp_path).briefs(1)] == [None, None]


@pytest.mark.parametrize("name", ["step_00001.tmp", "step_00001_not_finite.safetensors", "step_x.parquet"])
def test_other_files_beside_the_steps_are_no_steps(tmp_path: Path, name: str) -> None:
    written(tmp_path / "trajectories" / "step_00002.parquet", scored_group())
    (tmp_path / "trajectories" / name).write_bytes(b"")
    assert list(transcripts.Trajectories(tmp_path).files) == [2]


def test_an_excerpt_is_one_line_that_keeps_the_end() -> None:
    assert transcripts.excerpt("a\n  b\tc") == "a b c"
    assert transcripts.excerpt("question and answer", 7) == "…answer"
    assert transcripts.returns([1.0, -2.0, 4.0]) == [3.0, 2.0, 4.0]
