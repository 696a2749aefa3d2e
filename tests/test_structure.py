"""The shape of the code that DESIGN.md promises: who imports what, how long things are, what they are called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.places import REPOSITORY

FILES = sorted(path for package in ("align", "cluster") for path in (REPOSITORY / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80

MAY_IMPORT_RAY = {"placement", "handles", "reservation", "submit", "doctor", "plan", "faults", "engine", "prometheus"}
MAY_IMPORT_VLLM = {"engine"}
MAY_IMPORT_WANDB = {"sinks"}
# A rollout actor tells a dead engine from a bug by the exception's type; the import is inside that function.
LAZY_IMPORTS = {("rollout", "vllm.v1.engine.exceptions")}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """`cluster/actors/engine/engine.py` and `cluster/actors/engine/receiver.py` are both "engine"."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return parts[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(node: ast.AST) -> Iterator[str]:
    """The modules that one import statement names, those of `from package import module` spelled out too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used here"
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> set[str]:
    """Every module the file imports anywhere, also inside functions."""
    return {name for node in ast.walk(tree(path)) for name in imported_by(node)}


def imports_at_the_top(path: Path) -> set[str]:
    """What is imported when the file is, less what is under `if TYPE_CHECKING`."""
    return {name for node in tree(path).body for name in imported_by(node)}


def importers(package: str) -> set[str]:
    """Names of the files that import the package, the lazy exceptions left out."""
    found = set()
    for path in FILES:
        lazy = {module for file, module in LAZY_IMPORTS if file == name_of(path)}
        lazy -= imports_at_the_top(path)
        for module in imports(path):
            allowed = any(module == name or module.startswith(f"{name}.") for name in lazy)
            if module.split(".")[0] == package and not allowed:
                found.add(name_of(path))
    return found


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


# --- imports -----------------------------------------------------------------------------------------------------


def test_importing_the_algorithm_the_config_and_the_loop_loads_no_ray_no_vllm_and_no_wandb() -> None:
    modules = ["align", *(module_of(p) for p in FILES if p.parts[-2] == "align" and p.stem != "__init__")]
    code = f"import sys, cluster.spec.config, cluster.loop.loop, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    names = {name.split(".")[0] for name in loaded.stdout.split()}
    assert {"align", "cluster"} <= names
    assert not names & {"ray", "vllm", "wandb"}


def test_align_imports_neither_the_runtime_nor_what_belongs_to_it() -> None:
    for path in FILES:
        if module_of(path).split(".")[0] == "align":
            packages = {module.split(".")[0] for module in imports(path)}
            assert not packages & {"cluster", "ray", "vllm", "wandb"}, path


def test_each_heavy_package_is_imported_in_its_place_alone() -> None:
    assert importers("vllm") == MAY_IMPORT_VLLM
    assert importers("wandb") == MAY_IMPORT_WANDB
    assert importers("ray") <= MAY_IMPORT_RAY
    assert "placement" in importers("ray")


def test_the_loop_imports_no_torch_either() -> None:
    assert not {m.split(".")[0] for m in imports(REPOSITORY / "cluster" / "loop.py")} & {
        "torch",
        "ray",
        "vllm",
        "wandb",
    }


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {module_of(path): path for path in FILES}
    edges = {name: {m for m in imports_at_the_top(path) if m in modules} for name, path in modules.items()}

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges[name]
        return seen

    assert sum(map(len, edges.values())) > 20
    assert [name for name in modules if name in reachable(name)] == []


# --- size and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_file_is_too_long_and_none_of_its_functions(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES
    lengths = {function.name: int(function.end_lineno or 0) - function.lineno + 1 for function in functions(path)}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_no_file_and_no_folder_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    names = {part.removesuffix(".py") for path in FILES for part in path.relative_to(REPOSITORY).parts}
    assert "returns" in names
    assert not names & empty


def test_no_class_has_a_name_that_says_nothing() -> None:
    classes = [node.name for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert "Learner" in classes
    assert [name for name in classes if name.endswith(("Manager", "Handler", "Helper", "Util", "Utils", "Base"))] == []


def test_every_public_name_of_align_has_a_docstring() -> None:
    missing = []
    for path in FILES:
        if module_of(path).split(".")[0] != "align":
            continue
        owners = [tree(path), *(n for n in tree(path).body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
        for owner in owners:
            public = [n for n in owner.body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]
            missing += [f"{path.name}: {node.name}" for node in (owner, *public) if not ast.get_docstring(node)]
    assert missing == []


# --- pure functions ----------------------------------------------------------------------------------------------

NUMBERS_AND_TENSORS = {"Tensor", "Tensor | None", "float", "int", "bool", "str"}
IMPURE = {
    *("rand", "randn", "randint", "rand_like", "randn_like", "randperm", "random", "default_rng"),
    *("multinomial", "bernoulli", "normal", "uniform", "dropout", "manual_seed", "Generator", "sample", "shuffle"),
    *("cuda", "cpu", "all_reduce", "all_gather", "broadcast", "barrier", "distributed"),
}


@pytest.mark.parametrize(
    "name", ["returns", "surrogates", "corrections", "losses", "guards", "distillation", "support"]
)
def test_the_mathematics_takes_tensors_and_numbers_and_calls_no_generator_no_device_and_no_other_rank(
    name: str,
) -> None:
    path = REPOSITORY / "align" / f"{name}.py"
    assert {module.split(".")[0] for module in imports(path)} <= {"__future__", "torch", "math"}
    annotations = {
        ast.unparse(argument.annotation)
        for function in functions(path)
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.annotation
    }
    assert "Tensor" in annotations
    assert annotations <= NUMBERS_AND_TENSORS
    used = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    assert not used & IMPURE
