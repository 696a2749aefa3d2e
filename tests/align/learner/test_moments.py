"""Adam's moments between steps: what 8 bits round and cost, and that where they are kept changes no bit."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.algorithm.config import AlgorithmConfig
from align.learner.learner import Learner, LearnerConfig
from align.learner.moments import Moments, eight_bit_kernels
from align.learner.optimizer import Optimizer, OptimizerConfig
from align.model.policy import Policy
from tests.fakes.batches import ragged_batch
from tests.fakes.models import WIDTH, character_tokenizer, random_qwen3
from tests.oracles.equality import assert_bitwise


@pytest.fixture
def eight_bits() -> str:
    """The setting, where the package that it needs is there."""
    pytest.importorskip("bitsandbytes.functional", reason="the extra optim8bit is not installed")
    return "8bit"


def optimizer_of(num_steps: int = 10, **settings: Any) -> Optimizer:
    cfg = OptimizerConfig(**{"lr": 1e-2, "weight_decay": 0.1} | settings)
    return Optimizer(random_qwen3(seed=0, width=WIDTH), cfg, num_steps)


def step(optimizer: Optimizer, number: int, scale: float = 1.0) -> None:
    """One step along a gradient that the number decides; one parameter in seven has none."""
    generator = torch.Generator().manual_seed(number)
    for index, parameter in enumerate(optimizer.parameters):
        gradient = scale * torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index % 7 == 6 else gradient
    optimizer.step(number + 1)
    optimizer.zero_grad()


def everything(optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and all that is kept of the moments."""
    found = {}
    for name, parameter in optimizer.model.named_parameters():
        for key, value in {"weight": parameter.detach(), **optimizer.adam.state[parameter]}.items():
            found[f"{name} {key}"] = value.clone()
    return found


def num_bytes(optimizer: Optimizer) -> int:
    """Of all moments."""
    states = (optimizer.adam.state[parameter] for parameter in optimizer.parameters)
    return sum(value.nbytes for state in states for key, value in state.items() if key != "step")


# --- where they are kept ------------------------------------------------------------------------------------------


def test_moments_that_are_fetched_and_put_back_parameter_by_parameter_take_the_step_of_adam_bit_for_bit() -> None:
    own, offloaded = optimizer_of(), optimizer_of(offload=True)
    for number in range(4):
        step(own, number)
        step(offloaded, number)
    assert_bitwise(everything(offloaded), everything(own))


def test_offloaded_moments_lie_in_host_memory_and_resume_bit_for_bit(tmp_path: Path) -> None:
    first, resumed = optimizer_of(offload=True), optimizer_of(offload=True)
    for number in range(2):
        step(first, number)
    first.save(tmp_path / "adam", torch.zeros(1))
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load(tmp_path / "adam")
    step(first, 2)
    step(resumed, 2)
    assert_bitwise(everything(resumed), everything(first))
    assert {value.device.type for value in everything(resumed).values()} == {"cpu"}


# --- 8 bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "block"), [(64, 64), (192, 64), (384, 128), (768, 256)])
def test_a_moment_is_the_nearest_of_256_values_times_the_largest_of_its_block(
    eight_bits: str, width: int, block: int
) -> None:
    """Against a search for the nearest value; the second moment by its root."""
    generator = torch.Generator().manual_seed(0)
    moments = Moments(eight_bits=True, offload=False)
    first = torch.randn(3, width, generator=generator) * torch.tensor([[1.0], [1e-5], [0.0]])
    second = torch.randn(3, width, generator=generator).square()
    kept = moments.to_store({"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second})
    assert kept["exp_avg_scales"].shape == (3, width // block)
    taken = moments.for_step(kept, first)
    assert taken["step"] == 3
    for name, signed, value, found in (
        ("exp_avg", True, first, taken["exp_avg"]),
        ("exp_avg_sq", False, second.sqrt(), taken["exp_avg_sq"].sqrt()),
    ):
        values = eight_bit_kernels().create_dynamic_map(signed=signed).double()
        blocks = value.double().view(-1, block)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(kept[f"{name}_scales"].view(-1, 1).double(), largest)
        share = blocks / largest.clamp(min=1e-30)
        gaps = (share[..., None] - values).abs().amin(dim=-1) * largest
        errors = (found.double().view(-1, block) - blocks).abs()
        assert (errors <= gaps + 2**-15 * largest).all(), "on a CPU the value is looked up in steps of that size"
    assert not taken["exp_avg"][2].any(), "zeros stay zeros"


def test_two_bytes_and_the_scales_are_kept_per_number_instead_of_eight(eight_bits: str) -> None:
    full, small = optimizer_of(), optimizer_of(moments=eight_bits)
    for optimizer in (full, small):
        step(optimizer, 0)
    trained = [p for index, p in enumerate(full.parameters) if index % 7 != 6]
    assert num_bytes(full) == 8 * sum(p.numel() for p in trained)
    blocks = {64: 64, 128: 128, 192: 64}  # by the length of a row
    expected = 0
    for parameter in trained:
        size = parameter.numel()
        expected += 8 * size if parameter.dim() < 2 else 2 * size + 8 * size // blocks[parameter.shape[-1]]
    assert num_bytes(small) == expected
    assert num_bytes(small) < num_bytes(full) * 0.28


def test_rows_that_no_block_divides_stay_in_float32(eight_bits: str) -> None:
    moments = Moments(eight_bits=True, offload=False)
    assert moments.keys(torch.zeros(64, 48)) == moments.keys(torch.zeros(64)) == ("exp_avg", "exp_avg_sq")
    assert len(moments.keys(torch.zeros(2, 3, 64))) == 4


def test_the_first_step_is_that_of_float32_bit_for_bit_and_later_ones_stay_near(eight_bits: str) -> None:
    full, small = optimizer_of(), optimizer_of(moments=eight_bits)
    before = {name: p.detach().clone() for name, p in full.model.named_parameters()}
    for number in range(20):
        for optimizer in (full, small):
            step(optimizer, number)
        if number == 0:
            for one, other in zip(full.parameters, small.parameters, strict=True):
                assert torch.equal(one, other)
    there = dict(small.model.named_parameters())
    for name, parameter in full.model.named_parameters():
        way, gap = (parameter - before[name]).norm(), (parameter - there[name]).norm()
        assert gap <= 0.03 * way, name
    assert any(not torch.equal(p, there[name]) for name, p in full.model.named_parameters())


def test_a_small_second_moment_is_not_rounded_to_zero_beside_a_large_one(eight_bits: str) -> None:
    """Else the first moment over `eps` would be the step: here 500 times the learning rate."""
    moments = Moments(eight_bits=True, offload=False)
    gradient = torch.full((1, 64), 1e-4)
    gradient[0, 0] = 1.0
    state = {"step": torch.tensor(1.0), "exp_avg": 0.1 * gradient, "exp_avg_sq": 0.05 * gradient.square()}
    taken = moments.for_step(moments.to_store(state), gradient)
    ratio = taken["exp_avg"] / (taken["exp_avg_sq"].sqrt() + 1e-8)
    assert ratio.max() < 1.2 * 0.1 / math.sqrt(0.05)
    assert ratio.min() > 0.8 * 0.1 / math.sqrt(0.05)


def test_a_run_in_8_bits_resumes_bit_for_bit(eight_bits: str, tmp_path: Path) -> None:
    first, resumed = optimizer_of(moments=eight_bits), optimizer_of(moments=eight_bits, offload=True)
    for number in range(3):
        step(first, number)
    first.save(tmp_path / "adam", torch.tensor([7.0]))
    resumed.model.load_state_dict(first.model.state_dict())
    assert resumed.load(tmp_path / "adam") == torch.tensor([7.0])
    assert_bitwise(everything(resumed), everything(first))
    for number in range(3, 6):
        step(first, number)
        step(resumed, number)
    assert_bitwise(everything(resumed), everything(first))


@pytest.mark.parametrize(("written", "read"), [("float32", "8bit"), ("8bit", "float32")])
def test_moments_that_were_kept_in_another_form_are_refused(
    eight_bits: str, tmp_path: Path, written: str, read: str
) -> None:
    first = optimizer_of(moments=written)
    step(first, 0)
    first.save(tmp_path / "adam", torch.zeros(1))
    with pytest.raises(ValueError, match=r"keeps the moments of .* in another form .* set optimizer\.moments"):
        optimizer_of(moments=read).load(tmp_path / "adam")


def test_an_update_that_is_not_finite_leaves_weights_and_8_bit_moments_bitwise(eight_bits: str) -> None:
    policy = Policy(random_qwen3(seed=0, width=WIDTH), character_tokenizer())
    cfg = OptimizerConfig(lr=1e-3, moments=eight_bits)
    learner = Learner(policy, AlgorithmConfig(), cfg, LearnerConfig(), num_steps=10)
    learner.update(ragged_batch())
    before = everything(learner.optimizer)
    assert any(value.dtype == torch.uint8 for value in before.values())
    bad = ragged_batch(1)
    rewards = bad.rewards.clone()
    rewards[0, 3] = math.nan
    assert learner.update(dataclasses.replace(bad, rewards=rewards)).skipped
    assert_bitwise(everything(learner.optimizer), before)
    assert not learner.update(ragged_batch(2)).skipped


def test_without_the_package_8_bits_are_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes.*pip install 'align\[optim8bit\]'"):
        optimizer_of(moments="8bit")
