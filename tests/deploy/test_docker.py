"""The images: pinned, not root, and a context of what they copy and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.places import REPOSITORY

DOCKER = REPOSITORY / "deploy" / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
EACH = pytest.mark.parametrize("dockerfile", FILES, ids=lambda path: path.name)


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Instruction and argument of every line; continued lines are one."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def arguments(dockerfile: Path, word: str) -> list[str]:
    return [rest for found, rest in instructions(dockerfile) if found == word]


def let_in(dockerfile: Path, path: str) -> bool:
    """Whether the ignore file lets a file into the context: the last pattern that matches it or a folder of it decides."""
    kept = True
    for line in Path(f"{dockerfile}.dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        if any(fnmatch(name, pattern.lstrip("!").replace("**/", "*")) and same_depth(name, pattern) for name in above):
            kept = pattern.startswith("!")
    return kept


def same_depth(name: str, pattern: str) -> bool:
    """A `*` of an ignore file does not reach over a `/`; `**` does."""
    return "**" in pattern or name.count("/") == pattern.lstrip("!").count("/")


def copied(dockerfile: Path) -> Iterator[str]:
    """Every file that a COPY takes from the context, let in or not."""
    for line in arguments(dockerfile, "COPY"):
        for source in line.split()[:-1]:
            path = REPOSITORY / source
            assert path.exists(), f"{dockerfile.name} copies {source}, which is not there"
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            yield from (str(file.relative_to(REPOSITORY)) for file in files)


def test_there_is_an_image_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@EACH
def test_the_base_is_pinned_to_a_release_and_a_mirror_may_be_named(dockerfile: Path) -> None:
    assert arguments(dockerfile, "FROM") == ["${BASE}"]
    (base,) = arguments(dockerfile, "ARG")
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-\w+", base)


@EACH
def test_packages_come_from_the_lock_alone(dockerfile: Path) -> None:
    lock = f"deploy/requirements/{dockerfile.stem}.txt"
    assert f"{lock} requirements.txt" in arguments(dockerfile, "COPY")
    installs = [part for run in arguments(dockerfile, "RUN") for part in run.split("&&") if "pip install" in part]
    assert all(
        "--no-deps" in part or re.search(r"pip install --no-cache-dir uv==[\d.]+\s*$", part) for part in installs
    )
    pins = [line for line in (REPOSITORY / lock).read_text().splitlines() if line[:1].isalnum()]
    assert len(pins) > 50
    assert [line for line in pins if "==" not in line and " @ " not in line] == []


@EACH
def test_the_uv_of_the_images_is_that_of_the_makefile(dockerfile: Path) -> None:
    of_make = re.search(r"uv==[\d.]+", (REPOSITORY / "Makefile").read_text())
    assert of_make and of_make.group() in dockerfile.read_text()


@EACH
def test_what_runs_is_not_root_and_kubernetes_can_see_it(dockerfile: Path) -> None:
    order = [word for word, _ in instructions(dockerfile)]
    assert arguments(dockerfile, "USER") == ["1000"]
    assert "RUN" not in order[order.index("USER") :]
    assert "--uid 1000 " in " ".join(arguments(dockerfile, "RUN"))


@EACH
def test_what_is_copied_is_let_into_the_context_and_nothing_else_is(dockerfile: Path) -> None:
    wanted = {path for path in copied(dockerfile) if "__pycache__" not in path}
    packages = {path for path in wanted if path.startswith(("align/", "cluster/", "deploy/requirements/"))}
    assert {path for path in packages if not let_in(dockerfile, path)} == set()
    assert all(let_in(dockerfile, path) for path in ("pyproject.toml", "LICENSE", "deploy/runs/demo.toml"))
    for path in (
        "tests/cluster/capacity/test_bill.py",
        ".git/config",
        "models/tiny/policy/config.json",
        "deploy/runs/results/demo.json",
    ):
        assert not let_in(dockerfile, path)
    for path in (".env", "runs/x/config.toml", "align/__pycache__/x.pyc", "deploy/LOG.md"):
        assert not let_in(dockerfile, path)


@EACH
def test_the_image_has_what_the_kubernetes_operator_calls(dockerfile: Path) -> None:
    assert " wget " in " ".join(arguments(dockerfile, "RUN"))  # bash and grep are in Debian; ray comes with the lock
    assert re.search(r"^ray==", (REPOSITORY / f"deploy/requirements/{dockerfile.stem}.txt").read_text(), re.MULTILINE)


@EACH
def test_no_secret_is_baked_in(dockerfile: Path) -> None:
    names = " ".join(rest for word, rest in instructions(dockerfile) if word in ("ENV", "ARG"))
    assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD", names)
