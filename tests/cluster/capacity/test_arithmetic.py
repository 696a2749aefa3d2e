"""The arithmetic of a run, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from align.data.packing import pack
from align.learner.epochs import minibatches
from align.learner.shares import passes
from align.model.ranks import Ranks
from cluster.capacity.arithmetic import Arithmetic
from tests.fakes.run_files import config
from tests.fakes.shapes import SHAPE


def test_the_numbers_of_a_batch_follow_from_the_run_file() -> None:
    numbers = Arithmetic.of(
        config(
            run={"prompts_per_step": 6, "group_size": 4, "max_staleness": 2},
            rollout={"dtype": "bfloat16", "max_model_len": 100, "num_actors": 3},
            sampling={"max_tokens": 10},
            learner={"max_tokens_per_micro_batch": 250},
            checkpoint={"keep": 2},
        ),
        SHAPE,
    )
    assert numbers.groups_in_flight == 18
    assert numbers.trajectories_per_step == 24
    assert numbers.max_tokens_per_step == 2400
    assert numbers.max_micro_batches == 12
    assert (numbers.publish_bytes, numbers.published_bytes_per_step) == (2000, 6000)
    assert numbers.checkpoint_bytes == 12_000
    assert numbers.disk_bytes == 3 * 12_000 + 4000


@pytest.mark.parametrize(
    ("num_ranks", "algorithm", "expected"),
    [
        (1, {}, 12),  # two trajectories in each
        (2, {}, 6),
        (5, {}, 3),  # the first ranks have 5 of the 24
        (2, {"num_epochs": 2, "num_minibatches": 3}, 2 * 3 * 2),  # 4 of 8 on a rank
    ],
)
def test_micro_batches_are_those_of_a_rank_in_all_optimizer_steps(
    num_ranks: int, algorithm: dict[str, object], expected: int
) -> None:
    """Counted as the learner cuts a batch of trajectories that are all as long as they can be."""
    cfg = config(
        run={"prompts_per_step": 6, "group_size": 4},
        rollout={"max_model_len": 100},
        sampling={"max_tokens": 10},
        learner={"max_tokens_per_micro_batch": 250, "num_ranks": num_ranks},
        algorithm=algorithm,
    )
    numbers = Arithmetic.of(cfg, SHAPE)
    counted = 0
    for rows in minibatches(24, cfg.algorithm.num_epochs, cfg.algorithm.num_minibatches, version=0):
        counted += len(list(passes(Ranks(0, num_ranks), [100] * len(rows), lambda lengths: pack(lengths, 250))))
    assert numbers.max_micro_batches == counted == expected
    assert numbers.optimizer_steps == cfg.algorithm.num_epochs * cfg.algorithm.num_minibatches
