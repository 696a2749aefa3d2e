"""The documents of the repository, and the generated parts in them, between `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.places import REPOSITORY

ROOTS = (".github", "align", "cluster", "tests", "deploy")
PART = re.compile(r"<!-- ([\w-]+):begin -->\n(.*?)<!-- \1:end -->", re.S)


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    below = [path for root in ROOTS for path in (REPOSITORY / root).rglob("*.md")]
    return sorted([REPOSITORY / "README.md", *below])


def read(path: Path) -> str:
    """The text of a document."""
    return path.read_text(encoding="utf-8")


def parts_in(text: str) -> dict[str, str]:
    """The generated parts of a text by name, each without its markers."""
    return {match[1]: match[2] for match in PART.finditer(text)}


def with_parts(text: str, parts: Mapping[str, str]) -> str:
    """The text with each of its parts as `parts` has it.

    Raises:
        KeyError: If the text has a part that `parts` does not know.
    """

    def anew(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name}:begin -->\n{parts[name]}\n<!-- {name}:end -->"

    return PART.sub(anew, text)


def table(head: str, rows: list[str]) -> str:
    """A Markdown table of lines that begin and end with a bar."""
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def cell(text: str) -> str:
    """The text as a cell of a table, where a bar would end it."""
    return text.replace("|", r"\|")
