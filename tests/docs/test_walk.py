"""The walks of cluster/README.md: every hop is a function that exists, the one above it calls it, and none calls upwards."""

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
NAMELESS = {"__call__": "an object is called", "receive_weights": "vLLM calls it in its worker"}
Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
WALK = (
    read(REPOSITORY / "cluster" / "README.md").partition("## The way of a trajectory")[2].partition("## Equal bits")[0]
)
HOPS = [(len(m[1]) // 2, m[2], m[3]) for line in WALK.splitlines() if (m := HOP.match(line))]


def parsed(file: str) -> ast.Module:
    """A file of cluster/ or of the repository; one that is not there is empty."""
    path = next((p for p in (REPOSITORY / "cluster" / file, REPOSITORY / file) if p.is_file()), None)
    return ast.parse(path.read_text(encoding="utf-8") if path else "")


def defined(file: str, name: str) -> Defined | None:
    """A function, or a class and its method, if the file has it."""
    body: list[ast.stmt] = parsed(file).body
    found = None
    for part in name.split("."):
        found = next((node for node in body if isinstance(node, Defined) and node.name == part), None)
        if found is None:
            return None
        body = found.body
    return found


def named(node: ast.AST) -> set[str]:
    """Every name in a piece of code; a text counts as one, since vLLM's workers are called by texts."""
    keys = {ast.Name: "id", ast.Attribute: "attr", ast.Constant: "value"}
    return {str(getattr(one, keys[type(one)])) for one in ast.walk(node) if type(one) in keys}


def called(file: str, name: str) -> set[str]:
    """What a function names, and what the private functions of its file do that it comes to."""
    private = {n.name: n for n in ast.walk(parsed(file)) if isinstance(n, Defined) and n.name.startswith("_")}
    found: set[str] = set()
    waiting = [node] if (node := defined(file, name)) else []
    while waiting:
        new = named(waiting.pop()) - found
        found |= new
        waiting += [private[one] for one in sorted(new & private.keys())]
    return found


def strays(hops: list[tuple[int, str, str]]) -> list[str]:
    """Hops that the function which they are indented under does not call by name."""
    wrong: list[str] = []
    above: list[tuple[str, str]] = []
    for depth, file, name in hops:
        last = name.rpartition(".")[2]
        if depth and last not in NAMELESS and last not in called(*above[depth - 1]):
            wrong.append(f"{file}:{name}")
        above[depth:] = [(file, name)]
    return wrong


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
    assert defined(file, name)


def test_no_hop_calls_a_room_above_its_own() -> None:
    assert climbs(HOPS) == []
    assert all(after <= before + 1 for (before, *_), (after, *_) in pairwise(HOPS))


def test_every_hop_is_called_by_the_one_above_it() -> None:
    assert strays(HOPS) == []


def test_a_hop_upwards_would_be_seen() -> None:
    down = (
        (0, "fleet/learner.py", "call"),
        (1, "actors/learner.py", "update"),
        (2, "align/learner/learner.py", "update"),
    )
    assert climbs([*down, (1, "fleet/learner.py", "again"), (0, "loop/loop.py", "next")]) == []
    assert climbs([*down, (3, "loop/loop.py", "roll_out")]) == ["loop/loop.py:roll_out"]
    assert not defined("loop/loop.py", "no_such_name") and not defined("loop/nowhere.py", "roll_out")


def test_a_hop_under_a_wrong_parent_would_be_seen() -> None:
    update = (0, "align/learner/learner.py", "Learner.update")
    gradient, states = (1, "align/learner/gradient.py", "Gradient.add"), ("align/model/policy.py", "Policy.states")
    assert strays([update, gradient, (2, *states)]) == [], "by way of private functions"
    assert strays([update, (1, *states)]) == ["align/model/policy.py:Policy.states"]
    gap = ("fleet/canary.py", "canary_gap")
    publish, check = (0, "fleet/publication.py", "FleetHandle.publish"), (1, "fleet/canary.py", "Canary.check")
    assert strays([publish, check, (1, *gap)]) == ["fleet/canary.py:canary_gap"]
    commit, load = "actors/engine/engine.py:Engine.commit", "actors/engine/engine.py:Engine.load"
    fingerprint = (1, "actors/engine/receiver.py", "WorkerExtension.align_loaded_fingerprint")
    assert [len(strays([(0, *name.split(":")), fingerprint])) for name in (commit, load)] == [0, 1]
