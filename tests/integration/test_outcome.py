"""A run whose reward is an exact match and that has no reference model, on real Ray and a real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from tests.fakes.run_files import write_answers
from tests.harness.commands import align, summary, trajectories

pytestmark = pytest.mark.integration

GROUP_SIZE = 8


def write_run(folder: Path, tiny_task: Path) -> Path:
    """GRPO pays completions that say the word of the row; the policy says it in about a fifth of them."""
    files = write_answers(folder, tiny_task)
    content = {
        "run": {"name": "outcome", "seed": 1, "steps": 12, "prompts_per_step": 16, "group_size": GROUP_SIZE},
        "policy": {"model": str(tiny_task / "policy")},
        "prompts": {"files": [str(files["train"])]},
        "reward": {"kind": "exact_match", "extract": "regex", "pattern": r"\bmy\b"},
        "sampling": {"max_tokens": 16},
        "algorithm": {"name": "grpo", "kl": "none", "kl_coefficient": 0.0, "aggregation": "token_mean"},
        "optimizer": {"lr": 2e-3},
        "rollout": {"dtype": "float32", "max_model_len": 64, "kv_cache_bytes": 1 << 26},
        "evaluation": {"heldout": {"files": [str(files["heldout"])]}, "every": 6, "max_prompts": 64, "group_size": 2},
    }
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(content))
    return path


@pytest.fixture(scope="module")
def run(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The finished run folder and the console text."""
    folder = tmp_path_factory.mktemp("outcome")
    code, console = align("train", write_run(folder, tiny_task), "--set", f"run.dir={folder / 'run'}", timeout_s=400)
    assert code == 0, console[-4000:]
    return folder / "run", console


def test_the_policy_learns_what_the_outcome_pays_on_prompts_never_trained_on(run: tuple[Path, str]) -> None:
    figures = summary(run[0])
    print(json.dumps(figures, indent=2))
    assert figures["status"] == "finished"
    assert figures["accuracy_before"] < 0.4
    assert figures["accuracy_after"] > figures["accuracy_before"] + 0.3
    assert figures["accuracy_after_train"] > figures["accuracy_before_train"] + 0.3


def test_every_trajectory_is_paid_once_at_its_last_token_for_what_its_text_says(run: tuple[Path, str]) -> None:
    rows = [row for step in trajectories(run[0]).values() for row in step]
    assert len(rows) == 12 * 16 * GROUP_SIZE
    for row in rows:
        said = float("my" in row["completion"].replace(".", " ").split())
        assert row["rewards"] == [0.0] * (len(row["rewards"]) - 1) + [said]
        assert row["ref_logprobs"] is None


def test_without_a_reference_nothing_speaks_of_one_but_the_start(run: tuple[Path, str]) -> None:
    folder, console = run
    assert "reference    none: nothing asks one" in console
    figures = summary(folder)
    assert (figures["kl_per_token_before"], figures["kl_per_token_after"]) == (None, None)
    names = {name for line in (folder / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert {"eval/heldout/accuracy", "eval/train/accuracy", "reward/trajectory_mean"} <= names
    assert [name for name in names if "kl_per_token" in name or "reference" in name] == []
    page = (folder / "report.html").read_text()
    assert "Right answers" in page
    assert "<th>Reference</th>" not in page
    assert "Right answers" in console.split("finished after")[-1]
