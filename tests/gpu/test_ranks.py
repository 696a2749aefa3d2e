"""FSDP over NCCL with a single rank: all calls of many ranks, on one GPU. Not run yet: no machine with a GPU was at hand."""

from __future__ import annotations

import pytest
import torch

from align.learner.meeting import host, join
from align.model.policy import Policy
from align.model.ranks import Ranks
from tests.align.learner.test_ranks import PLAIN, assert_bitwise, assert_close, batch_of, new_learner, step, weights
from tests.conftest import character_tokenizer, random_qwen3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, there is none"),
]


def test_one_rank_on_nccl_takes_the_steps_of_a_learner_that_is_alone() -> None:
    store, meeting = host("127.0.0.1", timeout_s=60)
    ranks = join(meeting, 0, 1, address="127.0.0.1", device="cuda", timeout_s=60, store=store)
    try:
        sharded = new_learner(ranks, tied=True, **PLAIN)
        assert sharded.policy.device.type == "cuda"
        assert_bitwise(weights(sharded), weights(new_learner(Ranks(), tied=True)))
        alone = new_learner(Ranks(), tied=True, policy=Policy(random_qwen3(0).cuda(), character_tokenizer()), **PLAIN)
        for number in range(3):
            batch = batch_of(number)
            assert step(sharded, batch) == pytest.approx(step(alone, batch), rel=1e-4, abs=1e-5)
        assert_close(weights(sharded), weights(alone))
    finally:
        torch.distributed.destroy_process_group()
