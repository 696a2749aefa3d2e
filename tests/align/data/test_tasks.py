"""Generated tasks: seeded, right, and read like the rows of a file."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from align.data import tasks
from align.data.prompts import PromptConfig, load_prompts
from align.data.tasks import GymConfig, SumsConfig, TaskSection, task_rows


def sums(**settings: int) -> list[tuple[int, int, int]]:
    """(first term, second term, answer) of every row."""
    found = []
    for _, row in task_rows(SumsConfig(**settings)):
        match = re.fullmatch(r"(\d+) \+ (\d+) =", row["prompt"])
        assert match
        found.append((int(match[1]), int(match[2]), int(row["answer"])))
    return found


def test_every_answer_is_the_sum() -> None:
    rows = sums(size=500, seed=3)
    assert len(rows) == 500
    assert all(first + second == answer for first, second, answer in rows)


def test_numbers_of_every_length_are_as_frequent_and_both_of_a_question_have_one_length() -> None:
    rows = sums(size=3000, seed=0, max_digits=3)
    assert all(len(str(first)) == len(str(second)) for first, second, _ in rows)
    shares = [sum(len(str(first)) == digits for first, _, _ in rows) / len(rows) for digits in (1, 2, 3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)
    for digits, least in ((1, 0), (2, 10), (3, 100)):
        terms = [term for first, second, _ in rows for term in (first, second) if len(str(term)) == digits]
        assert min(terms) - least < 5 and 10**digits - max(terms) <= 5


def test_a_seed_always_gives_the_same_questions_and_another_seed_others() -> None:
    assert sums(size=20, seed=5) == sums(size=40, seed=5)[:20]
    assert sums(size=20, seed=5) != sums(size=20, seed=6)


def test_rows_go_through_the_same_template_as_those_of_a_file(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = PromptConfig(tasks=SumsConfig(size=2, seed=1), template="sum: {prompt} answer {answer}")
    prompts = load_prompts(cfg, tokenizer, 200)
    rows = [row for _, row in task_rows(SumsConfig(size=2, seed=1))]
    assert [prompt.text for prompt in prompts] == [f"sum: {row['prompt']} answer {row['answer']}" for row in rows]
    assert [prompt.metadata["answer"] for prompt in prompts] == [row["answer"] for row in rows]
    assert [prompt.id for prompt in prompts] == ["prompt-0", "prompt-1"]


def test_a_task_that_is_too_long_is_named_by_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"sums 0: the prompt has .* tokens, at most 2 fit"):
        load_prompts(PromptConfig(tasks=SumsConfig(size=2)), tokenizer, 2)


@pytest.mark.parametrize(
    "content",
    [{"generator": "sums"}, {"size": 3}, {"generator": "products", "size": 3}, {"generator": "sums", "size": 0}],
)
def test_a_section_that_names_no_task_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TaskSection).validate_python(content)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"No module named 'reasoning_gym'.*align\[tasks\]"):
        tasks.reasoning_gym()


# --- with reasoning-gym -------------------------------------------------------------------------------------------


@pytest.fixture
def gym() -> Any:
    return pytest.importorskip("reasoning_gym", reason="the extra 'tasks' is not installed")


def test_entries_of_reasoning_gym_become_rows_with_the_whole_entry(gym: Any) -> None:
    options = {"min_terms": 2, "max_terms": 2, "max_digits": 2}
    rows = list(task_rows(GymConfig(dataset="chain_sum", options=options, size=5, seed=4)))
    expected = gym.create_dataset("chain_sum", size=5, seed=4, **options)
    assert [place for place, _ in rows] == [f"reasoning-gym chain_sum {index}" for index in range(5)]
    assert [row["entry"] for _, row in rows] == list(expected)
    assert [(row["prompt"], row["answer"]) for _, row in rows] == [(e["question"], e["answer"]) for e in expected]


@pytest.mark.parametrize(
    ("dataset", "options"),
    [("chain_sums", {}), ("chain_sum", {"max_term": 2}), ("chain_sum", {"min_terms": 0}), ("chain_sum", {"size": 3})],
)
def test_a_task_or_an_option_that_reasoning_gym_does_not_know_is_named(
    gym: Any, dataset: str, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=f"reasoning-gym refuses the task '{dataset}'"):
        list(task_rows(GymConfig(dataset=dataset, options=options, size=5)))
