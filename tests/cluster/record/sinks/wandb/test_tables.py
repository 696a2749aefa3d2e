"""Tables of trajectories: their rows, and which there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.record.sinks.wandb.tables import table
from tests.fakes.wandb_steps import write_step


def test_a_row_of_a_table_says_what_was_asked_answered_paid_and_when_it_was_sampled(tmp_path: Path) -> None:
    path = write_step(tmp_path, 6, [2.0], version=4, parts=True)
    columns, rows = table(path, step=6, num_rows=10, discount=0.5)
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {
            "prompt": "question",
            "completion": "aa",
            "reward": 4.0,
            "return": 3.0,  # 2 + 0.5 * 2
            "version": 4,
            "staleness": 1,  # step 6 updates version 5
            "finish_reason": "stop",
            "tokens": 2,
            "ticket": 42,
            "reward exact_match": 1.0,
            "reward overlong": -0.5,
        }
    ]


def test_a_table_is_bounded_and_reaches_from_the_lowest_reward_to_the_highest(tmp_path: Path) -> None:
    rewards = [float(k) for k in np.random.default_rng(0).permutation(100)]
    path = write_step(tmp_path, 1, rewards, version=0)
    columns, rows = table(path, step=1, num_rows=12, discount=1.0)
    shown = [row[columns.index("reward")] / 2 for row in rows]
    assert shown == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    assert len(table(path, step=1, num_rows=1, discount=1.0)[1]) == 1
    assert len(table(path, step=1, num_rows=100, discount=1.0)[1]) == 100
