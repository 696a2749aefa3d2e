"""The reference of all settings of a run file, from the models that read it."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.spec.config import RunConfig
from tests.docs.documents import cell, table

Model = type[BaseModel]
UNITS = {"_s": "s", "_bytes": "bytes", "tokens": "tokens", "_tokens_per_micro_batch": "tokens", "_steps": "steps"}
WORDS = {str: "text", Path: "path", int: "integer", float: "number", bool: "true or false"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
KINDS = ("kind", "generator")  # keys that say which of several models a section is, where they have one value


def settings() -> str:
    """Every section with its keys, in the order of the run file."""
    return "\n\n".join(_sections(RunConfig, "", {}))


def _sections(model: Model, place: str, seen: dict[Model, str]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        models = [one for one in models_in(field.annotation) if one not in seen]
        path = f"{place}{name}"
        if not place and len(models) > 1:
            yield _kinds(path, field)
        for one in models:
            seen[one] = path
            yield _section(one, path, field, seen)
        for one in models:
            yield from _sections(one, f"{path}.", seen)


def _kinds(path: str, field: FieldInfo) -> str:
    """What a section at the top is about that may be one of several models, and what each of them means."""
    lead, *lines = description(field)
    return "\n".join([f"### `[{path}]`", "", lead, "", *(f"* {line}" for line in lines)])


def _section(model: Model, path: str, field: FieldInfo, seen: dict[Model, str]) -> str:
    name = f"[[{path}]]" if get_origin(field.annotation) is tuple else f"[{path}]"
    kind = kind_of(model)
    head = f"### `{name}`" + "".join(f', {key} = "{value}"' for key, value in kind.items())
    about = " ".join(str(model.__doc__).partition("\n\n")[0].split())
    if "." not in path and not kind and field.description:
        about += f" {description(field)[0]}"
    rows = [row(name, one, path, seen) for name, one in model.model_fields.items() if name not in kind]
    return f"{head}\n\n{about}" + (f"\n\n{table('| key | type | default | unit | meaning |', rows)}" if rows else "")


def row(name: str, field: FieldInfo, place: str, seen: dict[Model, str]) -> str:
    """One key: its type with its bounds, its default, the unit that its name ends with, its meaning."""
    models = models_in(field.annotation)
    sections = dict.fromkeys(seen.get(model, f"{place}.{name}") for model in models)
    kind = f"section, as {' or '.join(f'`[{section}]`' for section in sections)}" if models else _type(field)
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "")
    default = "" if models and field.default is not None else _default(field)
    return f"| `{name}` | {kind} | {default} | {unit} | {meaning(field)} |"


def meaning(field: FieldInfo) -> str:
    """The description, and each choice on a line of its own: `name: meaning`, or the name alone where it says no more."""
    return "<br>".join(map(cell, description(field)))


def description(field: FieldInfo) -> list[str]:
    """What a description says first, and then a line for each name that it explains or that the key may be."""
    lead, *lines = (field.description or "").splitlines() or [""]
    said = dict(line.split(": ", maxsplit=1) for line in lines)
    bare = [f"`{choice}`" for choice in choices_of(field.annotation) if choice not in said]
    return [lead, *(f"`{name}`: {meant}" for name, meant in said.items()), *bare]


def choices_of(annotation: Any) -> list[str]:
    """The strings that a key may be, if those are all that it may be or stand among other types."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) is Annotated:
        return choices_of(get_args(annotation)[0])
    return [choice for part in get_args(annotation) for choice in choices_of(part)]


def models_in(annotation: Any) -> list[Model]:
    """The models that a key may hold."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(model for part in get_args(annotation) for model in models_in(part)))


def kind_of(model: Model) -> dict[str, str]:
    """The key, and its one value, that tells this model from the others of its section; empty where there are no others."""
    fields = {key: choices_of(model.model_fields[key].annotation) for key in KINDS if key in model.model_fields}
    return {key: choices[0] for key, choices in fields.items() if len(choices) == 1}


def _type(field: FieldInfo) -> str:
    limits = [
        (sign, getattr(one, name)) for one in field.metadata for name, sign in BOUNDS.items() if hasattr(one, name)
    ]
    return " ".join([_word(field.annotation), ", ".join(f"{sign} {_toml(limit)}" for sign, limit in limits)]).strip()


def _word(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _word(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_word(part) for part in parts if part is not type(None))
    if origin is Literal:
        return "choice"
    if origin is tuple:
        return f"{'list of' if parts[-1] is Ellipsis else len(parts)} {_word(parts[0])}s"
    return "table" if origin is dict else WORDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    value = field.get_default(call_default_factory=True)
    return "–" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    return re.sub(r"e([+-])0*", r"e\1", repr(value)) if isinstance(value, float) else f'"{value}"'
