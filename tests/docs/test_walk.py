"""The walks of cluster/README.md: every hop is a function that exists, and none calls a room above its caller's."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

import pytest

from tests.docs.documents import documents, read
from tests.places import REPOSITORY

HOP = re.compile(r"^( *)\* `([\w/]+\.py):([\w.]+)`")
NAMED = re.compile(r"`([\w/]+\.py):([\w.]+)`")
# From the top: the loop drives the fleet by protocols, the fleet the actors, the actors the record and the algorithm.
DOWN = {
    "loop": 0,
    "fleet": 1,
    "actors": 2,
    "record": 3,
    "rewards": 3,
    "learner": 3,
    "algorithm": 4,
    "model": 4,
    "data": 5,
}
WALK = (
    read(REPOSITORY / "cluster" / "README.md").partition("## The way of a trajectory")[2].partition("## Equal bits")[0]
)
HOPS = [(len(m[1]) // 2, m[2], m[3]) for line in WALK.splitlines() if (m := HOP.match(line))]


def exists(file: str, name: str) -> bool:
    """Whether a function, or a class and its method, is in a file of cluster/ or of the repository."""
    path = next((p for p in (REPOSITORY / "cluster" / file, REPOSITORY / file) if p.is_file()), None)
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body if path else []
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def room(file: str) -> str:
    """`actors` of actors/engine/engine.py, `learner` of align/learner/learner.py."""
    return file.removeprefix("align/").split("/")[0]


def climbs(hops: list[tuple[int, str, str]]) -> list[str]:
    """Hops that call a room above that of the hop they are indented under, or that are indented under none."""
    wrong, above = [], [-1]
    for depth, file, name in hops:
        level = DOWN[room(file)]
        if depth >= len(above) or level < above[depth]:
            wrong.append(f"{file}:{name}")
        above[depth + 1 :] = [level]
    return wrong


def test_both_walks_are_there_from_end_to_end() -> None:
    names = [name for _, _, name in HOPS]
    assert len(names) >= 40
    first, second = names[: names.index("FleetHandle.publish")], names[names.index("FleetHandle.publish") :]
    assert [
        name for name in ("roll_out", "Engine.generate", "Learner.update", "Optimizer.step") if name not in first
    ] == []
    assert [
        name for name in ("export_weights", "Engine.load", "canary_gap", "Buffer.release") if name not in second
    ] == []


@pytest.mark.parametrize(
    ("file", "name"), sorted({match for path in documents() for match in NAMED.findall(read(path))})
)
def test_a_function_that_a_document_names_exists(file: str, name: str) -> None:
    assert exists(file, name)


def test_no_hop_calls_a_room_above_its_own() -> None:
    assert climbs(HOPS) == []
    assert all(after <= before + 1 for (before, *_), (after, *_) in pairwise(HOPS))


def test_a_hop_upwards_would_be_seen() -> None:
    down = (
        (0, "fleet/handles.py", "call"),
        (1, "actors/learner.py", "update"),
        (2, "align/learner/learner.py", "update"),
    )
    assert climbs([*down, (1, "fleet/handles.py", "again"), (0, "loop/loop.py", "next")]) == []
    assert climbs([*down, (3, "loop/loop.py", "roll_out")]) == ["loop/loop.py:roll_out"]
    assert not exists("loop/loop.py", "no_such_name") and not exists("loop/nowhere.py", "roll_out")
