"""Machines: cluster files, what a dashboard has seen, and what of this machine a run may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from cluster.capacity.machines import ThisMachine, read_cluster, with_memory
from cluster.faults import ConfigError


def test_only_the_cpus_that_this_process_may_use_are_counted() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert ThisMachine.look().num_cpus == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert ThisMachine.look().num_cpus == len(allowed)


def test_a_cluster_file_lists_kinds_of_machines(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("[[nodes]]\ncount = 3\ncpus = 8\nmemory_gib = 32\n[[nodes]]\ncpus = 4\nmemory_gib = 16\ngpus = 1\n")
    machines = read_cluster(path).machines()
    assert [(m.cpus, m.gpus) for m in machines] == [(8, 0), (8, 0), (8, 0), (4, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nodes = 3", "nodes"),
        ("[[nodes]]\ncpus = 0\nmemory_gib = 1", "nodes.0.cpus"),
        ("[[nodes]]\ncpus = 1\nmemory_gib = 1\ngpu = 3", "nodes.0.gpu"),
        ("[[nodes", "not valid TOML"),
        (None, "cannot be read"),
    ],
)
def test_a_cluster_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "cluster.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_cluster(path)


def test_the_memory_of_machines_is_that_which_the_dashboard_has_seen() -> None:
    gpus = [{"memoryTotal": 81_559}, {"memoryTotal": 81_920}]
    summary = {"data": {"summary": [{"raylet": {"nodeId": "a"}, "mem": [2**36, 0], "gpus": gpus}, {"raylet": {}}]}}
    seen, unseen = with_memory({"a": {"CPU": 8.0, "GPU": 2.0}, "b": {"CPU": 4.0}, "head": {"memory": 1.0}}, summary)
    assert (seen.cpus, seen.gpus, seen.memory_gib, seen.gpu_memory_gib) == (8, 2, 64, 79.6)
    assert (unseen.cpus, unseen.memory_gib, unseen.gpu_memory_gib) == (4, math.inf, math.inf)
