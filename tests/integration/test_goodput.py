"""A run whose verifier hangs on some completions: they are quarantined; its tokens and times add up, and so does its trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cluster.loop.goodput import FATES
from tests.fakes.run_files import write_answers
from tests.harness.commands import align, summary, trajectories
from tests.harness.trace_events import assert_phases_tile_the_steps, read_events, tracks

pytestmark = [pytest.mark.integration, pytest.mark.long]

STEPS, PROMPTS, GROUP_SIZE = 4, 8, 8
HANGS = r"\bmy\b|\bthe\b(?:[a-z .]+)+!"  # where a long rest follows "the", as about one completion in twenty has it


def write_run(folder: Path, tiny_task: Path) -> Path:
    files = write_answers(folder, tiny_task)
    content = {
        "run": {"seed": 1, "steps": STEPS, "prompts_per_step": PROMPTS, "group_size": GROUP_SIZE, "max_staleness": 1},
        "policy": {"model": str(tiny_task / "policy")},
        "prompts": {"files": [str(files["train"])]},
        "reward": {"kind": "exact_match", "extract": "regex", "pattern": HANGS},
        "quarantine": {"deadline_s": 0.1, "max_fraction": 0.5},
        "filter": {"drop_without_signal": True},
        "sampling": {"max_tokens": 16},
        "algorithm": {"name": "grpo", "kl": "none", "kl_coefficient": 0.0, "aggregation": "token_mean"}
        | {"importance": "truncated", "proximal": "recomputed", "mask_overlong": True},
        "rollout": {"dtype": "float32", "max_model_len": 64, "kv_cache_bytes": 1 << 26},
        "evaluation": {"heldout": {"files": [str(files["heldout"])]}, "every": 2, "max_prompts": 64},
        "wandb": {"mode": "disabled"},
    }
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(content))
    return path


@pytest.fixture(scope="module")
def run(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("goodput")
    run_file, out = write_run(folder, tiny_task), folder / "run"
    code, console = align("train", run_file, "--set", f"run.dir={out}", "--set", "run.trace=true", timeout_s=400)
    assert code == 0, console[-4000:]
    assert "ui.perfetto.dev" in console
    return out


def steps(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "time/step_s" in row]


def test_what_hung_is_in_quarantine_with_its_traceback_and_was_not_trained(run: Path) -> None:
    failures = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert failures
    for failure in failures:
        assert "TimeoutError: no answer within 0.1 s" in failure["traceback"]
        assert "the" in failure["completion"]
    kept = [row for rows in trajectories(run).values() for row in rows]
    seeds = {(failure["ticket"], failure["seed"]) for failure in failures}
    assert not {(row["ticket"], row["seed"]) for row in kept} & seeds
    trained = {row["ticket"] for row in kept}
    assert len(kept) == STEPS * PROMPTS * GROUP_SIZE - sum(ticket in trained for ticket, _ in seeds)
    assert 0 < max(row["reward/quarantined_fraction"] for row in steps(run)) < 0.5
    assert all(0 <= row.get("eval/heldout/unjudged_fraction", 0.0) < 0.5 for row in steps(run))


def test_tokens_and_times_add_up_at_every_step_and_the_trained_ones_are_those_on_disk(run: Path) -> None:
    rows = steps(run)
    assert len(rows) == STEPS
    for row in rows:
        assert sum(row[f"goodput/{fate}_tokens"] for fate in FATES) == row["goodput/sampled_tokens"]
        phases = sum(row[f"time/{phase}_s"] for phase in ("other", "rollout_wait", "update", "publish"))
        assert phases == pytest.approx(row["time/step_s"], rel=1e-9)
        for role in ("learner", "rollout", "scorer"):
            assert 0 <= row[f"idle/{role}_fraction"] <= 1
    on_disk = sum(len(row["token_ids"]) for one in trajectories(run).values() for row in one)
    last = rows[-1]
    assert last["goodput/trained_tokens"] == sum(row["tokens/trained"] for row in rows) > 0
    assert last["goodput/trained_tokens"] + last["goodput/masked_tokens"] == on_disk
    assert last["goodput/filtered_tokens"] > 0
    assert last["goodput/quarantined_tokens"] > 0
    figures = summary(run)
    assert sum(figures["goodput"].values()) == pytest.approx(1, abs=1e-12)
    assert all(figures["time"][f"idle_{role}"] < 1 for role in ("learner", "rollout", "scorer")), (
        "over the run all worked"
    )
    assert "Where tokens and time went" in (run / "report.html").read_text()


def test_the_trace_has_every_group_and_its_phases_tile_the_steps(run: Path) -> None:
    lanes = tracks(read_events(run / "trace.json"))
    assert_phases_tile_the_steps(lanes)
    assert len(lanes["loop", "steps"]) == STEPS
    assert [event["name"] for event in lanes["loop", "beside training"]].count("evaluation") >= 2
    groups = {
        role: [event for (process, _), work in lanes.items() if process == f"{role} 0" for event in work]
        for role in ("rollout", "scorer")
    }
    tickets = {row["ticket"] for rows in trajectories(run).values() for row in rows}
    for work in groups.values():
        assert tickets <= {event["args"]["ticket"] for event in work}
        assert all(event["args"]["tokens"] >= GROUP_SIZE for event in work)
    sampled = {event["args"]["ticket"]: event for event in groups["rollout"]}
    for event in groups["scorer"]:
        before = sampled[event["args"]["ticket"]]
        assert before["ts"] + before["dur"] <= event["ts"], "one clock"


def test_above_the_limit_the_run_ends_with_the_newest_traceback(run: Path, tmp_path: Path) -> None:
    more = ("--set", "quarantine.max_fraction=0", "--set", f"run.dir={tmp_path / 'run'}")
    code, console = align("train", run.parent / "run.toml", *more, timeout_s=400)
    assert code == 1
    assert re.search(r"\[REWARD\] the reward failed for \d of the last", console), console[-4000:]
    assert "TimeoutError: no answer within 0.1 s" in console
    assert summary(tmp_path / "run")["status"] == "failed"
