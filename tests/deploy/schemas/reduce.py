"""Makes `kuberay.json` of the custom resource definitions that the KubeRay operator publishes.

    python -m tests.deploy.schemas.reduce FOLDER

FOLDER holds the operator's `ray.io_rayjobs.yaml` and `ray.io_rayclusters.yaml`, or both as `.gz`. What is kept of a kind is its
schema of version v1 without descriptions, in the words of JSON schema, and closed: a field that it does not name is an error.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
REDUCED = Path(__file__).with_name("kuberay.json")
KINDS = ("RayCluster", "RayJob")
LEAST = 160
"""Characters of a part that is written once and referred to where it stands again."""
_VALUES = ("enum", "default", "required")


def published(folder: Path, kind: str) -> Schema:
    """The operator's own schema of a kind."""
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    text = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    versions = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    found: Schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    found["properties"]["metadata"] = {"type": "object"}
    return found


def closed(part: Any) -> Any:
    """Kubernetes' dialect of a schema as JSON schema, without descriptions."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    open_end = part.get("x-kubernetes-preserve-unknown-fields", False)
    either = part.get("x-kubernetes-int-or-string", False)
    found = {key: value if key in _VALUES else closed(value) for key, value in part.items() if _is_kept(key, value)}
    if either:
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if part.get("type") == "object" and "properties" in part and not open_end:
        found.setdefault("additionalProperties", False)
    return found


def _is_kept(key: str, value: Any) -> bool:
    """A description is a text; a field may have that name too, and is a schema."""
    return not key.startswith("x-kubernetes") and not (key == "description" and isinstance(value, str))


def shared(part: Any, counts: Counter[str], parts: dict[str, Schema]) -> Any:
    """The same, with a reference for every large part that stands in several places."""
    if isinstance(part, list):
        return [shared(item, counts, parts) for item in part]
    if not isinstance(part, dict):
        return part
    key = json.dumps(part, sort_keys=True)
    inner = {name: shared(value, counts, parts) for name, value in part.items()}
    is_schema = isinstance(part.get("type"), str) or "anyOf" in part  # a field may be named "type", and is a schema
    if len(key) < LEAST or counts[key] < 2 or not is_schema:
        return inner
    names = [name for name, known in parts.items() if known == inner] or [f"part{len(parts)}"]
    parts[names[0]] = inner
    return {"$ref": f"#/$defs/{names[0]}"}


def count(part: Any, counts: Counter[str]) -> None:
    """How often each object stands in a schema."""
    if isinstance(part, dict):
        counts[json.dumps(part, sort_keys=True)] += 1
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        count(inner, counts)


def reduced(folder: Path) -> Schema:
    """One schema with a definition for each kind."""
    kinds = {kind: closed(published(folder, kind)) for kind in KINDS}
    counts: Counter[str] = Counter()
    count(kinds, counts)
    parts: dict[str, Schema] = {}
    definitions = {kind: shared(schema, counts, parts) for kind, schema in kinds.items()}
    return {"$defs": definitions | parts}


if __name__ == "__main__":
    REDUCED.write_text(json.dumps(reduced(Path(sys.argv[1])), separators=(",", ":")) + "\n")
