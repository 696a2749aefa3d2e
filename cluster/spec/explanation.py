"""What is wrong with a run file, in words that name the key and the nearest one that exists."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel


def explain(error: Any, root: type[BaseModel]) -> str:
    """One of pydantic's errors about a config of type `root` in our words: the place, what was expected, what came."""
    place = ".".join(_follow(root, error["loc"])[0])
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {place!r}{_nearest(root, error['loc'])}"
        case "missing":
            return f"{place!r} is missing"
        case "value_error":
            return f"{place + ': ' if place else ''}{error['ctx']['error']}"
        case "union_tag_invalid" | "union_tag_not_found":
            key, kinds = error["ctx"]["discriminator"].strip("'"), error["ctx"].get("expected_tags")
            return f"{place}.{key} is one of: {kinds}" if kinds else f"'{place}.{key}' is missing"
    return f"{place}: {error['msg']}, got {error['input']!r}"


def _nearest(root: type[BaseModel], location: tuple[Any, ...]) -> str:
    names = list(dict.fromkeys(name for model in _follow(root, location[:-1])[1] for name in model.model_fields))
    if not names:
        return ""
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"


def _follow(root: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys of one of pydantic's locations, without the names of kinds that it puts between them; and the models there."""
    keys: list[str] = []
    models: list[type[BaseModel]] = [root]
    for part in location:
        if chosen := [model for model in models if part in _kinds(model)]:
            models = chosen
            continue
        keys.append(str(part))
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models_in(field.annotation)]
    return keys, models


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """The value of the key that tells this model from the others of its section, if there is one."""
    fields = (model.model_fields.get(key) for key in ("kind", "generator"))
    return tuple(value for field in fields if field for value in get_args(field.annotation))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
