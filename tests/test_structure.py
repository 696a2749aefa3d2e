"""The shape of the code that DESIGN.md promises: who imports whom, how long things are, what they are called."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.imports import (
    Edges,
    circles,
    climbs,
    edges_among,
    imports,
    imports_at_the_top,
    module_of,
    modules_in,
    parsed,
    python_files,
    room_of,
)
from tests.places import REPOSITORY

PACKAGES = ("align", "cluster")
FILES = python_files(REPOSITORY, PACKAGES)
MODULES = modules_in(REPOSITORY, PACKAGES)
EDGES = edges_among(MODULES)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FILES_OF_A_ROOM = 400, 80, 16
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Which room may import which, from the top. The READMEs of both packages show the same tables.
ALIGN = {
    "learner": {"algorithm", "model", "data"},
    "algorithm": {"data"},
    "rewards": {"model", "data"},
    "demo": {"model", "data"},
    "model": {"data"},
    "data": set[str](),
}
CLUSTER = {
    "run": {"doctor", "fleet", "capacity", "spec", "actors", "views", "record", "loop"},
    "doctor": {"fleet", "capacity", "spec", "actors", "record", "loop"},
    "fleet": {"capacity", "spec", "actors", "record", "loop"},
    "jobs": {"capacity", "spec", "record"},
    "capacity": {"spec", "actors"},
    "spec": {"actors", "record", "loop"},
    "actors": {"record", "loop"},
    "views": {"record", "loop"},
    "record": {"loop"},
    "loop": set[str](),
}
# Modules beside the rooms: the command reaches all, and all may reach what is on the ground.
GROUND = {"align": {"choices", "digests", "extras", "metrics", "rules"}, "cluster": {"faults", "redaction"}}
TOP = {"cluster.cli"}

# The one place of each heavy package, and files elsewhere that cannot do without it.
HEAVY = {
    "ray": ("cluster/fleet/", "cluster/jobs/", "cluster/doctor/", "cluster/actors/engine/", "cluster/record/sinks/prometheus.py",
            "cluster/faults.py"),
    "vllm": ("cluster/actors/engine/",),
    "wandb": ("cluster/record/sinks/wandb/",),
}  # fmt: skip
# A rollout actor tells a dead engine from a bug by the exception's type; the import is inside that function.
LAZY = {("cluster/actors/rollout.py", "vllm.v1.engine.exceptions")}


def may_import() -> dict[str, set[str]]:
    """The tables with the names of modules, ground and top included."""
    beside_align, beside_cluster = ({f"{package}.{name}" for name in names} for package, names in GROUND.items())
    align = {f"align.{room}": {f"align.{other}" for other in others} | beside_align for room, others in ALIGN.items()}
    below = {f"align.{room}" for room in ALIGN} | beside_align | beside_cluster
    cluster = {f"cluster.{room}": {f"cluster.{other}" for other in others} | below for room, others in CLUSTER.items()}
    everything = {f"cluster.{room}" for room in CLUSTER} | below
    return {**align, **cluster, **dict.fromkeys(TOP, everything), "cluster.faults": {"cluster.redaction"}}


def place_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, Function))


# --- rooms -------------------------------------------------------------------------------------------------------


def test_every_module_is_in_a_room_of_the_tables_or_beside_them_by_name() -> None:
    beside = {f"{package}.{name}" for package, names in GROUND.items() for name in names} | TOP
    rooms = {f"align.{room}" for room in ALIGN} | {f"cluster.{room}" for room in CLUSTER}
    assert {room_of(module) for module in EDGES} == rooms | beside


def test_imports_between_rooms_go_one_way_inside_functions_too() -> None:
    assert sum(map(len, EDGES.values())) > 300
    assert climbs(EDGES, may_import()) == []


def test_no_module_imports_itself_by_way_of_others_inside_functions_too() -> None:
    assert circles(EDGES) == []


@pytest.mark.parametrize(("package", "table"), [("align", ALIGN), ("cluster", CLUSTER)])
def test_the_readme_of_a_package_shows_the_table_that_is_held_here(package: str, table: dict[str, set[str]]) -> None:
    readme = (REPOSITORY / package / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \| [^|]+ \| ([^|]*)\|$", readme, re.M)
    assert {room: set(re.findall(r"`(\w+)`", others)) for room, others in rows} == table
    assert [room for room, _ in rows] == list(table), "from the top"


def test_a_room_says_in_one_sentence_what_it_is_and_nothing_else() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            (only,) = parsed(path).body
            assert isinstance(only, ast.Expr), path
            sentence = ast.get_docstring(parsed(path)) or ""
            assert sentence.endswith(".") and "\n" not in sentence, path


def test_no_room_is_crowded() -> None:
    folders = {path.parent for path in FILES}
    sizes = {place_of(folder): len([*folder.glob("*.py")]) - 1 for folder in folders}
    assert max(sizes.values()) > 3
    assert {folder: size for folder, size in sizes.items() if size > MAX_FILES_OF_A_ROOM} == {}


# --- a test of these tests: what is planted is found ----------------------------------------------------------------


def edges_with(planted: Path) -> Edges:
    """The imports of the sources, with the files of another tree beside them or in their places."""
    return edges_among(MODULES | modules_in(planted, PACKAGES))


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        (
            "cluster/loop/buffer.py",
            "from cluster.fleet import placement",
            "cluster.loop.buffer -> cluster.fleet.placement",
        ),
        ("align/data/types.py", "import align.learner.learner", "align.data.types -> align.learner.learner"),
        ("align/metrics.py", "import align.data.types", "align.metrics -> align.data.types"),
        ("align/model/head.py", "import cluster.faults", "align.model.head -> cluster.faults"),
    ],
)
def test_a_forbidden_import_that_is_planted_in_a_function_is_found(
    tmp_path: Path, file: str, line: str, found: str
) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    source = (REPOSITORY / file).read_text(encoding="utf-8")
    planted.write_text(f"{source}\n\ndef planted() -> None:\n    {line}\n", encoding="utf-8")
    assert climbs(edges_with(tmp_path), may_import()) == [found]


def test_a_circle_within_a_room_that_is_planted_in_functions_is_found(tmp_path: Path) -> None:
    room = tmp_path / "cluster" / "loop"
    room.mkdir(parents=True)
    for name, other in (("here", "there"), ("there", "here")):
        (room / f"{name}.py").write_text(f"def planted():\n    from cluster.loop import {other}\n", encoding="utf-8")
    edges = edges_with(tmp_path)
    assert climbs(edges, may_import()) == []
    assert circles(edges) == ["cluster.loop.here", "cluster.loop.there"]


# --- heavy packages ----------------------------------------------------------------------------------------------


def importers(package: str) -> set[str]:
    """The files that import a package, the lazy exceptions left out."""
    found = set()
    for path in FILES:
        lazy = {module for file, module in LAZY if file == place_of(path)} - imports_at_the_top(path)
        for module in imports(path):
            allowed = any(module == name or module.startswith(f"{name}.") for name in lazy)
            if module.split(".")[0] == package and not allowed:
                found.add(place_of(path))
    return found


@pytest.mark.parametrize("package", HEAVY)
def test_each_heavy_package_is_imported_in_its_place_alone(package: str) -> None:
    found = importers(package)
    assert [file for file in found if not file.startswith(HEAVY[package])] == []
    for place in HEAVY[package]:
        assert any(file.startswith(place) for file in found), f"{place} does not import {package}: strike it"


def test_align_imports_neither_the_runtime_nor_what_belongs_to_it() -> None:
    for path in FILES:
        if place_of(path).startswith("align/"):
            packages = {module.split(".")[0] for module in imports(path)}
            assert not packages & {"cluster", "ray", "vllm", "wandb"}, path


def test_importing_the_algorithm_the_config_and_the_loop_loads_no_ray_no_vllm_and_no_wandb() -> None:
    light = ("align/", "cluster/loop/", "cluster/capacity/")
    modules = [module_of(path, REPOSITORY) for path in FILES if place_of(path).startswith(light)]
    code = f"import sys, cluster.spec.config, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300
    )
    names = {name.split(".")[0] for name in loaded.stdout.split()}
    assert {"align", "cluster"} <= names
    assert not names & {"ray", "vllm", "wandb"}


def test_the_loop_imports_no_torch_either() -> None:
    for path in (REPOSITORY / "cluster" / "loop").glob("*.py"):
        assert not {module.split(".")[0] for module in imports(path)} & {"torch", "ray", "vllm", "wandb"}, path


# --- size and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_no_file_is_too_long_and_none_of_its_functions(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES
    lengths = {function.name: int(function.end_lineno or 0) - function.lineno + 1 for function in functions(path)}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_most_files_are_a_page_or_three_and_few_are_long() -> None:
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in FILES if path.name != "__init__.py"]
    assert statistics.median(lengths) <= 180
    assert sum(length > 300 for length in lengths) <= len(lengths) / 10


def test_no_file_and_no_folder_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    names = {part.removesuffix(".py") for path in FILES for part in path.relative_to(REPOSITORY).parts}
    assert "returns" in names
    assert not names & empty


def test_no_class_has_a_name_that_says_nothing() -> None:
    classes = [node.name for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]
    assert "Learner" in classes
    assert [name for name in classes if name.endswith(("Manager", "Handler", "Helper", "Util", "Utils", "Base"))] == []


def test_every_public_name_of_align_has_a_docstring() -> None:
    missing = []
    for path in FILES:
        if not place_of(path).startswith("align/"):
            continue
        owners = [parsed(path), *(n for n in parsed(path).body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
        for owner in owners:
            public = [n for n in owner.body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]
            missing += [f"{path.name}: {node.name}" for node in (owner, *public) if not ast.get_docstring(node)]
    assert missing == []


# --- pure functions ----------------------------------------------------------------------------------------------

NUMBERS_AND_TENSORS = {"Tensor", "Tensor | None", "float", "int", "bool", "str", "Sampling"}
MAY_READ = ("align.data.sampling", "align.algorithm.spread")  # three numbers under one name, and one number
IMPURE = {
    *("rand", "randn", "randint", "rand_like", "randn_like", "randperm", "random", "default_rng"),
    *("multinomial", "bernoulli", "normal", "uniform", "dropout", "manual_seed", "Generator", "sample", "shuffle"),
    *("cuda", "cpu", "all_reduce", "all_gather", "broadcast", "barrier", "distributed"),
}
PURE = (
    *("algorithm/returns", "algorithm/surrogates", "algorithm/corrections", "algorithm/losses", "algorithm/guards"),
    *("algorithm/distillation", "model/support"),
)


@pytest.mark.parametrize("name", PURE)
def test_the_mathematics_takes_tensors_and_numbers_and_calls_no_generator_no_device_and_no_other_rank(
    name: str,
) -> None:
    path = REPOSITORY / "align" / f"{name}.py"
    modules = {module.split(".")[0] for module in imports(path) if not module.startswith(MAY_READ)}
    assert modules <= {"__future__", "torch", "math"}
    annotations = {
        ast.unparse(argument.annotation)
        for function in functions(path)
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.annotation
    }
    assert "Tensor" in annotations
    assert annotations <= NUMBERS_AND_TENSORS
    used = {node.attr for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
    assert not used & IMPURE
