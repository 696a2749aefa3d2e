"""The demo with an adapter: the engine computes what the learner does, and a resumed run equals one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.policy import Policy
from tests.integration.runs import DEMO, align, summary, trajectories

pytestmark = pytest.mark.integration

STEPS = 6
SETTINGS = [
    *("policy.adapter.kind=dora", "policy.adapter.rank=8", "optimizer.schedule=constant", "checkpoint.every=3"),
    *(f"run.steps={STEPS}", "run.prompts_per_step=16", "evaluation.every=100", "evaluation.max_prompts=16"),
]


def train(folder: Path) -> str:
    code, console = align("train", DEMO, *(part for s in (*SETTINGS, f"run.dir={folder}") for part in ("--set", s)))
    assert code == 0, console[-4000:]
    return console


@pytest.fixture(scope="module")
def run(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run folder."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    console = train(folder)
    assert "adapter      dora of rank 8, scale 4; published merged" in console
    assert f"{folder}/policy_adapter" in console
    return folder


def test_the_adapter_learns_and_engines_that_have_the_merged_weights_compute_what_the_learner_does(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert summary(run)["kl_per_token_after"] < 0.9 * summary(run)["kl_per_token_before"]
    mismatches = [row["mismatch/abs_mean"] for row in rows if "mismatch/abs_mean" in row]
    assert len(mismatches) == STEPS
    assert max(mismatches) <= 1e-5
    assert max(row["weights/canary_gap"] for row in rows) <= 1e-4
    assert rows[-1]["weights/version"] == STEPS


@torch.no_grad()
def test_both_exports_are_the_policy_that_was_trained(run: Path, tiny_task: Path) -> None:
    from peft import PeftModel

    merged, first = Policy.load(run / "policy"), Policy.load(tiny_task / "policy")
    ids = torch.arange(3, 23)[None]
    before = first.model(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(first.model, run / "policy_adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged.model(input_ids=ids).logits, rtol=1e-5, atol=1e-4)
    assert (adapted - before).abs().max() > 0.1
    stored = load_file(run / "checkpoints" / f"step_{STEPS:05d}" / "optimizer.safetensors")
    assert {name.split(".")[-3] for name in stored if name != "owner"} == {"lora_A", "lora_B", "lora_magnitude_vector"}


def test_a_run_that_is_resumed_in_the_middle_equals_the_one_that_was_not_bit_for_bit(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS:05d}")
    (again / "summary.json").unlink()
    assert "resuming     after step 3" in train(again)
    assert trajectories(again) == trajectories(run)
    for file in ("policy/model.safetensors", "policy_adapter/adapter_model.safetensors"):
        one, other = load_file(run / file), load_file(again / file)
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
