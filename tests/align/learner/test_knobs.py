"""Settings for memory and speed that must not matter: each gives the losses and weights of five steps that the others give."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import Batch, collate
from align.data.sampling import Sampling
from align.data.token_logprobs import TokenLogprobs
from align.learner.learner import Learner, LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.metrics import reduce
from align.model.policy import Policy
from tests.conftest import VOCAB_SIZE, random_qwen3
from tests.fakes.trajectories import make_scored, make_trajectory
from tests.oracles.tabular import TabularLM

STEPS = 5
SIZES = ((2, 5), (4, 1), (1, 17), (3, 3), (6, 6), (2, 30), (9, 2), (1, 1))
"""Prompt and completion tokens."""
TOKEN = {"surrogate": "ppo_clip", "importance": "none", "entropy_coefficient": 0.01, "aggregation": "token_mean"}
TRAJECTORY = {"surrogate": "gspo", "importance": "none", "aggregation": "trajectory_token_mean"}
PLAIN = {"packing": False}
KNOBS: dict[str, dict[str, Any]] = {
    "packed into one row": {},
    "packed into rows of 40": {"max_tokens_per_micro_batch": 40},
    "one by one": {"max_tokens_per_micro_batch": 1, **PLAIN},
    "padded to 60": {"max_tokens_per_micro_batch": 60, **PLAIN},
    "one token's logits at a time": {"max_logits_bytes": 1},
    "seven tokens' logits at a time": {"max_logits_bytes": 4 * VOCAB_SIZE * 7, **PLAIN},
    "activations computed again": {"activation_checkpointing": True, **PLAIN},
    "activations computed again, packed": {"activation_checkpointing": True, "max_tokens_per_micro_batch": 40},
    "eager attention": {"attention": "eager", **PLAIN},
    "eager attention, packed": {"attention": "eager"},
}


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    scored = []
    for number, (prompt, completion) in enumerate(SIZES):
        ids = torch.randint(3, VOCAB_SIZE, (prompt + completion,), generator=generator).tolist()
        logprobs = (-4 - torch.rand(completion, generator=generator)).tolist()
        rewards = torch.randn(completion, generator=generator).tolist()
        scored.append(make_scored([make_trajectory(ids[:prompt], ids[prompt:], logprobs)], [rewards], number))
    made = collate(scored)
    made.loss_mask[2, 4] = False
    return dataclasses.replace(made, group_index=torch.arange(len(SIZES)) // 2)


def train(algorithm: dict[str, Any], tied: bool, **knobs: Any) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Metrics of five steps, and all weights after them."""
    model = random_qwen3(seed=0, tied=tied)
    model.set_attn_implementation(knobs.pop("attention", "sdpa"))
    learner = Learner(
        Policy(model, tokenizer=None),
        AlgorithmConfig(**algorithm),
        OptimizerConfig(lr=1e-3, eps=1e-2),
        LearnerConfig(**knobs),
        STEPS,
        sampling=Sampling(0.8),
    )
    steps = [reduce(learner.update(batch(seed)).metrics) for seed in range(STEPS)]
    for values in steps:
        del values["throughput/trained_tokens_per_s"], values["throughput/padding_fraction"]
    return steps, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def plain() -> Callable[[str, bool], tuple[list[dict[str, float]], torch.Tensor]]:
    """The same five steps, all trajectories padded into one micro-batch."""
    known: dict[tuple[str, bool], tuple[list[dict[str, float]], torch.Tensor]] = {}

    def of(name: str, tied: bool) -> tuple[list[dict[str, float]], torch.Tensor]:
        if (name, tied) not in known:
            known[name, tied] = train(TOKEN if name == "token" else TRAJECTORY, tied, **PLAIN)
        return known[name, tied]

    return of


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["token", "trajectory"])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_a_knob_for_memory_or_speed_changes_no_loss_and_no_weight_beyond_rounding(
    plain: Callable[..., tuple[list[dict[str, float]], torch.Tensor]], knobs: dict[str, Any], name: str, tied: bool
) -> None:
    expected, weights = plain(name, tied)
    found, found_weights = train(TOKEN if name == "token" else TRAJECTORY, tied, **knobs)
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-6), step
    torch.testing.assert_close(found_weights, weights, rtol=0, atol=5e-7)
    before = torch.cat([p.detach().flatten() for p in random_qwen3(seed=0, tied=tied).parameters()])
    assert float((weights - before).abs().max()) > 1e-3


def test_packed_and_padded_gradients_agree_to_a_millionth(policy: Policy) -> None:
    gradients = []
    for packing in (False, True):
        learner = Learner(
            Policy(copy.deepcopy(policy.model), None),
            AlgorithmConfig(),
            OptimizerConfig(),
            LearnerConfig(packing=packing),
            1,
        )
        found: list[torch.Tensor] = []
        learner.optimizer.adam.register_step_pre_hook(
            lambda *_, found=found, learner=learner: found.extend(p.grad.clone() for p in learner.optimizer.parameters)
        )
        learner.update(batch(0))
        gradients.append(torch.cat([g.flatten().double() for g in found]))
    padded, packed = gradients
    assert float((packed - padded).norm() / padded.norm()) < 1e-6


@pytest.mark.parametrize("packing", [True, False])
def test_the_share_of_padding_is_reported(packing: bool) -> None:
    learner = Learner(
        Policy(random_qwen3(0), None), AlgorithmConfig(), OptimizerConfig(), LearnerConfig(packing=packing), 1
    )
    values = reduce(learner.update(batch(0)).metrics)
    lengths = [prompt + completion for prompt, completion in SIZES]
    expected = 0 if packing else 1 - sum(lengths) / (len(lengths) * max(lengths))
    assert values["throughput/padding_fraction"] == pytest.approx(expected)


# --- by token ----------------------------------------------------------------------------------------------------

ALGORITHMS = [
    AlgorithmConfig(
        surrogate=surrogate,
        importance=importance,
        importance_level=level,
        kl=kl,
        kl_coefficient=0.0 if kl == "none" else 0.3,
        entropy_coefficient=0.1,
    )
    for surrogate in ("reinforce", "importance_weighted", "ppo_clip", "gspo", "cispo")
    for importance, level in (
        ("none", "token"),
        ("truncated", "token"),
        ("masked", "token"),
        ("truncated", "sequence_mean"),
    )
    for kl in ("none", "loss")
    if surrogate == "reinforce" or importance == "none"
]


@pytest.mark.parametrize(
    "cfg", ALGORITHMS, ids=lambda cfg: f"{cfg.surrogate}-{cfg.importance_level}-{cfg.importance}-{cfg.kl}"
)
def test_an_objective_is_by_token_where_each_token_may_stand_alone_and_only_there(cfg: AlgorithmConfig) -> None:
    part, objective = dataclasses.replace(batch(0), ref_logprobs=batch(1).behavior_logprobs), Objective(cfg)
    generator = torch.Generator().manual_seed(5)
    noise = [torch.rand(part.token_ids.shape, generator=generator) for _ in range(3)]
    logprobs, entropy, advantages = part.behavior_logprobs + 0.5 * noise[0], noise[1], noise[2] - 0.5
    part.ref_logprobs.masked_fill_(part.loss_mask & part.ref_logprobs.eq(0), -1.0)
    mask = part.loss_mask
    together, _ = objective.token_losses(part, TokenLogprobs(logprobs, entropy), advantages)
    flat = TokenLogprobs(logprobs[mask][:, None], entropy[mask][:, None])
    alone, _ = objective.token_losses(part.tokens(), flat, advantages[mask][:, None])
    assert torch.allclose(alone[:, 0], together[mask], rtol=1e-6) == objective.is_by_token


# --- activations, determinism ------------------------------------------------------------------------------------


def test_checkpointing_runs_each_layer_again_in_the_backward_pass_and_trains_no_dropout() -> None:
    calls = []
    for checkpointing in (False, True):
        model = random_qwen3(0)
        learner = Learner(
            Policy(model, None),
            AlgorithmConfig(),
            OptimizerConfig(),
            LearnerConfig(activation_checkpointing=checkpointing),
            1,
        )
        assert learner.policy.trunk.packs  # its trial has been run
        count: list[int] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        learner.update(batch(0))
        calls.append(len(count))
        assert not any(module.training for module in model.modules() if not list(module.children()))
    assert calls == [2, 2 + 2]


def test_checkpointing_a_model_that_cannot_is_refused() -> None:
    with pytest.raises(ValueError, match="TabularLM has no layers that support it"):
        Learner(
            Policy(TabularLM(torch.zeros(1, 3)), None),
            AlgorithmConfig(),
            OptimizerConfig(),
            LearnerConfig(activation_checkpointing=True),
            1,
        )


def test_a_saved_batch_holds_every_tensor(tmp_path: Path) -> None:
    made = batch(0)
    made.save(tmp_path / "folder" / "batch.safetensors")
    read = Batch(**load_file(tmp_path / "folder" / "batch.safetensors"))
    for field in dataclasses.fields(Batch):
        torch.testing.assert_close(getattr(read, field.name), getattr(made, field.name), rtol=0, atol=0, equal_nan=True)
