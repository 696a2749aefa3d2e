"""How each metric of the glossary is drawn and summed up: over which axis, and which of its values is worth keeping."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from align.metrics import GLOSSARY

AXES = {
    "step": "optimizer steps",
    "trained_tokens": "sampled tokens learned from so far, in all processes of the run",
    "wall_s": "seconds of all processes of the run so far",
}
"""Name of each axis as W&B has it, and what it counts."""

_OTHER_AXES = {"eval": "trained_tokens", "throughput": "wall_s", "memory": "wall_s", "fleet": "wall_s"}
_HIGHER_IS_BETTER = (
    *("reward/*_mean", "eval/*/accuracy", "eval/*/grammatical", "critic/explained_variance"),
    *("throughput/*_per_s", "importance/effective_sample_fraction"),
)
_LOWER_IS_BETTER = ("eval/*/kl_per_token", "throughput/padding_fraction", "critic/loss")


def section_of(name: str) -> str:
    """The group of charts that a metric belongs to: what stands before the first slash."""
    return name.partition("/")[0]


def sections(names: Iterable[str] = GLOSSARY) -> dict[str, list[str]]:
    """All metrics by section, in the order of the glossary."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(section_of(name), []).append(name)
    return found


def axis_of(name: str) -> str:
    """The axis that says most about a metric.

    What the policy can do is compared over the tokens that it learned from, which does not depend on the size of a batch;
    how the machines fare, over the clock; everything else, over the steps.
    """
    return _OTHER_AXES.get(section_of(name), "step")


def summary_of(name: str) -> str:
    """What of a whole run stands beside its name, in the words of W&B: the last value, and the best or largest one too if
    that says more."""
    if GLOSSARY[name].reduce == "max" or _matches(name, _HIGHER_IS_BETTER):
        return "max,last"
    return "min,last" if _matches(name, _LOWER_IS_BETTER) else "last"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
