"""Whether the processes of a run find a machine each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.capacity.bill import Role
from cluster.capacity.machines import Node


@dataclass(slots=True)
class _Free:
    """What is left of a machine."""

    cpus: float
    gpus: float
    host_bytes: float
    gpu_bytes: float

    @classmethod
    def of(cls, node: Node) -> _Free:
        return cls(node.cpus, node.gpus, node.memory_gib * 2**30, node.gpu_memory_gib * 2**30)

    def takes(self, role: Role) -> bool:
        """Put one process of the role here, if it fits."""
        fits = (
            role.cpus <= self.cpus + 1e-9
            and role.gpus <= self.gpus + 1e-9
            and role.host_bytes <= self.host_bytes
            and (not role.gpus or role.gpu_bytes <= self.gpu_bytes)
        )
        if fits:
            self.cpus, self.gpus, self.host_bytes = (
                self.cpus - role.cpus,
                self.gpus - role.gpus,
                self.host_bytes - role.host_bytes,
            )
        return fits


def unplaced(needed: Sequence[Role], machines: Sequence[Node]) -> list[Role]:
    """The roles of which not every process finds a machine, with the number that finds none.

    First fit, each process on one machine, in two orders: most GPUs first, and most host memory first, which finds a place for
    many ranks of a learner beside engines over several GPUs. Greedy, so a rare packing that exists may be missed, but what it
    finds fits.
    """
    by_gpus = sorted(needed, key=lambda role: (-role.gpus, -role.host_bytes))
    by_memory = sorted(needed, key=lambda role: (-role.host_bytes, -role.gpus))
    return min((_first_fit(order, machines) for order in (by_gpus, by_memory)), key=_num_processes)


def _first_fit(roles: Sequence[Role], machines: Sequence[Node]) -> list[Role]:
    free = [_Free.of(machine) for machine in machines]
    missing = []
    for role in roles:
        failed = sum(not any(place.takes(role) for place in free) for _ in range(role.count))
        if failed:
            missing.append(replace(role, count=failed))
    return missing


def _num_processes(roles: Sequence[Role]) -> int:
    return sum(role.count for role in roles)
