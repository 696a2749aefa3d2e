"""Which axis, section and summary a metric has."""

from __future__ import annotations

from align.metrics import GLOSSARY
from cluster.record.sinks.wandb.axes import (
    _HIGHER_IS_BETTER,
    _LOWER_IS_BETTER,
    _OTHER_AXES,
    AXES,
    axis_of,
    sections,
    summary_of,
)


def test_every_metric_is_in_one_section_in_the_order_of_the_glossary() -> None:
    names = [name for group in sections().values() for name in group]
    assert sorted(names) == sorted(GLOSSARY)
    for section, group in sections().items():
        assert group == [name for name in GLOSSARY if name.startswith(f"{section}/")]


def test_what_the_policy_can_do_is_over_tokens_machines_over_the_clock_and_the_rest_over_steps() -> None:
    assert {axis_of(name) for name in GLOSSARY} == set(AXES)
    assert axis_of("eval/heldout/accuracy") == "trained_tokens"
    assert axis_of("memory/rss_bytes") == axis_of("throughput/generated_tokens_per_s") == "wall_s"
    assert axis_of("policy/entropy") == axis_of("a/metric_to_come") == "step"


def test_what_is_named_here_is_in_the_glossary() -> None:
    from fnmatch import fnmatchcase

    assert set(_OTHER_AXES) <= sections().keys()
    for pattern in (*_HIGHER_IS_BETTER, *_LOWER_IS_BETTER):
        assert [name for name in GLOSSARY if fnmatchcase(name, pattern)], pattern


def test_the_best_value_is_kept_where_it_is_known_and_the_largest_where_that_is_the_reduction() -> None:
    assert summary_of("eval/train/kl_per_token") == "min,last"
    assert summary_of("reward/trajectory_mean") == summary_of("staleness/max") == "max,last"
    assert summary_of("optimizer/loss") == "last"
