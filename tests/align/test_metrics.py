"""Metrics have a glossary and one way of reduction each, and a mean is never a mean of means."""

from __future__ import annotations

import ast
import re

import pytest

from align.metrics import GLOSSARY, Metric, reduce
from tests.places import REPOSITORY

SOURCES = [path for package in ("align", "cluster") for path in (REPOSITORY / package).rglob("*.py")]


def test_a_mean_weighs_every_part() -> None:
    parts = [Metric("policy/entropy", 1.0, weight=1), Metric("policy/entropy", 4.0, weight=3)]
    assert reduce(parts) == {"policy/entropy": (1 * 1 + 4 * 3) / 4}


def test_how_a_mean_was_cut_into_parts_changes_nothing() -> None:
    whole = reduce(Metric("return/mean", value) for value in (0.5, 2.0, -1.0, 7.0, 3.5))
    cut = reduce([Metric("return/mean", 2.5 / 2, weight=2), Metric("return/mean", 9.5 / 3, weight=3)])
    assert whole["return/mean"] == pytest.approx(12 / 5)
    assert cut["return/mean"] == pytest.approx(12 / 5)


def test_sums_maxima_and_last_values_ignore_the_weight() -> None:
    names = ("tokens/trained", "mismatch/abs_max", "optimizer/lr")
    parts = [Metric(name, value, weight=100 * value) for value in (2.0, 5.0, 3.0) for name in names]
    assert reduce(parts) == {"tokens/trained": 10.0, "mismatch/abs_max": 5.0, "optimizer/lr": 3.0}


def test_a_mean_without_any_weight_is_0_and_nothing_reduces_to_nothing() -> None:
    assert reduce([Metric("policy/entropy", 3.0, weight=0)]) == {"policy/entropy": 0.0}
    assert reduce([]) == {}


def test_a_metric_that_nobody_explained_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'policy/surprise' is not in align\.metrics\.GLOSSARY"):
        Metric("policy/surprise", 1.0)


def test_every_metric_in_the_glossary_is_named_and_explained_in_one_form() -> None:
    for name, definition in GLOSSARY.items():
        assert re.fullmatch(r"[a-z]+(/[a-z_0-9]+)+", name), name
        assert definition.meaning.endswith("."), name
        assert definition.reduce in ("mean", "sum", "max", "last"), name


def test_a_unit_in_a_name_is_the_unit_of_its_definition() -> None:
    for name, definition in GLOSSARY.items():
        if name.endswith("_per_s"):
            assert definition.unit == "tokens/s", name
        elif name.endswith("_s"):
            assert definition.unit == "s", name
        elif name.endswith("_bytes"):
            assert definition.unit == "bytes", name
        elif name.endswith("_fraction"):
            assert definition.unit == "", name


def test_every_metric_that_is_written_is_explained_and_every_one_explained_is_written() -> None:
    patterns = [
        "".join(re.escape(part.value) if isinstance(part, ast.Constant) else "[a-z]+" for part in name_parts(node))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Metric"
        if not isinstance(node.args[0], ast.Starred)  # one that came from another rank
    ]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in GLOSSARY), f"{pattern} is not in the glossary"
    for name in GLOSSARY:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), f"nothing writes {name}"


def name_parts(call: ast.Call) -> list[ast.expr]:
    """The pieces of the name that a call of `Metric` gives: one constant, or those of an f-string."""
    name = call.args[0]
    return name.values if isinstance(name, ast.JoinedStr) else [name]
