"""Short runs of the demo with an adapter, and what each of them must show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from align.model.policy import Policy
from tests.harness.commands import DEMO, align, trajectories

STEPS = 6
SETTINGS = [
    *("policy.adapter.rank=8", "optimizer.schedule=constant", "checkpoint.every=3"),
    *(f"run.steps={STEPS}", "run.prompts_per_step=16", "evaluation.every=100", "evaluation.max_prompts=16"),
]


def command(folder: Path, *settings: str) -> list[str | Path]:
    return ["train", DEMO, *(part for s in (*SETTINGS, *settings, f"run.dir={folder}") for part in ("--set", s))]


def train(folder: Path, *settings: str) -> str:
    code, console = align(*command(folder, *settings))
    assert code == 0, console[-4000:]
    return console


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_engines_compute_what_the_learner_does(run: Path) -> None:
    mismatches = [row["mismatch/abs_mean"] for row in rows(run) if "mismatch/abs_mean" in row]
    assert len(mismatches) == STEPS
    assert max(mismatches) <= 1e-5
    assert max(row["weights/canary_gap"] for row in rows(run)) <= 1e-4
    assert rows(run)[-1]["weights/version"] == STEPS


@torch.no_grad()
def assert_both_exports_are_the_policy(run: Path, tiny_task: Path) -> None:
    from peft import PeftModel

    merged, first = Policy.load(run / "policy"), Policy.load(tiny_task / "policy")
    ids = torch.arange(3, 23)[None]
    before = first.model(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(first.model, run / "policy_adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged.model(input_ids=ids).logits, rtol=1e-5, atol=1e-4)
    assert (adapted - before).abs().max() > 0.1


def assert_resumes_bit_for_bit(run: Path, tmp_path: Path, settings: list[str]) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS:05d}")
    (again / "summary.json").unlink()
    assert "resuming     after step 3" in train(again, *settings)
    assert trajectories(again) == trajectories(run)
    for file in ("policy/model.safetensors", "policy_adapter/adapter_model.safetensors"):
        one, other = load_file(run / file), load_file(again / file)
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
