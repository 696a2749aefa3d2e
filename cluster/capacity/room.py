"""Whether a run can ever fit this machine, or the cluster that it joins. Told what is there; asks nobody."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.capacity.bill import places
from cluster.capacity.machines import Cluster, Node, ThisMachine, nodes
from cluster.capacity.remedies import check_fit, settings_that_fit
from cluster.faults import ResourceError
from cluster.spec.config import RunConfig


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run asks of Ray, in all."""

    num_cpus: float
    num_gpus: float

    @classmethod
    def of(cls, cfg: RunConfig) -> Demand:
        """Sums over the roles."""
        asked = places(cfg)
        return cls(sum(r.count * r.cpus for r in asked), sum(r.count * r.gpus for r in asked))

    def check(self, num_cpus: float, num_gpus: float, where: str) -> None:
        """Raise ResourceError if this can never fit."""
        for kind, needed, there in (("CPUs", self.num_cpus, num_cpus), ("GPUs", self.num_gpus, num_gpus)):
            if needed > there:
                raise ResourceError(
                    f"the run needs {needed:g} {kind}, {where} has {there:g}",
                    f"lower rollout.num_actors, learner.num_ranks or num_{kind.lower()} of the roles, "
                    f"or use a cluster with {needed:g} {kind}",
                )


def check_machine(cfg: RunConfig, weights_bytes: int, here: ThisMachine) -> None:
    """Raise ResourceError if a local run can never fit this machine; before anything is started."""
    node = Node(cpus=here.num_cpus, gpus=here.num_gpus, memory_gib=math.inf, gpu_memory_gib=math.inf)
    check_fit(cfg, places, [node], "here", can_join=False)
    check_memory(cfg, weights_bytes, here.memory_bytes)


def check_cluster(cfg: RunConfig, cluster: Cluster) -> None:
    """Raise ResourceError if the cluster that was joined can never hold the run."""
    where = f"the cluster at {cluster.address}"
    if cluster.grows_to:
        Demand.of(cfg).check(*within_reach(cluster.resources, cluster.grows_to), where)
    else:
        check_fit(cfg, places, nodes(cluster.machines), f"of {where}")


def within_reach(now: Mapping[str, float], most: Mapping[str, float]) -> tuple[float, float]:
    """CPUs and GPUs that a cluster has now or, where it grows by itself, may have."""
    return max(now.get("CPU", 0), most.get("CPU", 0)), max(now.get("GPU", 0), most.get("GPU", 0))


def check_memory(cfg: RunConfig, weights_bytes: int, memory_bytes: int) -> None:
    """Raise ResourceError if what surely lies in host memory is more than there is."""
    needed = _host_bytes(cfg, weights_bytes)
    if needed > memory_bytes:
        fits = settings_that_fit(cfg, lambda other: _host_bytes(other, weights_bytes) <= memory_bytes)
        changes = [*itertools.islice(fits, 1), f"a machine with {math.ceil(needed / 2**30)} GiB", "a smaller model"]
        raise ResourceError(
            f"the run needs at least {needed / 2**30:.1f} GiB of memory, this machine has {memory_bytes / 2**30:.1f} GiB",
            "would fit: " + ", or ".join(changes[:2]),
        )


def _host_bytes(cfg: RunConfig, weights_bytes: int) -> int:
    """What surely lies in host memory.

    On CPUs: weights, gradients and Adam's two moments of the learner in float32 (4 x, shared by its ranks, each of which loads
    all weights at first), the weights and the keys and values of every engine, and every copy of the reference, if there is
    one, which is taken to be as large as the policy; where it is refreshed, the first one is kept beside the newest.
    """
    learner = 0 if cfg.learner.num_gpus else max(4, cfg.learner.num_ranks) * weights_bytes
    engine = 0 if cfg.rollout.num_gpus else weights_bytes + (cfg.rollout.kv_cache_bytes or 0)
    copies = 0 if cfg.scorer.num_gpus or cfg.reference is None else 1 + bool(cfg.refresh_every)
    scorer = copies * weights_bytes
    return learner + cfg.rollout.num_actors * engine + cfg.scorer.num_actors * scorer
