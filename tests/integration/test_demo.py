"""The demo, as `make demo` runs it: its figures, and everything that it leaves in the run folder."""

from __future__ import annotations

import json
import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest

from align.metrics import GLOSSARY
from cluster.record.history import read_rows
from cluster.record.sinks.wandb.tables import TABLE
from cluster.record.trajectories import Trajectories
from cluster.views.credit import step_credits
from tests.harness.commands import DEMO, align, summary, trajectories
from tests.harness.wandb_files import wandb_rows

pytestmark = pytest.mark.integration

SECRET = "c0ffee" * 6 + "5afe"  # the form of a W&B key, and nobody's


@pytest.fixture(scope="module")
def demo(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The finished run folder and the console text."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    secrets = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "WANDB_MODE": "offline"}
    code, console = align(
        "train", DEMO, "--set", f"run.dir={folder}", "--set", "wandb.tables=20", timeout_s=600, environment=secrets
    )
    assert code == 0, console[-4000:]
    return folder, console


def test_the_demo_reaches_its_goals_on_prompts_never_trained_on(demo: tuple[Path, str]) -> None:
    figures = summary(demo[0])
    print(json.dumps(figures, indent=2))
    assert figures["status"] == "finished"
    assert figures["grammatical_before"] < 0.15
    assert figures["grammatical_after"] >= 0.90
    assert figures["kl_per_token_before"] >= 20 * figures["kl_per_token_after"]


def test_the_demo_reaches_its_goals_on_trained_prompts(demo: tuple[Path, str]) -> None:
    figures = summary(demo[0])
    assert figures["grammatical_before_train"] < 0.15
    assert figures["grammatical_after_train"] >= 0.90
    assert figures["kl_per_token_before_train"] >= 20 * figures["kl_per_token_after_train"]


def test_engine_and_learner_agreed_on_every_token_of_the_run(demo: tuple[Path, str]) -> None:
    figures = summary(demo[0])
    assert 0 < figures["mismatch_mean"] <= 1e-5
    assert figures["mismatch_max"] <= 1e-3


def test_all_processes_together_stayed_under_ten_gibibytes(demo: tuple[Path, str]) -> None:
    assert 0.5 * 2**30 < summary(demo[0])["peak_rss_bytes"] < 10 * 2**30


def test_the_run_folder_is_complete(demo: tuple[Path, str]) -> None:
    folder, console = demo
    for name in ("config.toml", "environment.json", "metrics.jsonl", "samples.json", "report.html", "curves.svg"):
        assert (folder / name).stat().st_size > 0, name
    assert tomllib.loads((folder / "config.toml").read_text())["run"]["seed"] == 1
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 1
    assert {"torch", "transformers", "ray", "wandb"} <= environment["packages"].keys()
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    for shown in ("report.html", "metrics.jsonl", "trajectories", "wandb sync", "policy"):
        assert shown in console.split("finished after")[-1]


def test_the_console_shows_every_step_and_the_time_left(demo: tuple[Path, str]) -> None:
    folder, console = demo
    steps = summary(folder)["steps"]
    lines = [line for line in console.splitlines() if f"/{steps} " in line]
    assert len(lines) == steps
    assert all(":" in line.split()[-1] for line in lines[1:]), "every step after the first says the time left"


def test_what_a_run_emits_is_what_the_glossary_explains(demo: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (demo[0] / "metrics.jsonl").read_text().splitlines()]
    emitted = {name for row in rows for name in row} - {"step", "wall_s"}
    assert emitted <= GLOSSARY.keys()
    of_parts_that_the_demo_does_not_use = {
        "advantage/clipped_fraction",
        "critic/clipped_fraction",
        "critic/explained_variance",
        "critic/grad_norm",
        "critic/loss",
        "critic/value_mean",
        "distillation/divergence",
        "distillation/rest_fraction",
        "guard/covariance",
        "guard/token_fraction",
        "filter/dropped_failed",
        "filter/dropped_passed",
        "filter/pass_rate",
        "filter/skipped",
        "eval/heldout/accuracy",
        "eval/train/accuracy",
        "eval/heldout/unjudged_fraction",
        "eval/train/unjudged_fraction",
        "importance/truncated_fraction",
        "importance/weight_mean",
        "kl/coefficient",
        "kl/policy_reference",
        "kl/trajectory_behavior_reference",
        "optimizer/inner_steps",
        "reference/version",
        "reward/clipped_fraction",
        "supervised/token_fraction",
        "tokens/masked",
        "support/outside_fraction",
        "surrogate/clipped_fraction",
        "trajectory/overlong_masked_fraction",
    }
    assert GLOSSARY.keys() - emitted == of_parts_that_the_demo_does_not_use


def test_the_wandb_record_holds_every_metric_of_every_step_as_metrics_jsonl_does(demo: tuple[Path, str]) -> None:
    (record,) = (demo[0] / "wandb").glob("offline-run-*/*.wandb")
    recorded = {row["step"]: row for row in wandb_rows(record)}
    rows = {row["step"]: row for row in read_rows(demo[0] / "metrics.jsonl")}
    assert recorded.keys() == rows.keys()
    trained = 0.0
    for step, row in rows.items():
        trained += row.get("tokens/trained", 0)
        assert {name: recorded[step][name] for name in GLOSSARY if name in row} == {
            name: value for name, value in row.items() if name in GLOSSARY
        }
        assert recorded[step]["trained_tokens"] == trained
        assert recorded[step]["wall_s"] == pytest.approx(row["wall_s"], abs=1e-3)
    assert sum(1 for row in recorded.values() if any(name.startswith(TABLE) for name in row)) == max(rows) // 20


def test_a_good_run_gives_no_alert(demo: tuple[Path, str]) -> None:
    assert not (demo[0] / "events.jsonl").exists()


def test_secrets_of_the_environment_are_in_no_file_log_or_line_of_the_run(demo: tuple[Path, str]) -> None:
    folder, console = demo
    session = Path(json.loads((folder / "environment.json").read_text())["ray_session"])
    written = [path for root in (folder, session) for path in root.rglob("*") if path.is_file()]
    assert len(written) > 50
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in console


def test_every_prompt_was_trained_exactly_once_and_on_policy(demo: tuple[Path, str]) -> None:
    by_step = trajectories(demo[0])
    assert list(by_step) == list(range(1, summary(demo[0])["steps"] + 1))
    seen: set[tuple[int, int]] = set()
    for step, rows in by_step.items():
        assert len(rows) == 64 * 4
        assert {version for row in rows for version in row["versions"]} == {step - 1}
        seen |= {(row["ticket"], row["repeat"]) for row in rows}
    assert seen == {(t, r) for t in range(64 * len(by_step)) for r in range(4)}


def test_rewards_on_disk_are_reference_minus_behavior(demo: tuple[Path, str]) -> None:
    for row in trajectories(demo[0])[1]:
        expected = [ref - own for ref, own in zip(row["ref_logprobs"], row["behavior_logprobs"], strict=True)]
        assert row["rewards"] == pytest.approx(expected, abs=1e-5)


def test_advantages_computed_again_from_the_files_are_those_that_the_learner_had(demo: tuple[Path, str]) -> None:
    found = Trajectories(demo[0])
    logged = [json.loads(line) for line in (demo[0] / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row["advantage/std"] for row in logged if "advantage/std" in row}
    for step in (1, 50, 100):
        advantages = [value for credit in step_credits(found, step).values() for value in credit.advantages]
        assert statistics.pstdev(advantages) == pytest.approx(by_step[step], rel=1e-5)


def test_the_exported_policy_is_what_transformers_loads_and_the_report_shows(demo: tuple[Path, str]) -> None:
    from align.model.policy import Policy

    policy = Policy.load(demo[0] / "policy")
    ids = policy.tokenizer.encode("the")
    (completion,) = policy.sample([ids], max_tokens=32, temperature=1.0, seed=0)
    assert completion[-1] in policy.end_token_ids()
    page = (demo[0] / "report.html").read_text()
    first: dict[str, Any] = json.loads((demo[0] / "samples.json").read_text())["sets"]["heldout"][0]
    for part in ("prompt", "before", "after", "reference"):
        assert first[part] in page
