"""The reference of all settings names every key once, with its type, bounds, default, unit and meaning."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from cluster.spec.config import RunConfig
from tests.docs.settings import KINDS, meaning, models_in, row, settings

TEXT = settings()


class Inner(BaseModel):
    """A section below."""

    width_bytes: int = Field(1 << 20, ge=1, description="Its width.")


class Outer(BaseModel):
    """A section."""

    needed_s: float = Field(gt=0, le=5, description="A | B.")
    inner: Inner | None = Field(None, description="What is below.")
    way: Literal["left", "right"] = Field("left", description="Where to go.\nleft: to the left\nright: not there")
    bare: Literal["one", "two"] = Field("one", description="Which.")
    pair: tuple[float, float] = Field((0.5, 1e-05), description="Two.")


def line(name: str) -> str:
    return row(name, Outer.model_fields[name], "outer", {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("needed_s", r"| `needed_s` | number > 0, ≤ 5 | **needed** | s | A \| B. |"),
        ("inner", "| `inner` | section, as `[outer.inner]` | – |  | What is below. |"),
        ("way", '| `way` | choice | `"left"` |  | Where to go.<br>`left`: to the left<br>`right`: not there |'),
        ("bare", '| `bare` | choice | `"one"` |  | Which.<br>`one`<br>`two` |'),
        ("pair", "| `pair` | 2 numbers | `[0.5, 1e-5]` |  | Two. |"),
    ],
)
def test_a_key_is_one_line_with_all_that_is_known_of_it(name: str, expected: str) -> None:
    assert line(name) == expected


def test_a_section_that_stands_elsewhere_is_named_by_that_place() -> None:
    assert "section, as `[elsewhere]`" in row("inner", Outer.model_fields["inner"], "outer", {Inner: "elsewhere"})


def test_bytes_are_written_so_that_they_can_be_read() -> None:
    assert row("width_bytes", Inner.model_fields["width_bytes"], "", {}).endswith(
        "| `1_048_576` | bytes | Its width. |"
    )


def fields(model: type[BaseModel], seen: set[type[BaseModel]]) -> list[tuple[str, FieldInfo]]:
    """Every key of the run file, each model once."""
    found: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        found.append((name, field))
        for inner in models_in(field.annotation):
            if inner not in seen:
                seen.add(inner)
                found += fields(inner, seen)
    return found


def test_every_key_of_the_run_file_is_in_the_reference() -> None:
    every = [name for name, _ in fields(RunConfig, set())]
    sections = [name for name in every if f"### `[{name}]`" in TEXT]
    assert len(sections) >= len(RunConfig.model_fields)
    shown = re.findall(r"^\| `(\w+)` \|", TEXT, re.M)
    assert sorted({*shown, *KINDS, *RunConfig.model_fields}) == sorted({*every, *KINDS})


def test_the_kinds_of_a_section_stand_once_before_the_first_of_them() -> None:
    before, first, _ = TEXT.partition('### `[reward]`, kind = "reference"')
    _, head, about = before.partition("### `[reward]`\n\n")
    assert first and head
    lead, kinds = about.strip().split("\n\n")
    assert lead.startswith("What is paid;")
    assert re.findall(r"^\* `(\w+)`: ", kinds, re.M) == re.findall(r'^### `\[reward\]`, kind = "(\w+)"$', TEXT, re.M)
    assert TEXT.count(lead) == 1


def test_every_line_between_the_tables_is_a_head_a_sentence_or_a_kind_with_its_code_mark() -> None:
    texts = [line for line in TEXT.splitlines() if line and not line.startswith(("|", "### `["))]
    assert [line for line in texts if not re.match(r"\* `\w+`: |`R_t = |[A-Z0-9]", line)] == []
    assert [line for line in texts if re.search(r"\. *\w+: ", line)] == []


def test_a_name_that_is_explained_is_marked_as_code_whatever_the_type_of_its_key() -> None:
    told = [part for cells in re.findall(r"^\|.*<br>.*\|$", TEXT, re.M) for part in cells.strip(" |").split("<br>")[1:]]
    assert len(told) > 80
    assert [part for part in told if not re.match(r"`[\w+-]+`(: |$)", part)] == []


def test_every_key_says_what_it_means() -> None:
    assert [
        name for name, field in fields(RunConfig, set()) if name not in RunConfig.model_fields and not meaning(field)
    ] == []
