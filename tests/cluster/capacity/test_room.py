"""Whether a run can ever fit: the sums, the memory of this machine, a cluster that may grow."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.capacity.machines import Cluster, ThisMachine
from cluster.capacity.room import Demand, check_cluster, check_machine, check_memory, within_reach
from cluster.faults import ResourceError
from tests.fakes.run_files import config


@pytest.mark.parametrize(
    ("sections", "num_cpus", "num_gpus"),
    [
        ({}, 2, 0),
        ({"rollout": {"num_actors": 3}, "scorer": {"num_actors": 2}}, 4, 0),
        ({"rollout": {"num_actors": 2, "num_gpus": 4}, "learner": {"num_gpus": 1}}, 3, 9),
        ({"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}, "scorer": {"num_gpus": 0.5, "num_actors": 2}}, 2, 3),
        ({"learner": {"num_ranks": 2, "num_gpus": 1, "num_cpus": 3}, "rollout": {"num_gpus": 1}}, 7, 3),
        ({"rollout": {"num_cpus": 0.5, "num_actors": 4}, "scorer": {"num_cpus": 1}, "learner": {"num_cpus": 2}}, 5, 0),
    ],
)
def test_a_run_asks_for_the_sum_over_its_roles(sections: dict[str, Any], num_cpus: float, num_gpus: float) -> None:
    demand = Demand.of(config(**sections))
    assert (demand.num_cpus, demand.num_gpus) == (num_cpus, num_gpus)


def test_learner_and_engine_that_share_a_gpu_fit_one_gpu_with_a_scorer() -> None:
    shared = {"weights": {"transport": "ipc"}, "learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}}
    demand = Demand.of(config(**shared, scorer={"num_gpus": 0.5}))
    assert 0.5 < demand.num_gpus <= 1


def test_the_demand_of_a_run_of_one_actor_fits_two_cores() -> None:
    Demand.of(config()).check(num_cpus=2, num_gpus=0, where="this machine")


@pytest.mark.parametrize(
    ("there", "missing"),
    [((3, 8), "the run needs 4 CPUs, this machine has 3"), ((4, 7), "the run needs 8 GPUs, this machine has 7")],
)
def test_what_can_never_fit_is_refused_with_what_is_missing(there: tuple[int, int], missing: str) -> None:
    demand = Demand(num_cpus=4, num_gpus=8)
    demand.check(4, 8, "this machine")
    with pytest.raises(ResourceError, match=missing) as caught:
        demand.check(*there, "this machine")
    assert caught.value.exit_code == 3
    assert "lower rollout.num_actors" in caught.value.advice


def test_a_cluster_that_grows_by_itself_is_counted_as_large_as_it_may_become() -> None:
    assert within_reach({"CPU": 4, "GPU": 1}, {}) == (4, 1)
    assert within_reach({"CPU": 4}, {"CPU": 2, "GPU": 8}) == (4, 8)


# --- memory -------------------------------------------------------------------------------------------------------

GIB = 1 << 30
MEMORY = [
    ({}, 4 + 1 + 1),  # weights, gradients and two moments; the engine's weights; the reference
    ({"rollout": {"num_actors": 3, "kv_cache_bytes": 2 * GIB}}, 4 + 3 * (1 + 2) + 1),
    ({"scorer": {"num_actors": 2}}, 4 + 1 + 2),
    ({"reference": {"refresh_every": 5}}, 4 + 1 + 2),
    ({"reference": None, "reward": {"kind": "exact_match"}, "scorer": {"num_actors": 2}}, 4 + 1),
    ({"learner": {"num_ranks": 2}}, 4 + 1 + 1),  # shards of the same
    ({"learner": {"num_ranks": 6}, "run": {"prompts_per_step": 6}}, 6 + 1 + 1),  # each loads the whole at first
    ({"learner": {"num_gpus": 1}}, 1 + 1),
    ({"rollout": {"num_gpus": 1, "kv_cache_bytes": 2 * GIB}}, 4 + 1),
    ({"learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}, "scorer": {"num_gpus": 1}}, 0),
]


@pytest.mark.parametrize(("sections", "num_models"), MEMORY)
def test_what_lies_in_host_memory_is_counted_in_models(sections: dict[str, Any], num_models: int) -> None:
    cfg = config(**sections)
    check_memory(cfg, weights_bytes=GIB, memory_bytes=num_models * GIB)
    if num_models:
        with pytest.raises(
            ResourceError, match=rf"needs at least {num_models}\.0 GiB of memory, this machine has"
        ) as caught:
            check_memory(cfg, weights_bytes=GIB, memory_bytes=num_models * GIB - 1)
        assert caught.value.exit_code == 3
        assert f"a machine with {num_models} GiB" in caught.value.advice


def test_where_memory_is_short_a_setting_is_named_that_fits() -> None:
    cfg = config(rollout={"num_actors": 3, "kv_cache_bytes": GIB})
    with pytest.raises(ResourceError) as caught:
        check_memory(cfg, weights_bytes=GIB, memory_bytes=9 * GIB)
    assert caught.value.advice == "would fit: --set rollout.num_actors=2, or a machine with 11 GiB"
    check_memory(config(rollout={"num_actors": 2, "kv_cache_bytes": GIB}), GIB, 9 * GIB)


# --- this machine -----------------------------------------------------------------------------------------------


def test_a_machine_is_refused_for_its_cpus_before_its_memory_is_counted() -> None:
    small = ThisMachine(num_cpus=2, num_gpus=0, memory_bytes=7 * GIB)
    check_machine(config(), GIB, small)
    with pytest.raises(
        ResourceError, match=r"no room for 7 of rollout \(1 CPUs\); the only machine here has 2 CPUs, no GPUs"
    ):
        check_machine(config(rollout={"num_actors": 8}), GIB, small)
    with pytest.raises(ResourceError, match=r"needs at least 12\.0 GiB of memory, this machine has 7\.0 GiB"):
        check_machine(config(), 2 * GIB, small)


# --- a cluster --------------------------------------------------------------------------------------------------


def cluster(grows_to: dict[str, float]) -> Cluster:
    """Two machines with two CPUs each and one without any, and what an autoscaler may make of it."""
    machines = [{"CPU": 2.0, "memory": 1e9}, {"CPU": 2.0, "memory": 1e9}, {"memory": 1e9}]
    return Cluster("10.0.0.7:6379", machines, {"CPU": 4.0}, grows_to)


def test_a_run_that_fits_a_cluster_is_let_through() -> None:
    check_cluster(config(rollout={"num_actors": 3}), cluster({}))


def test_a_run_that_fits_no_machine_of_the_cluster_is_refused_though_the_sum_would_do() -> None:
    with pytest.raises(
        ResourceError, match=r"no room for 1 of rollout \(3 CPUs\); the largest of the 2 machines"
    ) as caught:
        check_cluster(config(rollout={"num_cpus": 3}), cluster({}))
    assert "--set learner.num_cpus=0.5 --set rollout.num_cpus=0.5" in caught.value.advice


def test_a_cluster_that_grows_is_refused_only_beyond_what_it_may_grow_to() -> None:
    check_cluster(config(rollout={"num_actors": 60}), cluster({"CPU": 64}))
    with pytest.raises(ResourceError, match=r"the run needs 66 CPUs, the cluster at .* has 64"):
        check_cluster(config(rollout={"num_actors": 65}), cluster({"CPU": 64}))
