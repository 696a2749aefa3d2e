"""The files of a package, room by room, each with the first sentence of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.docs.documents import cell, table
from tests.places import REPOSITORY


def modules(package: str, leave_out: tuple[str, ...] = ()) -> str:
    """A table of every file of a package but those of some of its folders, in the order of their paths."""
    root = REPOSITORY / package
    files = [path for path in root.rglob("*.py") if path.name != "__init__.py"]
    paths = [path for path in files if path.relative_to(root).parts[0] not in leave_out]
    order = sorted(paths, key=lambda path: (len(path.relative_to(root).parts) > 1, path.relative_to(root).parts))
    return table("| file | what is in it |", [f"| `{path.relative_to(root)}` | {about(path)} |" for path in order])


def about(path: Path) -> str:
    """The first line of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return cell(" ".join(text.partition("\n\n")[0].split()))
