"""What `make` installs beside the lock of the CPU build: every version pinned, and nothing that the lock has."""

from __future__ import annotations

import re

from tests.places import DEPLOY

REQUIREMENTS = DEPLOY / "requirements"


def lines(name: str) -> list[str]:
    """The lines of a file of requirements that are no comments."""
    text = (REQUIREMENTS / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def name_of(line: str) -> str:
    """The package of a line, spelled as all spellings of it are compared."""
    found = re.match(r"[\w.-]+", line)
    assert found, line
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def test_the_extra_for_tasks_is_pinned_line_by_line_and_changes_nothing_that_the_lock_installs() -> None:
    tasks = lines("tasks.txt")
    assert [line for line in tasks if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    names = {name_of(line) for line in tasks}
    assert "reasoning-gym" in names
    locked = {name_of(line) for line in lines("cpu.txt")}
    assert "torch" in locked
    assert names & locked == set()
