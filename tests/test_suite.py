"""The suite itself: tests stand where their code stands, and none leans on another."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

import pytest

from tests.harness.imports import imports, parsed
from tests.places import REPOSITORY

TESTS = REPOSITORY / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))
MIRRORED = [path for room in ("align", "cluster") for path in sorted((TESTS / room).rglob("test_*.py"))]
TOPICS = {
    "align/algorithm/test_gae.py": "advantages of a critic, of returns.py",
    "align/algorithm/test_policy_gradient.py": "the gradient of the whole objective, by enumeration",
    "align/algorithm/test_unbiased.py": "its expectation, by enumeration",
    "align/learner/test_adapter_ranks.py": "ranks.py with an adapter",
    "align/learner/test_equivalence.py": "configs that must give one curve",
    "align/learner/test_inner_ranks.py": "ranks.py with inner epochs and a critic",
    "align/learner/test_knobs.py": "what saves memory or time and changes nothing",
    "align/learner/test_parts.py": "parts of the objective by way of the learner",
    "align/learner/test_ranks.py": "the learner on the ranks of model/ranks.py",
    "align/model/test_families.py": "every family of models through all of the room",
    "cluster/record/sinks/wandb/test_record.py": "all sinks of W&B over the processes of a run",
    "cluster/spec/test_choices.py": "what the settings of a run say of their choices",
    "align/model/test_residuals.py": "what a backward pass keeps",
}
"""Test files whose name is a topic and not a file of code."""
LEAST_LINES = 7
"""Of a set-up that two files may not both spell out."""


def of_tests(modules: Iterable[str]) -> list[str]:
    """Those that are test files or the fixtures that pytest hands out."""
    return [
        name
        for name in modules
        if name.startswith("tests.") and any(part.startswith("test_") or part == "conftest" for part in name.split("."))
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_a_test_file(path: Path) -> None:
    assert of_tests(imports(path)) == []


def test_an_import_of_a_test_file_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from tests.align import test_metrics\n    from tests.conftest import policy\n")
    found = of_tests(imports(planted))
    assert sorted(found) == ["tests.align.test_metrics", "tests.conftest", "tests.conftest.policy"]


@pytest.mark.parametrize("path", MIRRORED, ids=lambda path: str(path.relative_to(TESTS)))
def test_a_test_file_stands_where_its_code_stands(path: Path) -> None:
    place = path.relative_to(TESTS)
    noun = path.stem.removeprefix("test_")
    code = REPOSITORY / place.parent / f"{noun}.py"
    room = REPOSITORY / place.parent / noun / "__init__.py"
    assert code.is_file() or room.is_file() or str(place) in TOPICS, f"there is no {code.relative_to(REPOSITORY)}"


def test_every_topic_has_its_file_and_no_code_of_its_name() -> None:
    for place in TOPICS:
        assert (TESTS / place).is_file(), place
        assert not (REPOSITORY / place.replace("test_", "")).exists(), place


def set_ups(path: Path) -> Iterator[str]:
    """Bodies of the functions of a test file that are no tests, as text without names of their own, and long enough."""
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and "test_" not in node.name:
            text = "\n".join(ast.unparse(statement) for statement in node.body if not _is_text(statement))
            if text.count("\n") + 1 >= LEAST_LINES:
                yield text


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def test_no_two_test_files_spell_out_one_set_up() -> None:
    found = {path: set(set_ups(path)) for path in FILES}
    both = [(a, b) for a, b in combinations(FILES, 2) if found[a] & found[b]]
    assert [[str(path.relative_to(TESTS)) for path in pair] for pair in both] == []
