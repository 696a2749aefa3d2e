"""What `kubectl kustomize` makes of the folders in deploy/kuberay: resources of resources, and JSON patches (RFC 6902)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization, patched.

    Raises:
        ValueError: If the kustomization says what this builder does not know, or a patch hits nothing.
    """
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(content) - {"apiVersion", "kind", "resources", "patches"}:
        raise ValueError(f"{folder}: {unknown}")
    objects: list[Object] = []
    for name in content["resources"]:
        path = folder / name
        objects += build(path) if path.is_dir() else [o for o in yaml.safe_load_all(path.read_text()) if o]
    for entry in content.get("patches", []):
        hit = [o for o in objects if selected(o, entry["target"])]
        if not hit:
            raise ValueError(f"{folder}: no object is {entry['target']}")
        for target in hit:
            for operation in yaml.safe_load((folder / entry["path"]).read_text()):
                apply(target, operation)
    return objects


def selected(target: Object, by: Object) -> bool:
    assert set(by) <= {"kind", "name"}
    return target["kind"] == by["kind"] and target["metadata"]["name"] == by.get("name", target["metadata"]["name"])


def apply(target: Object, operation: Object) -> None:
    """One operation of RFC 6902: add, replace or remove.

    Raises:
        ValueError: If the place is not there (add: the place above it).
    """
    *above, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].lstrip("/").split("/")]
    place: Any = target
    try:
        for part in above:
            place = place[int(part)] if isinstance(place, list) else place[part]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{operation['path']}: nothing at {error}") from None
    if isinstance(place, list):
        _apply_to_list(place, last, operation)
    elif operation["op"] != "add" and last not in place:
        raise ValueError(f"{operation['path']}: nothing to {operation['op']}")
    elif operation["op"] == "remove":
        del place[last]
    else:
        place[last] = operation["value"]


def _apply_to_list(place: list[Any], last: str, operation: Object) -> None:
    if operation["op"] == "add":
        place.insert(len(place) if last == "-" else int(last), operation["value"])
    elif operation["op"] == "replace":
        place[int(last)] = operation["value"]
    else:
        del place[int(last)]
