"""What is said when a run does not fit: what is missing, and changes that do fit."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from cluster.capacity.bill import Role, places, roles
from cluster.capacity.fit import unplaced
from cluster.capacity.machines import Node
from cluster.capacity.remedies import check_fit, settings_that_fit
from cluster.capacity.words import machine
from cluster.faults import ResourceError
from cluster.spec.config import RunConfig
from cluster.spec.shape import ModelShape
from tests.fakes.run_files import config, tree

GIB = 2**30
SHAPE = ModelShape(int(8e9), 32, 4096, 128_256, 8, 128)
SMALL = Node(cpus=2, memory_gib=math.inf)
EIGHT_GPUS = Node(cpus=64, memory_gib=512, gpus=8, gpu_memory_gib=80)


def refusal(machines: list[Node], sections: dict[str, Any], **how: Any) -> ResourceError:
    with pytest.raises(ResourceError) as error:
        check_fit(config(**sections), how.pop("bill", places), machines, **how)
    return error.value


def changed(sections: dict[str, Any], settings: str) -> RunConfig:
    """The run with the settings of an advice, as a user would paste them."""
    from cluster.spec.config import _apply

    content = tree(**sections)
    for setting in re.findall(r"--set (\S+)", settings):
        _apply(content, setting.rstrip(","))
    return RunConfig.model_validate(content)


def test_what_is_missing_is_named_with_what_there_is() -> None:
    error = refusal([SMALL] * 3, {"rollout": {"num_actors": 9}}, where="of the cluster at http://c:8265")
    assert error.exit_code == 3
    assert error.message == (
        "no room for 4 of rollout (1 CPUs); the largest of the 3 machines of the cluster at http://c:8265 has 2 CPUs, no GPUs"
    )


RUNS = [
    ({"rollout": {"num_actors": 5}}, [SMALL], places),
    ({"rollout": {"num_actors": 5}, "learner": {"num_ranks": 2}}, [SMALL], places),
    ({"learner": {"num_ranks": 2}}, [SMALL], places),
    ({"scorer": {"num_actors": 5, "num_cpus": 1}}, [SMALL] * 2, places),
    ({"rollout": {"num_cpus": 2}, "learner": {"num_cpus": 2}}, [SMALL], places),
    ({"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}}, [SMALL], places),
    ({"rollout": {"num_gpus": 1, "num_actors": 12}, "learner": {"num_gpus": 1}}, [EIGHT_GPUS], places),
    ({"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}}, [EIGHT_GPUS] * 2, lambda cfg: roles(cfg, SHAPE, None)),
]


@pytest.mark.parametrize(("sections", "machines", "bill"), RUNS)
def test_two_changes_are_named_and_each_fits(sections: dict[str, Any], machines: list[Node], bill: Any) -> None:
    error = refusal(machines, sections, bill=bill)
    assert error.advice.startswith("would fit: ")
    first, second = error.advice.removeprefix("would fit: ").split(", or ")
    assert not unplaced(bill(changed(sections, first)), machines), first
    if found := re.match(r"(\d+) more machines? with (\d+) CPUs", second):
        largest = next(m for m in machines if m.cpus == float(found[2]))
        needed = bill(config(**sections))
        assert not unplaced(needed, [*machines, *[largest] * int(found[1])])
        assert unplaced(needed, [*machines, *[largest] * (int(found[1]) - 1)]), "fewer would not do"
    elif second.startswith("--set"):
        assert not unplaced(bill(changed(sections, second)), machines), second
    else:
        words = re.fullmatch(
            r"one machine with (\d+) CPUs(?:, (\d+) GiB)?(?:, (\d+) GPUs(?: of (\d+) GiB)?|, no GPUs)", second
        )
        assert words, second
        cpus, memory, gpus, gpu_memory = (float(word) if word else math.inf for word in words.groups())
        there = Node(cpus=cpus, memory_gib=memory, gpus=int(gpus) if gpus < math.inf else 0, gpu_memory_gib=gpu_memory)
        assert not unplaced(bill(config(**sections)), [there])


def test_as_many_actors_are_kept_as_fit() -> None:
    advice = refusal([SMALL] * 20, {"rollout": {"num_actors": 300}}).advice
    assert advice == "would fit: --set rollout.num_actors=39, or one machine with 301 CPUs, no GPUs"


def test_a_machine_alone_can_only_be_exchanged() -> None:
    error = refusal([SMALL], {"rollout": {"num_actors": 9}}, where="here", can_join=False)
    assert error.message.endswith("the only machine here has 2 CPUs, no GPUs")
    assert error.advice == "would fit: --set rollout.num_actors=1, or one machine with 10 CPUs, no GPUs"


def test_a_cluster_without_machines_is_told_what_it_needs() -> None:
    error = refusal([], {}, where="in the cluster")
    assert (
        error.message == "no room for 1 of learner (1 CPUs); 1 of rollout (1 CPUs); no machine in the cluster has CPUs"
    )
    assert error.advice == "would fit: one machine with 2 CPUs, no GPUs"


def test_a_change_that_contradicts_the_rest_of_the_run_is_not_named() -> None:
    """Without GPUs the transport "nccl" cannot be."""
    sections = {"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}, "weights": {"transport": "nccl"}}
    assert "--set" not in refusal([SMALL], sections).advice


def test_what_fits_is_let_through_and_nothing_is_named_that_nobody_accepts() -> None:
    check_fit(config(), places, [SMALL])
    assert list(settings_that_fit(config(rollout={"num_actors": 3}), lambda cfg: False)) == []


def test_memory_is_named_where_it_is_counted() -> None:
    def bill(cfg: RunConfig) -> list[Role]:
        return [replace(role, host_bytes=5 * GIB) for role in places(cfg)]

    message = refusal([Node(cpus=8, memory_gib=8)], {"rollout": {"num_actors": 2}}, bill=bill).message
    assert "rollout (1 CPUs, 5 GiB)" in message
    assert message.endswith("the only machine has 8 CPUs, 8 GiB, no GPUs")
    assert machine(EIGHT_GPUS) == "64 CPUs, 512 GiB, 8 GPUs of 80 GiB"
