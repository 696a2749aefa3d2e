"""The summary and the samples of a run, from what is on disk, over kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.loop.answer import Answer
from cluster.record.figures import Samples, read_rows, seconds_so_far, summarize_run

ROWS: list[dict[str, Any]] = [
    {
        "step": 0,
        "eval/heldout/kl_per_token": 1.5,
        "eval/heldout/grammatical": 0.25,
        "eval/heldout/accuracy": 0.0625,
        "eval/train/kl_per_token": 1.25,
        "eval/train/grammatical": 0.5,
    },
    {"step": 1, "tokens/generated": 100, "tokens/trained": 90, "mismatch/abs_mean": 0.5, "mismatch/abs_max": 3.0},
    {
        "step": 2,
        "tokens/generated": 50,
        "tokens/trained": 50,
        "mismatch/abs_mean": 0.25,
        "mismatch/abs_max": 1.0,
        "memory/rss_bytes": 7,
        "eval/heldout/kl_per_token": 0.5,
        "eval/heldout/grammatical": 0.75,
    },
    {
        "step": 3,
        "memory/rss_bytes": 5,
        "eval/heldout/accuracy": 0.5,
        "eval/heldout/kl_per_token": 0.125,
        "eval/train/kl_per_token": 0.25,
    },
]
SAMPLES = {"sets": {}, "reference_rates": {"heldout": 0.9375}}
KEYS = {
    *(
        f"{what}_{when}{of}"
        for what in ("kl_per_token", "grammatical", "accuracy")
        for when in ("before", "after")
        for of in ("", "_train")
    ),
    "grammatical_reference",
    "grammatical_reference_train",
    "mismatch_mean",
    "mismatch_max",
    "peak_rss_bytes",
    "generated_tokens",
    "trained_tokens",
    "steps",
    "evaluations",
    "goodput",
    "time",
}


def test_figures_come_from_the_rows() -> None:
    assert summarize_run(ROWS, SAMPLES) == {
        "kl_per_token_before": 1.5,
        "kl_per_token_after": 0.125,
        "accuracy_before": 0.0625,
        "accuracy_after": 0.5,
        "grammatical_before": 0.25,
        "grammatical_after": 0.75,
        "grammatical_reference": 0.9375,
        "kl_per_token_before_train": 1.25,
        "kl_per_token_after_train": 0.25,
        "accuracy_before_train": None,
        "accuracy_after_train": None,
        "grammatical_before_train": 0.5,
        "grammatical_after_train": 0.5,
        "grammatical_reference_train": None,
        "mismatch_mean": pytest.approx((100 * 0.5 + 50 * 0.25) / 150),  # over tokens
        "mismatch_max": 3.0,
        "peak_rss_bytes": 7,
        "generated_tokens": 150,
        "trained_tokens": 140,
        "steps": 3,
        "goodput": None,
        "time": None,
        "evaluations": [
            {
                "step": 0,
                "eval/heldout/kl_per_token": 1.5,
                "eval/heldout/grammatical": 0.25,
                "eval/heldout/accuracy": 0.0625,
                "eval/train/kl_per_token": 1.25,
                "eval/train/grammatical": 0.5,
            },
            {"step": 2, "eval/heldout/kl_per_token": 0.5, "eval/heldout/grammatical": 0.75},
            {
                "step": 3,
                "eval/heldout/accuracy": 0.5,
                "eval/heldout/kl_per_token": 0.125,
                "eval/train/kl_per_token": 0.25,
            },
        ],
    }


@pytest.mark.parametrize("rows", [[], [{"step": 0}]])
def test_a_run_that_did_nothing_has_every_key(rows: list[dict[str, Any]]) -> None:
    summary = summarize_run(rows, {"sets": {}})
    assert summary.keys() == KEYS
    assert {key: value for key, value in summary.items() if value is not None} == {
        "generated_tokens": 0,
        "trained_tokens": 0,
        "steps": 0,
        "evaluations": [],
    }


def test_the_goodput_is_that_of_the_last_step_and_times_are_weighed_over_all_steps() -> None:
    def step(number: int, seconds: float, idle: float, trained: int) -> dict[str, Any]:
        phases = {"rollout_wait": idle * seconds, "update": 1.0, "publish": 0.5, "other": seconds * (1 - idle) - 1.5}
        times = {f"time/{name}_s": value for name, value in phases.items()} | {"time/step_s": seconds}
        tokens = {"goodput/sampled_tokens": 80 * number, "goodput/trained_tokens": trained}
        return {"step": number, "idle/learner_fraction": idle, **times, **tokens, "goodput/waiting_tokens": 20}

    summary = summarize_run([{"step": 0}, step(1, 4.0, 0.5, 60), step(2, 6.0, 0.25, 140), {"step": 2}], {})
    assert {fate: share for fate, share in summary["goodput"].items() if share} == {"trained": 0.875, "left": 0.125}
    assert summary["time"] == {
        "rollout_wait": pytest.approx(3.5 / 10),
        "update": 0.2,
        "publish": 0.1,
        "other": pytest.approx(3.5 / 10),
        "idle_learner": pytest.approx(3.5 / 10),
        "idle_rollout": 0.0,
        "idle_scorer": 0.0,
    }


def test_a_figure_of_zero_is_a_figure() -> None:
    zero = {"step": 1, "tokens/generated": 8, "mismatch/abs_mean": 0.0, "mismatch/abs_max": 0.0, "memory/rss_bytes": 0}
    summary = summarize_run([zero], {})
    assert (summary["mismatch_mean"], summary["mismatch_max"], summary["peak_rss_bytes"]) == (0.0, 0.0, 0)


# --- rows ---------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_of_a_step_that_was_trained_twice_around_a_kill_the_later_row_counts(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metrics.jsonl",
        '{"step": 1, "tokens/generated": 10}',
        '{"step": 2, "tokens/generated": 20}',
        '{"step": 3, "tokens/generated": 30, "memory/rss_bytes": 9}',
        '{"step": 2, "tokens/generated": 21}',  # resumed after step 1
        '{"step": 3, "tokens/generated": 31}',
    )
    rows = read_rows(path)
    assert [(row["step"], row["tokens/generated"]) for row in rows] == [(1, 10), (2, 21), (3, 31)]
    assert summarize_run(rows, {})["generated_tokens"] == 62


def test_two_rows_of_one_step_are_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 0, "a": 1}', '{"step": 0, "b": 2}')
    assert read_rows(path) == [{"step": 0, "a": 1, "b": 2}]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 1, "a": 1}', '{"step": 2, "a"', "", '{"step": 3, "a": 3}')
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(write_lines(tmp_path / "metrics.jsonl")) == []


def test_the_seconds_of_all_earlier_processes_add_up(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metrics.jsonl",
        '{"step": 1, "wall_s": 20.5}',
        '{"step": 2, "wall_s": 30.25}',
        '{"step": 3, "wall_s": 40',  # torn by a kill; the second process counts from 0 again
        '{"step": 3, "wall_s": 12.0}',
        '{"step": 4, "wall_s": 25.5}',
        '{"step": 5, "wall_s": 11.0}',
    )
    assert seconds_so_far(path) == 30.25 + 25.5 + 11.0


def test_a_run_that_logged_nothing_took_no_seconds(tmp_path: Path) -> None:
    assert seconds_so_far(write_lines(tmp_path / "metrics.jsonl")) == 0


# --- samples ------------------------------------------------------------------------------------------------------


def answers(text: str, judged: bool | None = None, num: int = 3, accuracy: float | None = None) -> list[Answer]:
    return [Answer(f"prompt {i}", f"{text} {i}", 0.5, 4, judged, accuracy) for i in range(num)]


def test_the_first_answers_are_before_and_the_newest_after(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    assert not samples.begun
    samples.add("heldout", answers("old", False), num=2)
    assert not samples.begun, "the other sets and the reference may be missing"
    samples.mark_begun()
    assert samples.begun
    samples.add("heldout", answers("middle", False), num=2)
    samples.add("heldout", answers("new", True), num=2)
    assert json.loads((tmp_path / "samples.json").read_text())["sets"]["heldout"] == [
        {
            "prompt": f"prompt {i}",
            "before": f"old {i}",
            "grammatical_before": False,
            "accuracy_before": None,
            "after": f"new {i}",
            "grammatical_after": True,
            "accuracy_after": None,
        }
        for i in range(2)
    ]


def test_how_right_an_answer_was_stands_beside_it(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("heldout", answers("old", num=1, accuracy=0.0), num=1)
    samples.add("heldout", answers("new", num=1, accuracy=0.5), num=1)
    (row,) = samples.content["sets"]["heldout"]
    assert (row["accuracy_before"], row["accuracy_after"]) == (0.0, 0.5)


def test_a_resumed_run_keeps_its_answers_from_before_training(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("heldout", answers("before the kill"), num=1)
    samples.mark_begun()
    resumed = Samples(tmp_path / "samples.json")
    assert resumed.begun
    resumed.add("heldout", answers("after it"), num=1)
    (row,) = resumed.content["sets"]["heldout"]
    assert (row["before"], row["after"]) == ("before the kill 0", "after it 0")


def test_answers_of_a_start_that_was_killed_halfway_do_not_count(tmp_path: Path) -> None:
    Samples(tmp_path / "samples.json").add("heldout", answers("before the kill"), num=1)
    again = Samples(tmp_path / "samples.json")
    assert not again.begun
    again.add("heldout", answers("asked again"), num=1)
    (row,) = again.content["sets"]["heldout"]
    assert (row["before"], row.get("after")) == ("asked again 0", None)


def test_the_reference_is_judged_over_all_its_answers_and_shown_beside_the_samples(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("heldout", answers("old"), num=1)
    prompts = ["the cat", "the dog", "the"]
    texts = [" sleeps .", " dog dog", " cat sleeps ."]
    samples.add_reference("heldout", prompts, texts, judge="grammatical")
    assert samples.content["reference_rates"] == {"heldout": pytest.approx(2 / 3)}
    (row,) = samples.content["sets"]["heldout"]
    assert (row["reference"], row["grammatical_reference"]) == (texts[0], True)
    assert summarize_run([], samples.content)["grammatical_reference"] == pytest.approx(2 / 3)


def test_without_a_judge_the_reference_is_shown_and_has_no_rate(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("train", answers("old"), num=3)
    samples.add_reference("train", ["p"], ["text 我"], judge=None)
    assert "reference_rates" not in samples.content
    stored = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert stored["sets"]["train"][0]["reference"] == "text 我"
