"""Who imports whom, read from the syntax of a tree: every import counts, also inside functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

Edges = Mapping[str, set[str]]
"""The modules that each module imports, by their dotted names."""


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax of a file; treat it as read-only."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def python_files(root: Path, packages: Sequence[str]) -> list[Path]:
    """All files of the packages in a tree, sorted."""
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def module_of(path: Path, root: Path) -> str:
    """`cluster/loop/buffer.py` is "cluster.loop.buffer"; an `__init__.py` is its package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named_by(node: ast.AST) -> Iterator[str]:
    """The modules that one import statement names, those of `from package import module` spelled out too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used here"
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere."""
    return frozenset(name for node in ast.walk(parsed(path)) for name in named_by(node))


def imports_at_the_top(path: Path) -> set[str]:
    """What is imported when the file is, less what is under `if TYPE_CHECKING`."""
    return {name for node in parsed(path).body for name in named_by(node)}


def modules_in(root: Path, packages: Sequence[str]) -> dict[str, Path]:
    """The modules of the packages in a tree; a room's `__init__.py` says one sentence and counts for nothing."""
    return {module_of(path, root): path for path in python_files(root, packages) if path.name != "__init__.py"}


def edges_among(modules: Mapping[str, Path]) -> Edges:
    """The imports among modules that lie in these files."""
    return {name: {other for other in imports(path) if other in modules} for name, path in modules.items()}


def circles(edges: Edges) -> list[str]:
    """The modules that import themselves by way of others (or at once)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*edges[start]]
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += edges[name]
        return seen

    return [name for name in edges if name in reached(name)]


def room_of(module: str) -> str:
    """`cluster.record.sinks.jsonl` is in the room "cluster.record"; what lies in no room is one by itself."""
    return ".".join(module.split(".")[:2])


def climbs(edges: Edges, may_import: Mapping[str, set[str]]) -> list[str]:
    """The imports from room to room that a table does not allow, as "importer -> imported".

    Args:
        edges: The imports.
        may_import: For every room the others that it may import.
    """
    return sorted(
        f"{module} -> {other}"
        for module, others in edges.items()
        for other in others
        if room_of(other) != room_of(module) and room_of(other) not in may_import.get(room_of(module), set())
    )
