"""Weights from the learner's GPU to the engines', in whole runs of the demo. Not run yet: no machine with a GPU was at hand.

A run that ends well shows that every engine loaded the learner's bytes (`Engine.commit` compares fingerprints at every
publish, and a difference stops the run) and computes with them (the canary).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.actors.weights import WeightsConfig
from tests.harness.commands import DEMO, AlignProcess, align, last_step, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("tiny_task")]

_NUM_GPUS = torch.cuda.device_count()
_STEPS = 4
_COMMON = [
    *("run.prompts_per_step=16", "evaluation.every=100", "evaluation.max_prompts=16", f"run.steps={_STEPS}"),
    *("learner.num_gpus=1", "rollout.num_gpus=1", "rollout.dtype=bfloat16", "rollout.gpu_memory_utilization=0.3"),
    "weights.packed_buffer_bytes=1048576",  # less than the model, so that there are several parts
]


def needs(num_gpus: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(num_gpus > _NUM_GPUS, reason=f"needs {num_gpus} NVIDIA GPUs, there are {_NUM_GPUS}")


def settings(folder: Path, *more: str) -> list[str]:
    return [part for setting in (*_COMMON, *more, f"run.dir={folder}") for part in ("--set", setting)]


def check(folder: Path) -> None:
    """The last version is served, and at every step engine and learner computed the same."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["weights/version"] == _STEPS
    warn, _ = WeightsConfig().canary_limits("bfloat16")
    gaps = [row["weights/canary_gap"] for row in rows]
    print(f"canary gaps {gaps}")
    assert max(gaps) < warn
    assert rows[-1]["weights/published_bytes"] > 1 << 20


@needs(1)
def test_ipc_to_an_engine_on_the_learners_gpu(tmp_path: Path) -> None:
    code, console = align("train", DEMO, *settings(tmp_path / "run", "weights.transport=ipc"), timeout_s=500)
    assert code == 0, console[-4000:]
    check(tmp_path / "run")


@needs(2)
def test_nccl_to_an_engine_on_another_gpu(tmp_path: Path) -> None:
    code, console = align("train", DEMO, *settings(tmp_path / "run", "weights.transport=nccl"), timeout_s=500)
    assert code == 0, console[-4000:]
    check(tmp_path / "run")


@needs(3)
def test_nccl_to_two_engines_of_their_own_ranks(tmp_path: Path) -> None:
    more = ("weights.transport=nccl", "rollout.num_actors=2")
    code, console = align("train", DEMO, *settings(tmp_path / "run", *more), timeout_s=500)
    assert code == 0, console[-4000:]
    check(tmp_path / "run")


@needs(3)
def test_nccl_to_one_engine_on_two_gpus(tmp_path: Path) -> None:
    more = ("weights.transport=nccl", "rollout.num_gpus=2")
    code, console = align("train", DEMO, *settings(tmp_path / "run", *more), timeout_s=500)
    assert code == 0, console[-4000:]
    check(tmp_path / "run")


@needs(2)
def test_a_dead_engine_is_replaced_in_a_new_group(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("weights.transport=nccl", "run.max_staleness=1", "algorithm.importance=truncated", "run.steps=200")
    command = AlignProcess("train", DEMO, *settings(folder, *more))
    wait_until(lambda: last_step(folder) >= 2, "step 2", 400)
    command.kill_engine()
    killed_at = last_step(folder)
    wait_until(lambda: last_step(folder) >= killed_at + 5, "five more steps", 400)
    command.interrupt()
    code, console = command.wait(200)
    assert code == 130, console[-4000:]
    assert "replacing it" in console
