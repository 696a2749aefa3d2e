"""The machines of a live cluster, as Ray or its dashboard tells of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.fit import Node


def node(resources: Mapping[str, float]) -> Node | None:
    """A machine by what Ray places by, which is neither host nor GPU memory; None if nothing can be placed there."""
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    if not (cpus or gpus):
        return None
    return Node(cpus=max(cpus, 1e-9), gpus=gpus, memory_gib=math.inf, gpu_memory_gib=math.inf)


def nodes(resources: Iterable[Mapping[str, float]]) -> list[Node]:
    """All machines on which something can be placed."""
    return [found for each in resources if (found := node(each))]


def with_memory(resources: Mapping[str, Mapping[str, float]], summary: Any) -> list[Node]:
    """The same with the memory that the dashboard has seen of them, by the id of the node; infinite where it has not.

    Args:
        resources: Of the nodes that are alive.
        summary: Answer of the dashboard to `/nodes?view=summary`.
    """
    seen = {entry["raylet"].get("nodeId"): entry for entry in summary["data"]["summary"] if entry.get("raylet")}
    found = []
    for name, amounts in resources.items():
        if (machine := node(amounts)) is None:
            continue
        memory = (seen.get(name, {}).get("mem") or [math.inf])[0] / 2**30
        gpus = [gpu["memoryTotal"] / 2**10 for gpu in seen.get(name, {}).get("gpus") or () if gpu.get("memoryTotal")]
        found.append(machine.model_copy(update={"memory_gib": memory, "gpu_memory_gib": min(gpus, default=math.inf)}))
    return found


def is_fixed(status: Any) -> bool:
    """Whether nothing can grow the cluster, by the dashboard's answer to `/api/cluster_status`.

    Without an autoscaler Ray's monitor makes up a type for each node, "node_" and the node's id; with one the types have
    names. Where the monitor says nothing (autoscaler v2) it may grow.
    """
    report = ((status.get("data") or {}).get("clusterStatus") or {}).get("autoscalerReport") or {}
    types = report.get("nodeTypeMapping") or {}
    return bool(types) and all(kind == f"node_{name}" for name, kind in types.items())
