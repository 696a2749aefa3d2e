"""Every setting that is one of a few names says what each of them means, one a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from align.demo.judges import JUDGES
from cluster.spec.config import RunConfig
from cluster.spec.sections import EvaluationSection


def parts_of(annotation: Any) -> Iterator[Any]:
    """The annotation and all that it is made of."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from parts_of(part)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    return [part for part in parts_of(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def models_below(root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The model and every model that its fields lead to, by name."""
    found: dict[str, type[BaseModel]] = {}
    waiting = [root]
    while waiting:
        model = waiting.pop()
        if model.__name__ not in found:
            found[model.__name__] = model
            waiting += [one for field in model.model_fields.values() for one in models_in(field.annotation)]
    return found


def fields_below(root: type[BaseModel]) -> dict[str, FieldInfo]:
    """All fields of these models, as `Model.field`."""
    models = models_below(root).items()
    return {f"{name}.{key}": field for name, model in models for key, field in model.model_fields.items()}


def kind_of(model: type[BaseModel]) -> str | None:
    """What tells the model from the others of its section: the one name that a field of it can have."""
    names = [names_in(field.annotation) for field in model.model_fields.values() if is_kind(field)]
    return names[0][0] if names else None


def is_kind(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def names_in(annotation: Any) -> list[str]:
    return [name for part in parts_of(annotation) if get_origin(part) is Literal for name in get_args(part)]


def choices_of(field: FieldInfo) -> list[str]:
    """The names that a field may have; of one whose sections are told apart by a kind, the kinds."""
    if is_kind(field):
        return []
    return [*names_in(field.annotation), *filter(None, map(kind_of, models_in(field.annotation)))]


def explained(field: FieldInfo) -> list[str]:
    """The names that lines of the description begin with, those with nothing behind them left out."""
    lines = [line.partition(": ") for line in (field.description or "").splitlines()[1:]]
    return [name for name, _, meaning in lines if meaning]


def unexplained(root: type[BaseModel]) -> dict[str, list[str]]:
    """The choices of the fields whose descriptions have other lines than one for each of them; by field."""
    found = {place: (choices_of(field), explained(field)) for place, field in fields_below(root).items()}
    return {place: names for place, (names, lines) in found.items() if names and names != lines}


def test_every_choice_of_every_setting_has_a_line_of_its_own() -> None:
    assert unexplained(RunConfig) == {}


def test_the_settings_that_are_looked_at_are_those_with_choices() -> None:
    looked_at = {place for place, field in fields_below(RunConfig).items() if choices_of(field)}
    assert len(looked_at) > 20
    assert {
        *("AlgorithmConfig.name", "AlgorithmConfig.aggregation", "AdapterConfig.kind", "AdapterConfig.target_modules"),
        *("RunConfig.reward", "WeightedConfig.reward", "PromptConfig.tasks", "WandbConfig.artifacts"),
    } <= looked_at
    assert not looked_at & {"ExactMatchConfig.kind", "SumsConfig.generator"}


def test_every_judge_has_a_line_of_its_own() -> None:
    assert explained(EvaluationSection.model_fields["judge"]) == list(JUDGES)


@pytest.mark.parametrize(
    "description",
    [
        "What.",
        "What: a or b",
        "What.\na: one",
        "What.\na: one\nb:",
        "What.\nb: two\na: one",
        "What.\na: one\nb: two\nc: three",
    ],
)
def test_a_choice_without_its_line_is_found(description: str) -> None:
    class Planted(BaseModel):
        setting: Literal["a", "b"] | None = Field(None, description=description)

    class Root(BaseModel):
        section: tuple[Planted, ...] = Field((), description="Sections.")

    assert unexplained(Root) == {"Planted.setting": ["a", "b"]}
