"""Room for a run on its cluster: one placement group for all processes, and what is said while others hold the room."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.capacity.bill import places
from cluster.capacity.words import need
from cluster.faults import ResourceError
from cluster.fleet.session import grows_to
from cluster.spec.config import RunConfig

_PROGRESS_S = 30.0
_SLICE_S = 1  # Ray takes whole seconds; short, so that Ctrl-C is heard
_TELL_S = 10.0  # how long Ray may take to tell who holds what
Say = Callable[[str], None]


class Reservation:
    """The places of all processes of a run, taken together or not at all, on as few machines as they fit.

    So no two runs can each hold half of what they need and wait for the other's half.

    Args:
        cfg: The run.
        grows: Whether the cluster may get machines by itself.
    """

    def __init__(self, cfg: RunConfig, grows: bool) -> None:
        self._cfg, self._grows = cfg, grows
        self._index: dict[tuple[str, int], int] = {}
        bundles: list[dict[str, float]] = []
        for role in places(cfg):
            bundle = {kind: amount for kind, amount in (("CPU", role.cpus), ("GPU", role.gpus)) if amount}
            for rank in range(role.count if bundle else 0):
                self._index[role.name, rank] = len(bundles)
                bundles.append(bundle)
        if cfg.transport == "ipc":
            self._index["rollout", 0] = self._index["learner", 0]  # one bundle, so that both get the same GPU
        self._group = ray.util.placement_group(bundles, strategy="PACK") if bundles else None

    def strategy(self, role: str, rank: int) -> Any:
        """Ray's scheduling strategy for a process; one that asks for nothing may run anywhere."""
        index = self._index.get((role, rank))
        return "DEFAULT" if index is None else PlacementGroupSchedulingStrategy(self._group, index)

    async def taken(self, deadline_s: float, say: Say, warn: Say) -> None:
        """Wait until the cluster has given the places; every 30 s say what is waited for, what is free and who holds the rest.

        Args:
            deadline_s: How long to wait for others to give room.
            say: Told of the progress.
            warn: Told once that the cluster is busy.

        Raises:
            ResourceError: If no machine can ever take a process, or there is no room within the deadline.
        """
        began, told = time.monotonic(), 0.0
        while self._group and not await asyncio.to_thread(self._group.wait, _SLICE_S):
            waited = time.monotonic() - began
            if not self._grows and self._state() == "INFEASIBLE":
                raise ResourceError(
                    f"no machine of the cluster has room for one of {self._wanted()}", "see align plan, and ray status"
                )
            if waited < deadline_s and told and waited - told < _PROGRESS_S:
                continue
            situation = await asyncio.to_thread(self._situation)
            if waited >= deadline_s:
                raise ResourceError(
                    f"the cluster was busy for {waited:.0f} s: no room for {self._wanted()}; {situation}",
                    "start it again later, the same command goes on here; or raise deadlines.room_s",
                )
            if not told:
                warn("the cluster is busy: the run starts once others give it room, or a machine joins")
            told = waited
            say(f"waiting      {waited:.0f} s of {deadline_s:g} s for {self._wanted()}; {situation}")

    def _wanted(self) -> str:
        return ", ".join(f"{role.count} x {need(role)}" for role in places(self._cfg) if role.cpus or role.gpus)

    def _state(self) -> str:
        return str(ray.util.placement_group_table(self._group)["stats"]["scheduling_state"])

    def _situation(self) -> str:
        """What is free and who holds the rest, as far as Ray tells in a while."""
        free, total = ray.available_resources(), ray.cluster_resources()
        rooms = ", ".join(f"{free.get(k, 0):g} of {total[k]:g} {k}s" for k in ("CPU", "GPU") if total.get(k))
        machines = sum(node["Alive"] for node in ray.nodes())
        try:
            holders = _holders()
        except Exception as error:  # the state API raises bare ones, and none of them may end the wait
            holders = f"who holds the rest is not known ({type(error).__name__})"
        return f"free: {rooms} on {machines} machine(s); {holders}"


async def reserve(cfg: RunConfig, say: Say, warn: Say) -> Reservation:
    """Room for all processes of a run; see `Reservation.taken`."""
    reservation = Reservation(cfg, grows=bool(grows_to()))
    await reservation.taken(cfg.deadlines.room_s, say, warn)
    return reservation


def _holders() -> str:
    """Jobs and what their actors and placement groups hold."""
    from ray.util import state

    options: Any = {"detail": True, "timeout": int(_TELL_S), "limit": 1000, "raise_on_missing_output": False}
    groups = state.list_placement_groups(filters=[("state", "=", "CREATED")], **options)
    actors = state.list_actors(filters=[("state", "=", "ALIVE")], **options)
    held = [(group.creator_job_id, bundle["unit_resources"]) for group in groups for bundle in group.bundles or ()]
    held += [(a.job_id, a.required_resources or {}) for a in actors if not a.placement_group_id]
    names = {job.job_id: job.submission_id for job in state.list_jobs(**options) if job.job_id and job.submission_id}
    return told(held, names)


def told(held: Iterable[tuple[str, Mapping[str, float]]], names: Mapping[str, str]) -> str:
    """Who holds what, in words.

    Args:
        held: Ray's job id and CPUs and GPUs of everything that is held.
        names: Names of the jobs that were submitted.
    """
    sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for job, resources in held:
        for kind in ("CPU", "GPU"):
            sums[job][kind] += resources.get(kind, 0)
    parts = [
        f"{names.get(job, f'Ray job {job}')} ({', '.join(f'{n:g} {kind}s' for kind, n in sorted(kinds.items()) if n)})"
        for job, kinds in sums.items()
        if any(kinds.values())
    ]
    return f"held by {', '.join(parts)}" if parts else "held by no actor; tasks may hold it"
