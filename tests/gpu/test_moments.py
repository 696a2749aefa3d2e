"""Adam's moments on a GPU: offloading changes no bit and frees their memory; 8 bits by the GPU's kernels.

Not run yet: no machine with a GPU was at hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.learner.optimizer import Optimizer, OptimizerConfig
from tests.fakes.models import random_qwen3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, torch sees none"),
]

WIDTH = 1024
"""Wide enough that the moments are most of what the allocator holds."""


def optimizer_of(**settings: object) -> Optimizer:
    model = random_qwen3(seed=0, width=WIDTH).cuda()
    return Optimizer(model, OptimizerConfig.model_validate({"lr": 1e-3, "weight_decay": 0.1, **settings}), num_steps=10)


def train(optimizer: Optimizer) -> int:
    """Four steps; the bytes that are allocated after them, less what was before the first."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for number in range(4):
        generator = torch.Generator("cuda").manual_seed(number)
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
        optimizer.step(number + 1)
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before


def everything(optimizer: Optimizer) -> dict[str, Tensor]:
    states = {f"{name} weight": p.detach() for name, p in optimizer.model.named_parameters()}
    for name, parameter in optimizer.model.named_parameters():
        states |= {f"{name} {key}": value for key, value in optimizer.adam.state[parameter].items()}
    return states


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_offloaded_moments_take_the_same_steps_and_leave_the_device_between_them(moments: str) -> None:
    if moments == "8bit":
        pytest.importorskip("bitsandbytes.functional", reason="the extra optim8bit is not installed")
    own, offloaded = optimizer_of(moments=moments), optimizer_of(moments=moments, offload=True)
    own_bytes, offloaded_bytes = train(own), train(offloaded)
    num_parameters = sum(parameter.numel() for parameter in own.parameters)
    assert own_bytes >= (8 if moments == "float32" else 2) * num_parameters
    assert offloaded_bytes < num_parameters / 10
    expected, found = everything(own), everything(offloaded)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value.cpu(), expected[name].cpu()), name
        assert value.is_cuda == name.endswith(" weight"), name


def test_the_gpu_rounds_as_the_cpu_does_but_for_its_table() -> None:
    """The CPU's kernel looks a number up in steps of 2^-15 of its block's largest, the GPU's searches the nearest value."""
    pytest.importorskip("bitsandbytes.functional", reason="the extra optim8bit is not installed")
    moments = optimizer_of(moments="8bit").moments
    value = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    state = {"step": torch.tensor(1.0), "exp_avg": value, "exp_avg_sq": value.square()}
    on_cpu = moments.for_step(moments.to_store(state), value)
    on_gpu = moments.for_step(
        moments.to_store({k: v if k == "step" else v.cuda() for k, v in state.items()}), value.cuda()
    )
    largest = value.abs().max()
    torch.testing.assert_close(on_gpu["exp_avg"].cpu(), on_cpu["exp_avg"], rtol=0, atol=float(largest) * 0.015)
    assert ((on_gpu["exp_avg"].cpu() - on_cpu["exp_avg"]).abs() > 1e-6).float().mean() < 0.01
