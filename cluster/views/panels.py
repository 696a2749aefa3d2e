"""The small plots of a run: which metrics each shows, and how its axis runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "zero", "log", "rate"]
Points = Mapping[int, float]
"""Step -> value, in the order of the steps."""


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Attributes:
        title: What it shows.
        unit: Unit and scale of the vertical axis, "" for a pure number.
        curves: (metric, label) of each curve. The position decides the colour, whichever of them exist.
        scale: Vertical axis: "linear" around the values, "zero" from 0 up, "log", or "rate" for shares of 1, shown as
            0 to 100 percent.
        has_target: whether the value that the reference reaches is drawn too.
    """

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    scale: Scale = "linear"
    has_target: bool = False


PANELS = (
    Panel(
        "KL to the reference",
        "nats per token, log scale",
        (
            ("eval/heldout/kl_per_token", "held-out"),
            ("eval/train/kl_per_token", "train"),
            ("kl/behavior_reference", "rollouts"),
        ),
        scale="log",
    ),
    Panel(
        "Judged grammatical",
        "share of completions",
        (("eval/heldout/grammatical", "held-out"), ("eval/train/grammatical", "train")),
        scale="rate",
        has_target=True,
    ),
    Panel(
        "Right answers",
        "accuracy by the reward's verifier",
        (("eval/heldout/accuracy", "held-out"), ("eval/train/accuracy", "train")),
        scale="rate",
    ),
    Panel("Reward per token", "nats", (("reward/token_mean", "mean"),)),
    Panel("Reward per trajectory", "nats", (("reward/trajectory_mean", "mean"),)),
    Panel("Entropy of the policy", "nats per token", (("policy/entropy", "mean"),)),
    Panel(
        "Mismatch of engine and learner",
        "nats, log scale",
        (("mismatch/abs_mean", "mean"), ("mismatch/abs_max", "largest")),
        scale="log",
    ),
    Panel("Staleness", "policy versions", (("staleness/mean", "mean"), ("staleness/max", "largest")), "zero"),
    Panel(
        "Throughput",
        "tokens per second",
        (("throughput/generated_tokens_per_s", "generated"), ("throughput/trained_tokens_per_s", "trained")),
        scale="zero",
    ),
    Panel(
        "Time by phase",
        "seconds per step",
        (
            ("time/rollout_wait_s", "rollout wait"),
            ("time/update_s", "update"),
            ("time/publish_s", "publish"),
            ("time/eval_s", "eval"),
            ("time/step_s", "whole step"),
        ),
        scale="zero",
    ),
)
_ROLES = {"learner": "learner", "rollout": "rollout actors", "scorer": "scorers"}
FURTHER_PANELS = (
    Panel("Completion length", "tokens", (("trajectory/completion_tokens_mean", "mean"),), "zero"),
    Panel("Gradient norm", "before clipping, log scale", (("optimizer/grad_norm", "norm"),), scale="log"),
    Panel("Learning rate", "", (("optimizer/lr", "rate"),)),
    Panel("Goodput", "trained of the tokens decided on", (("goodput/trained_fraction", "trained"),), "rate"),
    Panel(
        "Idle",
        "share of the time",
        tuple((f"idle/{role}_fraction", name) for role, name in _ROLES.items()),
        "rate",
    ),
    Panel("Canary gap of the weights", "nats", (("weights/canary_gap", "gap"),)),
)
"""Drawn on the page only, below the others."""


def present(panels: Iterable[Panel], series: Mapping[str, Points]) -> list[Panel]:
    """The panels that have at least one curve to draw."""
    return [panel for panel in panels if any(name in series for name, _ in panel.curves)]


def non_positive(panel: Panel, series: Mapping[str, Points]) -> int:
    """How many values a logarithmic panel cannot show (an estimate of a small KL may fall below zero)."""
    shown = [value for name, _ in panel.curves for value in series.get(name, {}).values()]
    return sum(value <= 0 for value in shown) if panel.scale == "log" and any(value > 0 for value in shown) else 0
