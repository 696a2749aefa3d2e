"""Where the processes of a run find a machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity.bill import Role
from cluster.capacity.fit import unplaced
from cluster.capacity.machines import Node

GIB = 2**30
EIGHT_GPUS = Node(cpus=64, memory_gib=512, gpus=8, gpu_memory_gib=80)
SMALL = Node(cpus=2, memory_gib=8)


def role(
    name: str = "rollout", count: int = 1, cpus: float = 1, gpus: float = 0, gib: int = 1, gpu_gib: int = 0
) -> Role:
    return Role(name, count, cpus, gpus, gib * GIB, gpu_gib * GIB, "")


def test_a_process_is_never_spread_over_machines() -> None:
    halves = [Node(cpus=8, memory_gib=64, gpus=4, gpu_memory_gib=80)] * 2
    assert unplaced([role(gpus=8)], halves)[0].count == 1
    assert unplaced([role(gpus=8)], [EIGHT_GPUS]) == []


def test_the_large_are_placed_first_so_that_the_small_do_not_take_their_place() -> None:
    machines = [EIGHT_GPUS, Node(cpus=64, memory_gib=512, gpus=1, gpu_memory_gib=80)]
    assert unplaced([role("scorer", gpus=1), role("rollout", gpus=8)], machines) == []


def test_where_engines_first_would_leave_no_room_for_the_memory_of_the_ranks_the_ranks_are_placed_first() -> None:
    needed = [role("learner", count=6, cpus=16, gpus=1, gib=150), role("rollout", count=2, cpus=8, gpus=4)]
    assert unplaced(needed, [EIGHT_GPUS] * 2) == []


def test_those_that_find_no_place_are_counted() -> None:
    missing = unplaced([role(count=5, gpus=2)], [EIGHT_GPUS])
    assert [(m.name, m.count) for m in missing] == [("rollout", 1)]


@pytest.mark.parametrize(
    "too_much",
    [role(cpus=3), role(gib=9), role(gpus=1), role(gpus=1, gpu_gib=81)],
    ids=["cpu", "memory", "gpu", "gpu memory"],
)
def test_every_resource_counts(too_much: Role) -> None:
    assert unplaced([too_much], [SMALL])
    assert (unplaced([too_much], [EIGHT_GPUS]) == []) == (too_much.gpu_bytes <= 80 * GIB)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_what_is_placed_never_exceeds_what_is_there(wanted: list[tuple[int, int, int]], num_machines: int) -> None:
    machine = Node(cpus=8, memory_gib=64, gpus=4, gpu_memory_gib=80)
    needed = [role(f"role{i}", count, cpus, gpus) for i, (count, cpus, gpus) in enumerate(wanted)]
    missing = {m.name: m.count for m in unplaced(needed, [machine] * num_machines)}
    placed = [(n.count - missing.get(n.name, 0), n) for n in needed]
    assert sum(count * n.cpus for count, n in placed) <= 8 * num_machines
    assert sum(count * n.gpus for count, n in placed) <= 4 * num_machines
