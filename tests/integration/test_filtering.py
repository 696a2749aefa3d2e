"""A run that drops groups, visits by pass rate and moves its reference; and its second half, resumed from a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster.record.files import hash_tree
from tests.harness.commands import DEMO, align, trajectories

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.usefixtures("tiny_task")]

# Outcomes are cut to [-8, 0], so that many groups of the untrained policy have the least one throughout: no signal.
SETTINGS = [
    f"--set={setting}"
    for setting in (
        *("run.steps=4", "run.prompts_per_step=8", "checkpoint.every=2", "wandb.mode=disabled"),
        *("evaluation.every=100", "evaluation.max_prompts=8", "optimizer.schedule=constant", "optimizer.lr=1e-3"),
        *("algorithm.rewards=outcome", "algorithm.baseline=leave_one_out", "algorithm.discount=1.0"),
        *("algorithm.reward_range=[-8.0, 0.0]", "filter.drop_without_signal=true", "filter.pass_mark=-8.0"),
        *("filter.curriculum={low = 0.3, high = 0.8}", "reference.refresh_every=2"),
    )
]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_batches_are_full_of_groups_with_signal_and_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    code, console = align("train", DEMO, *SETTINGS, "--set", f"run.dir={whole}")
    assert code == 0, console[-4000:]
    steps = rows(whole)[1:]
    assert steps[-1]["ledger/trained"] == 32
    assert (
        steps[-1]["ledger/filtered"]
        == sum(row["filter/dropped_failed"] + row["filter/dropped_passed"] for row in steps)
        > 0
    )
    assert [row["reference/version"] for row in steps] == [0, 2, 2, 4]
    for step, trained in trajectories(whole).items():
        paid: dict[int, list[float]] = {}
        for row in trained:
            paid.setdefault(row["ticket"], []).append(max(-8.0, min(0.0, sum(row["rewards"]))))
        assert len(paid) == 8
        assert all(max(outcomes) > min(outcomes) for outcomes in paid.values()), f"step {step}"
    on_its_own_reference = [abs(reward) for row in trajectories(whole)[3] for reward in row["rewards"]]
    assert max(on_its_own_reference) < 1e-3, "step 3 was scored by the policy that sampled it"
    assert max(abs(reward) for row in trajectories(whole)[2] for reward in row["rewards"]) > 1

    shutil.copytree(whole, resumed)
    for left in ("checkpoints/step_00004", "reference", "policy"):
        shutil.rmtree(resumed / left)
    for left in ("summary.json", "trajectories/step_00003.parquet", "trajectories/step_00004.parquet"):
        (resumed / left).unlink()
    code, console = align("train", DEMO, *SETTINGS, "--set", f"run.dir={resumed}")
    assert code == 0, console[-4000:]
    assert "resuming     after step 2" in console
    assert trajectories(resumed) == trajectories(whole)
    ends = [load_file(folder / "policy" / "model.safetensors") for folder in (whole, resumed)]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    states = [json.loads((folder / "checkpoints/step_00004/state.json").read_text()) for folder in (whole, resumed)]
    assert states[0]["state"] == states[1]["state"]
    assert hash_tree(whole / "reference") == hash_tree(resumed / "reference")
