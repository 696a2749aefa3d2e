"""The summary of a run, from what is on disk."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.record.figures import summarize_run

BEFORE: dict[str, Any] = {
    "step": 0,
    "eval/heldout/kl_per_token": 1.5,
    "eval/heldout/grammatical": 0.25,
    "eval/heldout/accuracy": 0.0625,
    "eval/train/kl_per_token": 1.25,
    "eval/train/grammatical": 0.5,
}
ROWS: list[dict[str, Any]] = [
    BEFORE,
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
            BEFORE,
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
